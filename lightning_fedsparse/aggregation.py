r"""Merging the updates of a round, one after the other.

With client weights :math:`\rho_c`, values :math:`v_c` and holders :math:`H_i` (the clients whose mask keeps coordinate
:math:`i`), :class:`WeightedMean` is over all clients, what is absent counting as the update says, and
:class:`MaskedMean` over the holders alone:

.. math:: \sum_c \rho_c v_{c,i} / \sum_c \rho_c \qquad \sum_{c \in H_i} \rho_c v_{c,i} / \sum_{c \in H_i} \rho_c

For deltas this mean is added to the template. Sums are made in the order in which updates come: that order decides the
last bits of a result. Memory is that of the model, whatever the cohort: an update is added and forgotten. While all
updates share the support of a tensor, its sum has only the size of that support and one weight stands for all coordinates,
which is several times cheaper than a weight per coordinate.

Sums in float32 take half the memory and two thirds of the time of sums in float64, and err by about the square root of the
number of clients times 6e-8 of a value instead of 1e-16. Buffers are summed in float64 in any case.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor
from typing_extensions import override

from lightning_fedsparse.ranks import Ranks
from lightning_fedsparse.update import Absent, Kind, SparseUpdate, positions_in
from lightning_fedsparse.weighted_sum import WeightedSum, reduce_sums

__all__ = ["Aggregator", "MaskedMean", "SumType", "WeightedMean", "cast_like"]

SumType = Literal["float32", "float64"]

_CHUNK = 2**16  # entries that are merged at a time: what is made on the way stays in cache


class Aggregator(ABC):
    """Merges a round's updates into new values of the server's tensors.

    Attributes:
        fewest: Updates that it needs at least: a round with fewer is one that the ``FaultPolicy`` says what to do with.
    """

    fewest: int = 1

    @abstractmethod
    def start(self, template: Mapping[str, Tensor]) -> None:
        """Begin a round.

        Args:
            template: The server's tensors as the clients got them, parameters and buffers together. They are read
                until :meth:`result`, and never written.
        """

    @abstractmethod
    def add(self, update: SparseUpdate) -> None:
        """Add one client's update; one that raises leaves no trace.

        Raises:
            ValueError: If the update does not fit the template, or the updates added before it.
        """

    def reduce(self, ranks: Ranks) -> None:
        """Where several processes have each added some of a round's updates, before the result: take in those of all.

        Optional: without it an aggregator works in one process only.

        Args:
            ranks: The processes; :meth:`~lightning_fedsparse.ranks.Ranks.total` sums named tensors.

        Raises:
            ValueError: If updates of different processes do not fit each other.
            NotImplementedError: By an aggregator of one process; ``FederatedLoop`` refuses it before several start.
        """
        raise NotImplementedError(f"{type(self).__name__} adds up the updates of one process only")

    @abstractmethod
    def result(self) -> dict[str, Tensor]:
        """End the round: new tensors of the template's names, shapes and dtypes, as they are where no update says more.

        Raises:
            ValueError: If no update was added, or their weights sum to zero.
        """


class _Mean(Aggregator):
    """What both means share: everything but the weights and what becomes of coordinates that not all clients hold."""

    def __init__(self, dtype: SumType = "float64") -> None:
        if dtype not in get_args(SumType):
            raise ValueError(f"expected dtype to be one of {get_args(SumType)}, got {dtype!r}")
        self.dtype = dtype
        self._template: Mapping[str, Tensor] | None = None
        self._kind: Kind | None = None
        self._absent: Absent | None = None
        self._total = 0
        self._parameters: dict[str, WeightedSum] = {}
        self._buffers: dict[str, WeightedSum] = {}

    @abstractmethod
    def _weight(self, update: SparseUpdate) -> int:
        """The update's weight."""

    @abstractmethod
    def _counts(self) -> bool:
        """Whether a coordinate's result depends on who holds it, for updates of this kind."""

    @abstractmethod
    def _base(self, old: Tensor) -> Tensor:
        """New values of coordinates that nobody holds, from the old ones; may be the same tensor."""

    @abstractmethod
    def _mean(self, old: Tensor, sums: Tensor, held: Tensor | None, total: int) -> Tensor:
        """Mean over coordinates with these old values and weighted sums; ``held`` of None is the total for all."""

    def start(self, template: Mapping[str, Tensor]) -> None:
        self._template = template
        self._kind = self._absent = None
        self._total = 0
        self._parameters = {}
        self._buffers = {}

    @torch.no_grad()
    def add(self, update: SparseUpdate) -> None:
        template = self._started()
        where = self._check(update, template)
        weight = self._weight(update)
        if self._kind is None:
            self._begin(update.kind, update.absent, where)
        for name, positions in where.items():
            self._parameters[name].add(update.values[name], positions, weight)
        for name, buffer in update.buffers.items():
            self._buffer(name).add(buffer, None, weight)
        self._total += weight

    @torch.no_grad()
    def reduce(self, ranks: Ranks) -> None:
        """See :meth:`Aggregator.reduce`."""
        told = ranks.share((self._kind, self._absent, sorted(self._parameters), list(self._buffers), self._total))
        kinds = [kind for *kind, _, _ in told if kind[0] is not None]
        if not kinds:
            return
        if any(kind != kinds[0] for kind in kinds):
            raise ValueError(f"expected updates of one kind, absent and tensors on all ranks, got {kinds}")
        if self._kind is None:
            self._begin(*kinds[0])
        for *_, buffers, _ in told:
            for name in buffers:
                self._buffer(name)
        reduce_sums({**self._parameters, **self._buffers}, ranks)
        self._total = sum(total for *_, total in told)

    @torch.no_grad()
    def result(self) -> dict[str, Tensor]:
        template = self._started()
        if self._kind is None:
            raise ValueError("expected at least one update before result(), got none")
        if self._total == 0:
            raise ValueError("expected updates with examples behind them, got a total weight of 0")
        new = {}
        for name, tensor in template.items():
            if name in self._parameters:
                # taken out, so that sums and results are not all there at once
                new[name] = self._merge(tensor, self._parameters.pop(name))
            elif name in self._buffers and self._buffers[name].weight > 0:
                total = self._buffers[name]
                new[name] = _like(tensor, cast_like(total.sums / total.weight, tensor))
            else:
                new[name] = tensor.detach().clone()
        self._template = None
        return new

    def _begin(self, kind: Kind, absent: Absent, names: Iterable[str]) -> None:
        template = self._started()
        self._kind, self._absent = kind, absent
        dtype, counting = getattr(torch, self.dtype), self._counts()
        self._parameters = {name: WeightedSum(template[name], counting=counting, dtype=dtype) for name in names}

    def _buffer(self, name: str) -> WeightedSum:
        if name not in self._buffers:
            self._buffers[name] = WeightedSum(self._started()[name], counting=False, dtype=torch.float64)
        return self._buffers[name]

    def _merge(self, tensor: Tensor, total: WeightedSum) -> Tensor:
        old = tensor.detach().reshape(-1)
        held = total.held()
        if total.support is not None:
            new = self._base(old)
            new = new.clone() if new is old else new
        elif len(old) and total.sums.element_size() >= tensor.element_size():
            # in the sums' own memory: every chunk is read before it is written, and it is written no further on
            new = total.sums.view(tensor.dtype)[: len(old)]
        else:
            new = torch.empty_like(old)
        for start in range(0, len(total.sums), _CHUNK):
            chunk = slice(start, start + _CHUNK)
            where = chunk if total.support is None else total.support[chunk]
            sums, before = total.sums[chunk], old[where].to(total.sums.dtype)
            weights = None if held is None else held[chunk]
            mean = self._mean(before, sums, weights, total.weight)
            if self._kind == "delta":
                mean = mean + before
            if not total.shared:
                somebodys = sums != 0 if weights is None else weights != 0
                mean = torch.where(somebodys, mean, self._base(before))
            new[where] = cast_like(mean, tensor)
        return _like(tensor, new)

    def _started(self) -> Mapping[str, Tensor]:
        if self._template is None:
            raise ValueError("expected start(template) before any add(update) or result()")
        return self._template

    def _check(self, update: SparseUpdate, template: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
        """Positions of each parameter's values, None if dense, once the update is known to fit."""
        if self._kind is not None:
            if (update.kind, update.absent) != (self._kind, self._absent):
                raise ValueError(
                    f"expected updates of kind {self._kind!r} with absent {self._absent!r} as the first of the round, "
                    f"got {update.kind!r} with {update.absent!r}"
                )
            if update.values.keys() != self._parameters.keys():
                odd = sorted(update.values.keys() ^ self._parameters.keys())
                raise ValueError(
                    f"expected values of the same tensors in all updates of a round, got a difference {odd}"
                )
        return positions_in(template, update)


class WeightedMean(_Mean):
    """Mean over all clients, weighted by their examples: FedAvg where nothing is masked.

    An absent coordinate counts as 0 under absent ``"zero"``, as the template's value under ``"unchanged"``; an absent
    delta counts as 0 under both. So a coordinate that nobody sends becomes exactly 0 for weights under ``"zero"`` and
    else keeps its bits. ``"unheld"`` has no place here: use :class:`MaskedMean`. Buffers are averaged over the clients
    that send them, with the same weights; integer ones are truncated towards zero.

    Args:
        dtype: Of the sums of parameters.

    B. McMahan, E. Moore, D. Ramage, S. Hampson and B. Agüera y Arcas, "Communication-Efficient Learning of Deep
    Networks from Decentralized Data", AISTATS 2017, https://arxiv.org/abs/1602.05629.

    Example:
        >>> mean = WeightedMean()
        >>> mean.start({"w": torch.tensor([9.0, 9.0])})
        >>> mean.add(SparseUpdate({"w": torch.tensor([1.0])}, {"w": torch.tensor([True, False])}, num_examples=10))
        >>> mean.add(SparseUpdate({"w": torch.tensor([5.0])}, {"w": torch.tensor([True, False])}, num_examples=30))
        >>> mean.result()
        {'w': tensor([4., 9.])}
    """

    def _weight(self, update: SparseUpdate) -> int:
        if update.absent == "unheld":
            raise ValueError("expected absent 'zero' or 'unchanged', got 'unheld': MaskedMean averages over holders")
        return update.num_examples

    def _counts(self) -> bool:
        return self._kind == "weights" and self._absent == "unchanged"

    def _base(self, old: Tensor) -> Tensor:
        return torch.zeros_like(old) if self._kind == "weights" and self._absent == "zero" else old

    def _mean(self, old: Tensor, sums: Tensor, held: Tensor | None, total: int) -> Tensor:
        # without weights of their own all clients hold these coordinates, or it makes no difference who does
        return sums / total if held is None else (sums + (total - held) * old) / total


class MaskedMean(_Mean):
    """Per coordinate, the mean over the clients whose mask keeps it.

    What nobody holds keeps its bits. ``absent`` plays no part: a client has no say about what it does not send.
    Buffers are averaged over the clients that send them, with the same weights; integer ones are truncated towards
    zero.

    Args:
        weighting: ``"uniform"`` (every holder counts once) or ``"examples"`` (by ``num_examples``).
        count: ``"held"``: a value of zero counts like any other; ``"changed"`` (FIARSE's released code): among deltas one
            of zero counts as if its client did not hold the coordinate.
        dtype: Of the sums of parameters.

    Example:
        >>> mean = MaskedMean()
        >>> mean.start({"w": torch.tensor([9.0, 9.0, 9.0])})
        >>> mean.add(SparseUpdate({"w": torch.tensor([1.0])}, {"w": torch.tensor([True, False, False])}))
        >>> mean.add(SparseUpdate({"w": torch.tensor([3.0, 5.0])}, {"w": torch.tensor([True, True, False])}))
        >>> mean.result()
        {'w': tensor([2., 5., 9.])}
    """

    def __init__(
        self,
        weighting: Literal["uniform", "examples"] = "uniform",
        *,
        count: Literal["held", "changed"] = "held",
        dtype: SumType = "float64",
    ) -> None:
        if weighting not in ("uniform", "examples"):
            raise ValueError(f"expected weighting 'uniform' or 'examples', got {weighting!r}")
        if count not in ("held", "changed"):
            raise ValueError(f"expected count 'held' or 'changed', got {count!r}")
        super().__init__(dtype)
        self.weighting = weighting
        self.count = count

    @override
    def add(self, update: SparseUpdate) -> None:
        super().add(_changed(update) if self.count == "changed" else update)

    def _weight(self, update: SparseUpdate) -> int:
        return 1 if self.weighting == "uniform" else update.num_examples

    def _counts(self) -> bool:
        return True

    def _base(self, old: Tensor) -> Tensor:
        return old

    def _mean(self, old: Tensor, sums: Tensor, held: Tensor | None, total: int) -> Tensor:
        return sums / (total if held is None else held)


@torch.no_grad()
def _changed(update: SparseUpdate) -> SparseUpdate:
    """Without the coordinates whose delta is zero."""
    if update.kind != "delta":
        raise ValueError(f"expected deltas where changes count, got an update of kind {update.kind!r}")
    values, masks = {}, {}
    for name, value in update.values.items():
        mask, changed = update.masks[name], value != 0
        values[name] = value[changed]
        if mask is None:
            masks[name] = changed
        else:
            masks[name] = (
                torch.zeros_like(mask).view(-1).index_fill_(0, update.positions(name)[changed], True).view(mask.shape)
            )
    return replace(update, values=values, masks=masks, mask_id=None)


def cast_like(elements: Tensor, tensor: Tensor) -> Tensor:
    """Elements of a tensor's dtype; integers are truncated."""
    return (elements if tensor.is_floating_point() else elements.trunc()).to(tensor.dtype)


def _like(tensor: Tensor, flat: Tensor) -> Tensor:
    """These elements, in row-major order, in the shape and memory layout of a tensor."""
    if tensor.is_contiguous():
        return flat.reshape(tensor.shape)
    return torch.empty_like(tensor.detach()).copy_(flat.reshape(tensor.shape))
