r"""Activation pruning: the backward pass keeps only the largest entries of each layer's input.

For a layer :math:`y = \theta * x + b` whose effective weight has density :math:`d` (share of non-zeros):

.. math:: \hat x = x \cdot [\,|x| \ge t\,], \quad t = \text{the } \lceil d\,n \rceil \text{-th largest of the } n \text{
   magnitudes}, \qquad \nabla_\theta L = \hat x * \nabla_y L, \quad \nabla_x L = \theta^T * \nabla_y L

The forward pass is exact, and so are the gradients of inputs and biases; only the weight's gradient sees the pruned input.
What autograd saves is the compressed copy. A layer without zeros, as all are in the first round, is left alone; evaluation
never prunes.

Memory shrinks where the layer is the only one that keeps its input: after max-pooling, normalization, dropout or GELU. A ReLU
keeps its own output too, of which its backward pass needs no more than the signs: from ``nn.ReLU`` modules these are saved
instead, a bit per entry, and every gradient stays what it was. ``F.relu`` can't be told apart from outside and keeps its
output in addition to the compressed copy.

A layer counts when it is called. ``nn.MultiheadAttention`` calls none of its projections: its ``out_proj`` is left alone, and
its ``in_proj_weight`` is refused.

Use it beside a callback that makes weights sparse; without one it does nothing. At 95 % sparsity accuracy hardly changes,
beyond 99 % it suffers. Under ``torch.compile`` it works too, at the price of a graph break around each of these layers and
ReLUs.

References: "SparsyFed", ICLR 2025, https://arxiv.org/abs/2504.05153; M. A. Raihan, T. M. Aamodt, "Sparse Weight Activation
Training", NeurIPS 2020, https://arxiv.org/abs/2001.01969. The released code of SparsyFed finds the threshold of a convolution
once per client round; that is ``threshold="first_batch"``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_fedsparse.activations import (
    PrunedActivation,
    ReluSigns,
    SavedActivation,
    activation_threshold,
    nonzero_share,
)
from lightning_fedsparse.callbacks.base import SparsityCallback
from lightning_fedsparse.prunable import PRUNABLE_LAYERS, prunable_parameters

__all__ = ["ActivationPruning", "saving_pruned"]


class saving_pruned(saved_tensors_hooks):  # noqa: N801  # a context manager, named like torch's
    """Within this context autograd saves a pruned copy wherever it would save the given activation.

    Args:
        activation: Input of the operations in the context.
        threshold: Magnitude from which on its entries are kept.

    Attributes:
        hits: How often the activation was saved.
    """

    def __init__(self, activation: Tensor, threshold: float) -> None:
        self.hits = 0
        address, size = activation.data_ptr(), activation.numel()

        def pack(tensor: Tensor) -> Tensor | SavedActivation:
            # by address and size, because a linear layer saves a view of another shape
            if tensor.data_ptr() != address or tensor.numel() != size:
                return tensor
            self.hits += 1
            return PrunedActivation(tensor, threshold)

        super().__init__(pack, _unpack)


class saving_signs(saved_tensors_hooks):  # noqa: N801
    """Within this context, which is for the forward of a ReLU only, autograd saves the signs of the output."""

    def __init__(self) -> None:
        super().__init__(ReluSigns, _unpack)


class ActivationPruning(SparsityCallback):
    """Save layer inputs for the backward pass at the density of the layer's weight.

    Args:
        threshold: ``"per_batch"``; or ``"first_batch"``: the one of the first batch in which the layer has zeros, for the
            rest of ``fit`` (of the client's round in a federation).
        density_floor: Least share of a layer's input that is kept, in (0, 1]; the released code's is 1e-7, and 0.01 for
            vision transformers.
        first_layer: Whether the first of the selected layers takes part; its input is the examples themselves.
        include: Globs of weight names whose layers' inputs are pruned, instead of all convolution and linear layers.
        exclude: Globs of weight names whose layers are left alone.

    Raises:
        ValueError: At construction for an option out of range; at the start of ``fit`` for a layer that is neither a
            convolution nor linear, or a glob that matches nothing.
        RuntimeError: In training, if a layer saves another tensor than its input, so that nothing would be pruned.
    """

    def __init__(
        self,
        *,
        threshold: Literal["per_batch", "first_batch"] = "per_batch",
        density_floor: float = 1e-7,
        first_layer: bool = True,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if threshold not in ("per_batch", "first_batch"):
            raise ValueError(f"expected threshold 'per_batch' or 'first_batch', got {threshold!r}")
        if not 0 < density_floor <= 1:
            raise ValueError(f"expected density_floor in (0, 1], got {density_floor}")
        self.threshold = threshold
        self.density_floor = density_floor
        self.first_layer = first_layer
        self.include = tuple(include)
        self.exclude = tuple(exclude)
        self._thresholds: dict[str, float] = {}
        self._densities: dict[str, float] = {}
        self._handles: list[RemovableHandle] = []
        self._open: list[saving_pruned | None] = []
        self._relus: list[saving_signs] = []
        self._key = self._generate_state_key(include=self.include, exclude=self.exclude)

    @property
    def state_key(self) -> str:
        """Tells instances with other selections apart."""
        return self._key

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._thresholds = {}

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._remove_hooks()
        weights = prunable_parameters(pl_module, self.include, exclude=self.exclude, first_layer=self.first_layer)
        for name, layer in _layers(pl_module, weights):
            # the last to see the input and the first to leave, so that the context holds the layer's own forward only
            enter = layer.register_forward_pre_hook(partial(self._enter, name), with_kwargs=True)
            leave = layer.register_forward_hook(partial(self._leave, name), prepend=True, always_call=True)
            self._handles += [enter, leave]
        for relu in pl_module.modules():
            if type(relu) is nn.ReLU:
                leave = relu.register_forward_hook(self._leave_relu, prepend=True, always_call=True)
                self._handles += [relu.register_forward_pre_hook(self._enter_relu), leave]

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._densities.clear()

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        self._densities.clear()

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._remove_hooks()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._remove_hooks()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._remove_hooks()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"activation_thresholds": dict(self._thresholds)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._thresholds = dict(state_dict["activation_thresholds"])

    # -- around each forward of a layer ----------------------------------------------------------------------------

    def _enter(
        self, name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        weight = layer.weight
        assert isinstance(weight, Tensor)
        density = 1.0
        if layer.training and torch.is_grad_enabled() and weight.requires_grad:
            density = self._density(name, weight)
        if density == 1:
            self._open.append(None)
            return None
        x = _as_saved(layer, args[0] if args else kwargs["input"])
        context = saving_pruned(x, self._threshold(name, x, density))
        self._open.append(context)
        context.__enter__()
        return ((x, *args[1:]), kwargs) if args else ((), {**kwargs, "input": x})

    def _leave(self, name: str, layer: nn.Module, args: Any, output: Any) -> None:
        context = self._open.pop()
        if context is None:
            return
        context.__exit__(None, None, None)
        # without an output the layer raised, and that error is the one to see
        if context.hits == 0 and output is not None:
            raise RuntimeError(
                f"expected {name!r} to save its input for the backward pass, got another tensor: its activation can't be "
                f"pruned (a {type(layer).__name__} that pads its input itself does this); exclude it"
            )

    def _enter_relu(self, relu: nn.Module, args: Any) -> None:
        self._relus.append(saving_signs())
        self._relus[-1].__enter__()

    def _leave_relu(self, relu: nn.Module, args: Any, output: Any) -> None:
        self._relus.pop().__exit__(None, None, None)

    def _density(self, name: str, weight: Tensor) -> float:
        """Share of non-zeros in the effective weight, counted once per optimizer step."""
        if name not in self._densities:
            self._densities[name] = max(nonzero_share(weight), self.density_floor)
        return self._densities[name]

    def _threshold(self, name: str, x: Tensor, density: float) -> float:
        if self.threshold == "per_batch":
            return activation_threshold(x, density)
        if name not in self._thresholds:
            self._thresholds[name] = activation_threshold(x, density)
        return self._thresholds[name]

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._open.clear()
        self._relus.clear()


def _layers(module: nn.Module, weights: Mapping[str, nn.Parameter]) -> list[tuple[str, nn.Module]]:
    """Every layer that has one of these weights, with the weight's name; a tied weight may have several."""
    names = {id(weight): name for name, weight in weights.items()}
    owners: dict[str, list[nn.Module]] = {name: [] for name in weights}
    for layer in module.modules():
        for weight in layer.parameters(recurse=False):
            if id(weight) in names:
                owners[names[id(weight)]].append(layer)
    layers: list[tuple[str, nn.Module]] = []
    for name, having in owners.items():
        able = [layer for layer in having if isinstance(layer, PRUNABLE_LAYERS) and layer.weight is weights[name]]
        if not able:
            raise ValueError(
                f"expected weights of convolution and linear layers to prune activations for, got {name!r} of a "
                f"{type(having[0]).__name__}: exclude it"
            )
        layers += [(name, layer) for layer in able]
    return layers


def _as_saved(layer: nn.Module, x: Tensor) -> Tensor:
    """The input as the layer would make it before saving it, so that it can be recognized."""
    kind = x.device.type
    # autocast casts inside the layer, except from float64
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(kind))
    # a linear layer flattens an input of three or more dimensions, which copies one that has no such view
    return x.contiguous() if isinstance(layer, nn.Linear) and x.ndim > 2 else x


def _unpack(saved: Tensor | SavedActivation) -> Tensor:
    return saved.dense() if isinstance(saved, SavedActivation) else saved
