"""Activations that are pruned by magnitude and kept in compressed form until the backward pass.

The threshold at density ``d`` is the ``ceil(d * n)``-th largest magnitude of the whole batch tensor; whatever reaches it
stays, so ties can make it more. A threshold of 0 prunes nothing: the tensor has zeros enough.

Reference: M. A. Raihan, T. M. Aamodt, "Sparse Weight Activation Training", NeurIPS 2020, https://arxiv.org/abs/2001.01969
(SWAT); one threshold per tensor as in the code released with "SparsyFed", ICLR 2025, https://arxiv.org/abs/2504.05153.
"""

from __future__ import annotations

import math
from typing import ClassVar
from weakref import WeakSet

import torch
from torch import Tensor

from lightning_fedsparse.ranking import kth_largest

__all__ = ["PrunedActivation", "activation_threshold"]

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
    # rounded first: 0.05 * 60 is 3.0000000000000004 and means 3
    kept = max(1, math.ceil(round(density * activation.numel(), 6)))
    magnitudes = activation.detach().abs().reshape(-1)
    # a sample says below which bound most entries lie, so that few are ranked: a quarter of the time, and the result is exact
    sample = magnitudes[::_STRIDE]
    share = min(1.0, density * _MARGIN)
    if sample.numel() >= _LEAST_SAMPLE and share < 0.5:
        candidates = magnitudes[magnitudes >= _kth_largest(sample, math.ceil(share * sample.numel()))]
        if candidates.numel() >= kept:
            magnitudes = candidates
    return _kth_largest(magnitudes, kept)


class PrunedActivation:
    """The entries of an activation whose magnitude reaches a threshold, with their positions.

    It takes 8 bytes per kept float32 entry instead of 4 per entry; from a density of a half on, where that is no gain, the
    pruned tensor itself is kept.

    Args:
        activation: Floating-point tensor; it is copied.
        threshold: Magnitude from which on entries are kept, at least 0.

    Attributes:
        density: Share of the entries that were kept, in [0, 1].
        live: All that are held at this moment.
    """

    live: ClassVar[WeakSet[PrunedActivation]] = WeakSet()

    @torch.no_grad()
    def __init__(self, activation: Tensor, threshold: float) -> None:
        flat = activation.detach().reshape(-1)
        # zeros are as they were whether kept or not
        kept = flat != 0 if threshold == 0 else flat.abs() >= threshold
        count = int(kept.count_nonzero())
        # 32 bits reach as far as an activation of 8 GB
        where = torch.int32 if flat.numel() < 2**31 else torch.int64
        self._shape = activation.shape
        self._positions: Tensor | None = None
        if count * (flat.element_size() + where.itemsize) < flat.numel() * flat.element_size():
            positions = kept.nonzero().squeeze(1)
            self._values = flat[positions]
            self._positions = positions.to(where)
        else:
            self._values = flat * kept
        self.density = count / max(1, flat.numel())
        PrunedActivation.live.add(self)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._values.nbytes + (0 if self._positions is None else self._positions.nbytes)

    @torch.no_grad()
    def dense(self) -> Tensor:
        """The pruned activation, contiguous, in its shape and dtype."""
        if self._positions is None:
            return self._values.view(self._shape)
        flat = self._values.new_zeros(self._shape.numel())
        return flat.index_put_((self._positions.long(),), self._values).view(self._shape)


def _kth_largest(magnitudes: Tensor, k: int) -> float:
    if magnitudes.device.type == "cpu":
        return kth_largest(magnitudes, k)
    return float(magnitudes.kthvalue(magnitudes.numel() - k + 1).values)
