"""Activations that are pruned by magnitude and kept in compressed form until the backward pass.

The threshold at density ``d`` is the ``ceil(d * n)``-th largest magnitude of the whole batch tensor; whatever reaches it
stays, so ties can make it more. A threshold of 0 prunes nothing: the tensor has zeros enough.

Reference: M. A. Raihan, T. M. Aamodt, "Sparse Weight Activation Training", NeurIPS 2020, https://arxiv.org/abs/2001.01969
(SWAT); one threshold per tensor as in the code released with "SparsyFed", ICLR 2025, https://arxiv.org/abs/2504.05153.
"""

from __future__ import annotations

import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, cast
from weakref import WeakSet

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from lightning_fedsparse.ranking import kth_largest

__all__ = ["PrunedActivation", "ReluSigns", "SavedActivation", "activation_threshold", "nonzero_share"]

# prime, so that a sample meets all channels and columns; with ten thousand entries it misses the margin once in a long while
_STRIDE = 199
_MARGIN = 1.15
_LEAST_SAMPLE = 1000


@torch.no_grad()
def activation_threshold(activation: Tensor, density: float) -> float:
    """Magnitude from which on an activation's entries are kept.

    Args:
        activation: Floating-point tensor of any shape, not empty.
        density: Share of the entries to keep, in (0, 1].

    Example:
        >>> activation_threshold(torch.tensor([0.5, -0.75, 0.0, 0.25]), 0.5)
        0.5
    """
    magnitudes = _magnitudes(activation.detach().reshape(-1))
    # rounded first: 0.05 * 60 is 3.0000000000000004 and means 3
    kept = max(1, math.ceil(round(density * magnitudes.numel(), 6)))
    # a sample says below which bound most entries lie, so that few are ranked: a quarter of the time, and the result is exact
    sample = magnitudes[::_STRIDE]
    share = min(1.0, density * _MARGIN)
    if sample.numel() >= _LEAST_SAMPLE and share < 0.5:
        bound = _kth_largest(sample, math.ceil(share * sample.numel()))
        candidates = magnitudes.take(_positions(_compare(operator.ge, magnitudes, bound)))
        if candidates.numel() >= kept:
            magnitudes = candidates
    return _kth_largest(magnitudes, kept)


@torch.no_grad()
def nonzero_share(weight: Tensor) -> float:
    """Share of a weight's entries that are not 0, in [0, 1]."""
    return int(_compare(operator.ne, weight.detach().reshape(-1), 0).count_nonzero()) / weight.numel()


class SavedActivation(ABC):
    """What is saved of an activation for a backward pass, in less room than the activation takes.

    Attributes:
        live: All that are held at this moment.
    """

    live: ClassVar[WeakSet[SavedActivation]] = WeakSet()

    def __init__(self) -> None:
        SavedActivation.live.add(self)

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes held."""

    @abstractmethod
    def dense(self) -> Tensor:
        """What the backward pass computes with, contiguous, in the activation's shape and dtype."""


class PrunedActivation(SavedActivation):
    """The entries of an activation whose magnitude reaches a threshold.

    It takes 4 bytes per kept float32 entry and a bit per entry for where they are; where that is no gain, the pruned tensor
    itself is kept.

    Args:
        activation: Floating-point tensor; it is copied.
        threshold: Magnitude from which on entries are kept, at least 0.

    Attributes:
        density: Share of the entries that were kept, in [0, 1].
    """

    @torch.no_grad()
    def __init__(self, activation: Tensor, threshold: float) -> None:
        super().__init__()
        flat = activation.detach().reshape(-1)
        # zeros are as they were whether kept or not
        kept = _compare(operator.ne, flat, 0) if threshold == 0 else _compare(operator.ge, _magnitudes(flat), threshold)
        positions = _positions(kept)
        self.density = positions.numel() / max(1, flat.numel())
        self._shape = activation.shape
        self._bits: Tensor | None = None
        if positions.numel() * flat.element_size() + flat.numel() // 8 + 1 < flat.nbytes:
            self._values = flat.take(positions)
            self._bits = _pack_bits(kept)
        else:
            self._values = flat * kept

    @property
    @override
    def nbytes(self) -> int:
        return self._values.nbytes + (0 if self._bits is None else self._bits.nbytes)

    @override
    @torch.no_grad()
    def dense(self) -> Tensor:
        if self._bits is None:
            return self._values.view(self._shape)
        flat = self._values.new_zeros(self._shape.numel())
        positions = _positions(_unpack_bits(self._bits, flat.numel()).view(torch.bool))
        return flat.scatter_(0, positions, self._values).view(self._shape)


class ReluSigns(SavedActivation):
    """Where the output of a ReLU is above 0, a bit per entry: all that its backward pass asks.

    Args:
        output: The ReLU's output.
    """

    @torch.no_grad()
    def __init__(self, output: Tensor) -> None:
        # what is not at most 0: torch lets the gradient of a NaN pass
        self._bits = _pack_bits(_compare(operator.le, output.detach().reshape(-1), 0)).bitwise_not_()
        self._shape, self._dtype = output.shape, output.dtype
        super().__init__()

    @property
    @override
    def nbytes(self) -> int:
        return self._bits.nbytes

    @override
    @torch.no_grad()
    def dense(self) -> Tensor:
        return _unpack_bits(self._bits, self._shape.numel()).to(self._dtype).view(self._shape)


def _magnitudes(flat: Tensor) -> Tensor:
    # behind a ReLU they are the activation itself; a NaN is not at least 0 either
    return flat if flat.numel() and bool(flat.min() >= 0) else flat.abs()


def _compare(relation: Callable[[Any, float], Any], flat: Tensor, bound: float) -> Tensor:
    # numpy, which has no bfloat16, takes a quarter of torch's time
    if flat.device.type == "cpu" and flat.dtype != torch.bfloat16:
        return torch.from_numpy(relation(flat.numpy(), bound))
    return cast(Tensor, relation(flat, bound))


def _positions(mask: Tensor) -> Tensor:
    # a sixth of the time of torch's own on a CPU
    return torch.from_numpy(np.flatnonzero(mask.numpy())) if mask.device.type == "cpu" else mask.nonzero().squeeze(1)


def _pack_bits(mask: Tensor) -> Tensor:
    """A flat mask at eight entries a byte, the first one in the lowest bit."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.packbits(mask.numpy(), bitorder="little"))
    return _pack_bits_on_device(mask)


def _pack_bits_on_device(mask: Tensor) -> Tensor:
    bytes_ = F.pad(mask, (0, -mask.numel() % 8)).view(-1, 8) << torch.arange(8, dtype=torch.uint8, device=mask.device)
    return bytes_.sum(1, dtype=torch.uint8)


def _unpack_bits(bits: Tensor, size: int) -> Tensor:
    """The flat mask as zeros and ones, uint8."""
    if bits.device.type == "cpu":
        return torch.from_numpy(np.unpackbits(bits.numpy(), count=size, bitorder="little"))
    return _unpack_bits_on_device(bits, size)


def _unpack_bits_on_device(bits: Tensor, size: int) -> Tensor:
    entries = (bits[:, None] >> torch.arange(8, dtype=torch.uint8, device=bits.device)) & 1
    return entries.view(-1)[:size]


def _kth_largest(magnitudes: Tensor, k: int) -> float:
    if magnitudes.device.type == "cpu":
        return kth_largest(magnitudes, k)
    return float(magnitudes.kthvalue(magnitudes.numel() - k + 1).values)
