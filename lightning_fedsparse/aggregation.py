r"""Merging the updates of a round, one after the other.

With client weights :math:`\rho_c`, values :math:`v_c` and holders :math:`H_i` (the clients whose mask keeps coordinate
:math:`i`), :class:`WeightedMean` is over all clients, what is absent counting as the update says, and
:class:`MaskedMean` over the holders alone:

.. math:: \sum_c \rho_c v_{c,i} / \sum_c \rho_c \qquad \sum_{c \in H_i} \rho_c v_{c,i} / \sum_{c \in H_i} \rho_c

For deltas this mean is added to the template. Sums are float64 and made in the order in which updates come: that order
decides the last bits of a result. Memory is that of the model, whatever the cohort: an update is added and forgotten.
While all updates share the support of a tensor, its sum has only the size of that support and one weight stands for all
coordinates, which is several times cheaper than a weight per coordinate.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from lightning_fedsparse.update import Absent, Kind, SparseUpdate
from lightning_fedsparse.weighted_sum import WeightedSum, flat64

__all__ = ["Aggregator", "MaskedMean", "WeightedMean"]


class Aggregator(ABC):
    """Merges a round's updates into new values of the server's tensors."""

    @abstractmethod
    def start(self, template: Mapping[str, Tensor]) -> None:
        """Begin a round.

        Args:
            template: The server's tensors as the clients got them, parameters and buffers together. They are read
                until the last :meth:`result` of the round, and never written.
        """

    @abstractmethod
    def add(self, update: SparseUpdate) -> None:
        """Add one client's update; one that raises leaves no trace.

        Raises:
            ValueError: If the update does not fit the template, or the updates added before it.
        """

    @abstractmethod
    def result(self) -> dict[str, Tensor]:
        """New tensors of the template's names, shapes and dtypes; a copy of the template where no update says more.

        Raises:
            ValueError: If no update was added, or their weights sum to zero.
        """


class _Mean(Aggregator):
    """What both means share: everything but the weights and what becomes of coordinates that not all clients hold."""

    def __init__(self) -> None:
        self._template: Mapping[str, Tensor] | None = None
        self._kind: Kind | None = None
        self._absent: Absent | None = None
        self._total = 0.0
        self._parameters: dict[str, WeightedSum] = {}
        self._buffers: dict[str, WeightedSum] = {}

    @abstractmethod
    def _weight(self, update: SparseUpdate) -> float:
        """The update's weight."""

    @abstractmethod
    def _counts(self, update: SparseUpdate) -> bool:
        """Whether a coordinate's result depends on who holds it."""

    @abstractmethod
    def _base(self, old: Tensor) -> Tensor:
        """New values of coordinates that nobody holds, from the old ones of all; may be the same tensor."""

    @abstractmethod
    def _mean(self, old: Tensor, sums: Tensor, held: Tensor | float, total: float) -> Tensor:
        """Mean over coordinates with these old values, weighted sums and holders' weights."""

    def start(self, template: Mapping[str, Tensor]) -> None:
        self._template = template
        self._kind = self._absent = None
        self._total = 0.0
        self._parameters = {}
        self._buffers = {}

    @torch.no_grad()
    def add(self, update: SparseUpdate) -> None:
        template = self._started()
        where = self._check(update, template)
        weight = self._weight(update)
        if self._kind is None:
            self._kind, self._absent = update.kind, update.absent
            self._parameters = {name: WeightedSum(template[name], counting=self._counts(update)) for name in where}
        for name, positions in where.items():
            self._parameters[name].add(update.values[name], positions, weight)
        for name, buffer in update.buffers.items():
            self._buffers.setdefault(name, WeightedSum(template[name], counting=False)).add(buffer, None, weight)
        self._total += weight

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
                new[name] = self._merge(tensor, self._parameters[name])
            elif name in self._buffers and self._buffers[name].weight > 0:
                total = self._buffers[name]
                new[name] = _like(tensor, total.sums / total.weight)
            else:
                new[name] = tensor.detach().clone()
        return new

    def _merge(self, tensor: Tensor, total: WeightedSum) -> Tensor:
        old = flat64(tensor)
        where, sums, held = total.holders()
        before = old if where is None else old[where]
        mean = self._mean(before, sums, held, total.weight)
        if self._kind == "delta":
            mean = mean + before
        return _like(tensor, mean if where is None else self._base(old).index_copy_(0, where, mean))

    def _started(self) -> Mapping[str, Tensor]:
        if self._template is None:
            raise ValueError("expected start(template) before any add(update) or result()")
        return self._template

    def _check(self, update: SparseUpdate, template: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
        """Positions of each parameter's values, None if dense, once the update is known to fit."""
        if update.num_examples < 0:
            raise ValueError(f"expected num_examples of at least 0, got {update.num_examples}")
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
        where: dict[str, Tensor | None] = {}
        for name, tensor in {**update.values, **update.buffers}.items():
            if name not in template:
                raise ValueError(f"expected names of the template, got {name!r}")
            mask = update.masks[name] if name in update.values else None
            shape = tensor.shape if mask is None else mask.shape
            if shape != template[name].shape:
                raise ValueError(f"expected {name!r} of shape {tuple(template[name].shape)}, got {tuple(shape)}")
            if name in update.values:
                positions = where[name] = None if mask is None else update.positions(name)
                if positions is not None and tensor.shape != positions.shape:
                    raise ValueError(
                        f"expected the {positions.numel()} values that the mask of {name!r} keeps, got {tensor.numel()}"
                    )
        return where


class WeightedMean(_Mean):
    """Mean over all clients, weighted by their examples: FedAvg where nothing is masked.

    An absent coordinate counts as 0 under absent ``"zero"``, as the template's value under ``"unchanged"``; an absent
    delta counts as 0 under both. So a coordinate that nobody sends becomes exactly 0 for weights under ``"zero"`` and
    else keeps its bits. ``"unheld"`` has no place here: use :class:`MaskedMean`. Buffers are averaged over the clients
    that send them, with the same weights; integer ones are truncated towards zero.

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

    def _weight(self, update: SparseUpdate) -> float:
        if update.absent == "unheld":
            raise ValueError("expected absent 'zero' or 'unchanged', got 'unheld': MaskedMean averages over holders")
        return float(update.num_examples)

    def _counts(self, update: SparseUpdate) -> bool:
        return update.kind == "weights" and update.absent == "unchanged"

    def _base(self, old: Tensor) -> Tensor:
        return torch.zeros_like(old) if self._kind == "weights" and self._absent == "zero" else old

    def _mean(self, old: Tensor, sums: Tensor, held: Tensor | float, total: float) -> Tensor:
        # a float is the total itself: all clients hold these coordinates, or it makes no difference who does
        return sums / total if isinstance(held, float) else (sums + (total - held) * old) / total


class MaskedMean(_Mean):
    """Per coordinate, the mean over the clients whose mask keeps it; a value of zero counts like any other.

    What nobody holds keeps its bits. ``absent`` plays no part: a client has no say about what it does not send.
    Buffers are averaged over the clients that send them, with the same weights; integer ones are truncated towards
    zero.

    Args:
        weighting: ``"uniform"`` (every holder counts once) or ``"examples"`` (by ``num_examples``).

    Example:
        >>> mean = MaskedMean()
        >>> mean.start({"w": torch.tensor([9.0, 9.0, 9.0])})
        >>> mean.add(SparseUpdate({"w": torch.tensor([1.0])}, {"w": torch.tensor([True, False, False])}))
        >>> mean.add(SparseUpdate({"w": torch.tensor([3.0, 5.0])}, {"w": torch.tensor([True, True, False])}))
        >>> mean.result()
        {'w': tensor([2., 5., 9.])}
    """

    def __init__(self, weighting: Literal["uniform", "examples"] = "uniform") -> None:
        if weighting not in ("uniform", "examples"):
            raise ValueError(f"expected weighting 'uniform' or 'examples', got {weighting!r}")
        super().__init__()
        self.weighting = weighting

    def _weight(self, update: SparseUpdate) -> float:
        return 1.0 if self.weighting == "uniform" else float(update.num_examples)

    def _counts(self, update: SparseUpdate) -> bool:
        return True

    def _base(self, old: Tensor) -> Tensor:
        return old

    def _mean(self, old: Tensor, sums: Tensor, held: Tensor | float, total: float) -> Tensor:
        return sums / held


def _like(tensor: Tensor, flat: Tensor) -> Tensor:
    """A new tensor of the same shape, dtype and memory layout from float64 elements; integers are truncated."""
    exact = flat if tensor.is_floating_point() else flat.trunc()
    return torch.empty_like(tensor.detach()).copy_(exact.reshape(tensor.shape))
