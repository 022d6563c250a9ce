"""A weighted sum that takes sparse terms one by one, in float64, without ever making them dense."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["WeightedSum", "flat64"]


def flat64(tensor: Tensor) -> Tensor:
    """A copy of the elements in row-major order, as float64."""
    return tensor.detach().reshape(-1).to(torch.float64, copy=True)


class WeightedSum:
    """Weighted sum of one tensor over updates.

    While all updates hold the same positions, ``sums`` has an entry for each of these; from then on one for each entry
    of the tensor, and the holders' weights have too if they are counted.
    """

    def __init__(self, tensor: Tensor, *, counting: bool) -> None:
        self._size = tensor.numel()
        self._device = tensor.device
        self._counting = counting
        self._support: Tensor | None = None
        self._shared = True
        self._held: Tensor | None = None
        self.sums = torch.empty(0)
        self.weight = 0.0

    def add(self, values: Tensor, where: Tensor | None, weight: float) -> None:
        """Add values at ascending positions, or everywhere."""
        # the product is rounded before it is added, on every path, so that paths agree to the bit
        term = flat64(values.to(self._device)).mul_(weight)
        where = None if where is None else where.to(self._device)
        if self.sums.dtype != torch.float64:
            self._support, self.sums = where, term
        elif self._shared and _same(self._support, where):
            self.sums += term
        else:
            self._spread()
            _add_at(self.sums, where, term)
            if self._held is not None:
                _add_at(self._held, where, term.new_tensor(weight).expand_as(term))
        self.weight += weight

    def holders(self) -> tuple[Tensor | None, Tensor, Tensor | float]:
        """Positions with a sum (None for all), their sums, and the weight of their holders."""
        if self._shared:
            return self._support, self.sums, self.weight
        where = (self.sums if self._held is None else self._held).nonzero().squeeze(1)
        return where, self.sums[where], self.weight if self._held is None else self._held[where]

    def _spread(self) -> None:
        """Give every entry of the tensor a sum of its own."""
        if not self._shared:
            return
        self._shared = False
        if self._counting:
            self._held = self._full(self._support, torch.full_like(self.sums, self.weight))
        self.sums = self._full(self._support, self.sums)

    def _full(self, where: Tensor | None, entries: Tensor) -> Tensor:
        if where is None:
            return entries
        return torch.zeros(self._size, dtype=torch.float64, device=self._device).index_copy_(0, where, entries)


def _add_at(target: Tensor, where: Tensor | None, term: Tensor) -> None:
    if where is None:
        target += term
    else:
        target.index_add_(0, where, term)


def _same(where: Tensor | None, other: Tensor | None) -> bool:
    return where is other or (where is not None and other is not None and torch.equal(where, other))
