r"""What a training step costs a device: multiply-adds, bytes of parameters, bytes that wait for the backward pass.

A layer of dense weight takes three products of :math:`N` multiply-adds each: its output, its input's gradient (not where the
input needs none, as a first layer's) and its weight's gradient. With a weight of density :math:`d` (share of non-zeros)
and an input that is kept for the backward pass at density :math:`a`, hardware that skips zeros would need

.. math:: N \, (d + d + a)

which is what is called theoretical here: dense kernels do all :math:`3N`, at the speed of all :math:`3N`. Bytes of
parameters are theoretical too: torch holds dense tensors while it trains. Bytes that autograd holds for the backward pass
are measured.

Reference: the count of sparse training in M. A. Raihan, T. M. Aamodt, "Sparse Weight Activation Training", NeurIPS 2020,
https://arxiv.org/abs/2001.01969, by which "SparsyFed", ICLR 2025, https://arxiv.org/abs/2504.05153, trains.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lightning_fedsparse.activations import SavedActivation

__all__ = ["LayerCost", "product_macs", "saved_bytes", "sparse_bytes"]


@dataclass(frozen=True)
class LayerCost:
    """One call of a layer in a training step.

    Args:
        macs: Multiply-adds of one dense product.
        weight_density: Share of non-zeros in the weight that forward used.
        activation_density: Share of the input that was kept for the weight's gradient.
        input_gradient: Whether the input needs a gradient.
        weight_gradient: Whether the weight does.
    """

    macs: int
    weight_density: float = 1.0
    activation_density: float = 1.0
    input_gradient: bool = True
    weight_gradient: bool = True

    @property
    def dense_step_macs(self) -> int:
        """Multiply-adds of forward and backward as dense kernels do them.

        Example:
            >>> LayerCost(100, weight_density=0.1, input_gradient=False).dense_step_macs
            200
        """
        return self.macs * (1 + self.input_gradient + self.weight_gradient)

    @property
    def step_macs(self) -> float:
        """Multiply-adds of forward and backward without those that have a zero in the weight or a dropped activation.

        Example:
            >>> LayerCost(100, weight_density=0.1, activation_density=0.5).step_macs
            70.0
        """
        weight = self.weight_density * (1 + self.input_gradient)
        return self.macs * (weight + self.activation_density * self.weight_gradient)


def product_macs(layer: nn.Module, x: Tensor, y: Tensor) -> int:
    """Multiply-adds of a dense convolution or linear layer, biases not counted.

    Args:
        layer: The layer.
        x: Its input.
        y: Its output for this input.

    Example:
        >>> import torch
        >>> conv, x = nn.Conv2d(3, 8, 5), torch.zeros(2, 3, 10, 10)
        >>> product_macs(conv, x, conv(x))  # 2 images, 8 maps of 6 x 6, each from 3 x 5 x 5
        43200
    """
    weight = layer.weight
    assert isinstance(weight, Tensor)
    # a transposed convolution spreads each entry of its input, as a convolution gathers each entry of its output
    entries = x if getattr(layer, "transposed", False) else y
    return entries.numel() * weight[0].numel()


def sparse_bytes(tensors: Mapping[str, Tensor], nonzeros: Mapping[str, int]) -> int:
    """Least bytes of tensors: dense, or the non-zero values and one bit per entry for their positions.

    Args:
        tensors: All parameters by name.
        nonzeros: How many entries are not zero, for those that may be sparse.

    Example:
        >>> import torch
        >>> sparse_bytes({"weight": torch.zeros(80), "bias": torch.zeros(2)}, {"weight": 5})  # 5 * 4 + 80 / 8 + 2 * 4
        38
    """
    total = 0
    for name, tensor in tensors.items():
        size = tensor.element_size()
        kept = nonzeros.get(name, tensor.numel())
        total += min(tensor.numel() * size, kept * size + math.ceil(tensor.numel() / 8))
    return total


class saved_bytes(saved_tensors_hooks):  # noqa: N801  # a context manager, named like torch's
    """Within this context, count the bytes that autograd holds for backward passes; what they compute stays the same.

    Each storage counts once and whole, until the last that needs it lets it go; pruned activations count as they are kept.

    Args:
        exclude: Tensors that are held anyway, such as parameters.

    Attributes:
        peak: Most bytes that were held at once.
    """

    def __init__(self, exclude: Iterable[Tensor] = ()) -> None:
        self.peak = 0
        self._bytes = 0
        self._holders: Counter[int] = Counter()
        self._excluded = tuple(exclude)
        super().__init__(partial(_Saved, self), _unpack)

    def look(self) -> None:
        """Take what is held now into account: another context, inside this one, may have saved without notice."""
        self.peak = max(self.peak, self._bytes + sum(saved.nbytes for saved in SavedActivation.live))

    def hold(self, tensor: Tensor) -> None:
        """Count a tensor that is saved."""
        storage = tensor.untyped_storage()
        # looked up each time: a parameter's memory changes when effective weights are swapped in
        if any(storage.data_ptr() == tensor.untyped_storage().data_ptr() for tensor in self._excluded):
            return
        if not self._holders[storage.data_ptr()]:
            self._bytes += storage.nbytes()
        self._holders[storage.data_ptr()] += 1
        self.look()

    def release(self, tensor: Tensor) -> None:
        """Count a saved tensor that is let go."""
        storage = tensor.untyped_storage()
        if not self._holders[storage.data_ptr()]:
            return  # excluded
        self._holders[storage.data_ptr()] -= 1
        if not self._holders[storage.data_ptr()]:
            self._bytes -= storage.nbytes()


class _Saved:
    """A saved tensor that says when it is let go."""

    def __init__(self, meter: saved_bytes, tensor: Tensor) -> None:
        # detached, because an operation that holds its own output would never be freed
        self.tensor = tensor.detach()
        self.version = tensor._version
        self._meter = meter
        meter.hold(self.tensor)

    def __del__(self) -> None:
        self._meter.release(self.tensor)


def _unpack(saved: _Saved) -> Tensor:
    # autograd's own check does not see through hooks
    if saved.tensor._version != saved.version:
        raise RuntimeError(
            f"expected a tensor as it was saved for the backward pass, got one of shape {tuple(saved.tensor.shape)} that was "
            "modified by an inplace operation since"
        )
    return saved.tensor
