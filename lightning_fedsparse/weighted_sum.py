"""A weighted sum that takes sparse terms one by one without ever making them dense, and knows who held what.

While all terms have the same support, the sum is as small as that. From then on each entry of the tensor has a sum of its
own, and, where it matters who holds an entry, the holders' weights are kept per support while there are few of those, such
as the nested submodels of a few capacities: a sum without counts takes half the time. With many they are counted per entry.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_fedsparse.ranks import Ranks

__all__ = ["WeightedSum", "reduce_sums"]

_CHUNK = 2**15
_MOST_SUPPORTS = 8
_LARGEST_COUNT = 2**31 - 1


class WeightedSum:
    """Weighted sum of one tensor over updates.

    Args:
        tensor: The server's; only its size and device are read.
        counting: Whether :meth:`held` has to tell entries apart.
        dtype: Of the sums.

    Attributes:
        support: Ascending positions of ``sums``; None if they are of all entries.
        sums: Weighted sums.
        weight: Sum of all weights.
        shared: Whether all terms had one support.
    """

    def __init__(self, tensor: Tensor, *, counting: bool, dtype: torch.dtype) -> None:
        self._size = tensor.numel()
        self._device = tensor.device
        self._counting = counting
        self._dtype = dtype
        self._empty = True
        self.shared = True
        self._supports: list[tuple[Tensor | None, int]] = []
        self._counts: Tensor | None = None
        self.support: Tensor | None = None
        self.sums = torch.empty(0)
        self.weight = 0

    def add(self, values: Tensor, where: Tensor | None, weight: int) -> None:
        """Add values at ascending positions, or everywhere."""
        values = values.detach().reshape(-1).to(self._device)
        where = None if where is None else where.to(self._device)
        if self._empty:
            self._empty, self.support, self.sums = False, where, self._term(values, weight)
        elif self.shared and _same(self.support, where):
            self._add_everywhere(values, weight)
        else:
            self._spread()
            if where is None:
                self._add_everywhere(values, weight)
            else:
                self.sums.index_add_(0, where, self._term(values, weight))
            if self._counting:
                self._count(where, weight)
        self.weight += weight

    def _term(self, values: Tensor, weight: int) -> Tensor:
        # in float64 the product is rounded before it is added, on every path, so that paths agree to the bit
        return values.to(self._dtype, copy=True).mul_(weight)

    def _add_everywhere(self, values: Tensor, weight: int) -> None:
        if values.dtype == self._dtype == torch.float32:
            self.sums.add_(values, alpha=weight)
            return
        # a part at a time, in memory that stays in cache: half the time
        term = torch.empty(min(_CHUNK, len(values)), dtype=self._dtype, device=self._device)
        for sums, part in zip(torch.split(self.sums, _CHUNK), torch.split(values, _CHUNK), strict=True):
            sums += term[: len(part)].copy_(part).mul_(weight)

    def held(self) -> Tensor | None:
        """The holders' weights, one per entry, integers; None if :attr:`weight` stands for all or nobody counts."""
        if self.shared or not self._counting:
            return None
        return self._counts_per_entry()

    def layout(self) -> str | None:
        """Which support all terms have; None while there are none, and where entries have sums of their own."""
        if self._empty or not self.shared:
            return None
        if self.support is None:
            return "all"
        return hashlib.blake2b(self.support.cpu().numpy().tobytes(), digest_size=16).hexdigest()

    def parts(self, *, common: bool, weight: int) -> dict[str, Tensor]:
        """What is to be added up where several processes have each taken in some of the terms.

        Args:
            common: Whether they all have one :meth:`layout`; else every entry gets a sum of its own, and where it matters a
                count.
            weight: Sum of the weights of all of them.
        """
        if common:
            return {"sums": self.sums.cpu()}
        self._spread()
        counts = {"counts": self._counts_per_entry(weight - self.weight).cpu()} if self._counting else {}
        return {"sums": self.sums.cpu(), **counts}

    def take(self, totals: Mapping[str, Tensor], weight: int) -> None:
        """Take what has become of :meth:`parts`."""
        self.sums = totals["sums"].to(self._device)
        if "counts" in totals:
            self._counts = totals["counts"].to(self._device)
        self.weight = weight

    def _spread(self) -> None:
        """Give every entry of the tensor a sum of its own."""
        if not self.shared:
            return
        self.shared = False
        if self._empty:
            self._empty, self.sums = False, torch.zeros(self._size, dtype=self._dtype, device=self._device)
        self._supports = [(self.support, self.weight)]
        if self.support is not None:
            sums = torch.zeros(self._size, dtype=self._dtype, device=self._device)
            self.sums = sums.index_copy_(0, self.support, self.sums)
            self.support = None

    def _count(self, where: Tensor | None, weight: int) -> None:
        if self._counts is None:
            for number, (support, so_far) in enumerate(self._supports):
                if _same(support, where):
                    self._supports[number] = support, so_far + weight
                    return
            entries = sum(len(support) for support, _ in self._supports if support is not None)
            if len(self._supports) < _MOST_SUPPORTS and (where is None or entries + len(where) <= 2 * self._size):
                self._supports.append((where, weight))
                return
        _add_count(self._counts_per_entry(weight), where, weight)

    def _counts_per_entry(self, more: int = 0) -> Tensor:
        if self._counts is None:
            dtype = torch.int32 if self.weight + more <= _LARGEST_COUNT else torch.int64
            self._counts = torch.zeros(self._size, dtype=dtype, device=self._device)
            for support, weight in self._supports:
                _add_count(self._counts, support, weight)
            self._supports = []
        elif self.weight + more > _LARGEST_COUNT and self._counts.dtype == torch.int32:
            self._counts = self._counts.long()
        return self._counts


def reduce_sums(sums: Mapping[str, WeightedSum], ranks: Ranks) -> None:
    """Make sums over all ranks of those that each has over its own terms, by the same names on every rank.

    Where all terms of a name have one support no more than that is summed.
    """
    held = ranks.share({name: (own.weight, own.layout()) for name, own in sums.items()})
    weights = {name: sum(theirs[name][0] for theirs in held) for name in sums}
    parts = {}
    for name, own in sums.items():
        layouts = {theirs[name][1] for theirs in held}
        parts[name] = own.parts(common=len(layouts) == 1 and None not in layouts, weight=weights[name])
    flat = {f"{kind} of {name}": tensor for name, own in parts.items() for kind, tensor in own.items()}
    totals = ranks.total(flat)
    for name, total in sums.items():
        total.take({kind: totals[f"{kind} of {name}"] for kind in parts[name]}, weights[name])


def _add_count(counts: Tensor, where: Tensor | None, weight: int) -> None:
    if where is None:
        counts += weight
    else:
        counts.index_add_(0, where, counts.new_tensor(weight).expand(len(where)))


def _same(where: Tensor | None, other: Tensor | None) -> bool:
    return where is other or (where is not None and other is not None and torch.equal(where, other))
