r"""Robust means: a few hostile or broken clients can't drag them away.

They go by holders, the clients that speak of a coordinate: all of them, what is not sent being zero or unchanged as the update
says, but where absent is ``"unheld"``, and a client has no say about what it does not hold. Filling that with zeros would let
two attackers among five clients decide what the other three do not hold. With the changes :math:`d_c` that clients' uploads would
make, all of :math:`n` clients counting alike whatever their examples:

- :class:`TrimmedMean`: per coordinate, without the :math:`\lfloor \beta m \rfloor` smallest and largest of its :math:`m`
  holders' changes; :math:`\beta = 1/2` is the median.
- :class:`Krum`: where all hold a coordinate, the mean of the clients with the smallest sums of their :math:`n - f - 2` smallest
  distances to others, a distance being the mean squared difference on the coordinates that two clients have in common. Of
  the other coordinates nobody who compared them may know anything: they get the median of their holders.
- :class:`ClippedMean`: the mean of changes none of which is longer than the cohort's median. It bounds what a client can do, and
  no more.

They protect a coordinate as far as its holders do: where few clients hold much of a model, two hostile ones among them may be
its majority. A rule needs all uploads of a round at once, so memory grows with the cohort, and a federation of one process.

References: D. Yin, Y. Chen, K. Ramchandran, P. Bartlett, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical
Rates", ICML 2018, https://arxiv.org/abs/1803.01498 (median, trimmed mean). P. Blanchard, E. M. El Mhamdi, R. Guerraoui,
J. Stainer, "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent", NeurIPS 2017,
https://arxiv.org/abs/1703.02757 (Krum). Their extension to holders is our own.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from typing_extensions import override

from lightning_fedsparse.aggregation import Aggregator, MaskedMean, cast_like
from lightning_fedsparse.update import SparseUpdate, as_delta, positions_in

__all__ = ["ClippedMean", "Krum", "TrimmedMean", "krum_scores"]

_CHUNK = 2**16  # coordinates that are looked at together

_Part: TypeAlias = tuple[Tensor, Tensor | None]
"""A client's changes of a tensor, float64 and flat, and their ascending positions, None if they are of all entries."""


class _Robust(Aggregator):
    """Keeps the updates of a round until all are there."""

    def __init__(self) -> None:
        self._template: Mapping[str, Tensor] | None = None
        self._updates: list[SparseUpdate] = []

    @override
    def start(self, template: Mapping[str, Tensor]) -> None:
        self._template, self._updates = template, []

    @override
    @torch.no_grad()
    def add(self, update: SparseUpdate) -> None:
        positions_in(self._started(), update)
        if self._updates and (odd := sorted(update.values.keys() ^ self._updates[0].values.keys())):
            raise ValueError(f"expected values of the same tensors in all updates of a round, got a difference {odd}")
        for name, value in update.values.items():
            if not value.isfinite().all():
                raise ValueError(f"expected finite values, got others in {name!r}")
        self._updates.append(update)

    @override
    @torch.no_grad()
    def result(self) -> dict[str, Tensor]:
        template, updates = self._started(), self._updates
        if not updates:
            raise ValueError("expected at least one update before result(), got none")
        if len(updates) < self.fewest:
            raise ValueError(f"expected at least {self.fewest} updates for {self}, got {len(updates)}")
        self._template, self._updates = None, []
        return self._merged(template, updates)

    @abstractmethod
    def _merged(self, template: Mapping[str, Tensor], updates: list[SparseUpdate]) -> dict[str, Tensor]:
        """New tensors of the template's names."""

    def _started(self) -> Mapping[str, Tensor]:
        if self._template is None:
            raise ValueError("expected start(template) before any add(update) or result()")
        return self._template


class TrimmedMean(_Robust):
    """Per coordinate, the mean over its holders without the extremes; buffers likewise, over the clients that send them.

    A coordinate that nobody holds keeps its bits. Values of buffers that are not finite count as not sent.

    Args:
        trim: Share of a coordinate's holders to leave out on either side, in [0, 0.5]; 0.5 is the median, the mean of the
            two in the middle where holders are even in number.

    Raises:
        ValueError: For a share out of range.

    Example:
        >>> rule = TrimmedMean()
        >>> rule.start({"w": torch.zeros(2)})
        >>> for change in ([1.0, 1.0], [2.0, 2.0], [3.0, 900.0]):
        ...     rule.add(SparseUpdate({"w": torch.tensor(change)}, {"w": None}, kind="delta"))
        >>> rule.result()
        {'w': tensor([2., 2.])}
    """

    def __init__(self, trim: float = 0.5) -> None:
        super().__init__()
        if not 0 <= trim <= 0.5:
            raise ValueError(f"expected trim in [0, 0.5], got {trim}")
        self.trim = trim

    @override
    def _merged(self, template: Mapping[str, Tensor], updates: list[SparseUpdate]) -> dict[str, Tensor]:
        new = {}
        for name, old in template.items():
            parts = _parts(name, old, updates)
            flat = old.detach().clone(memory_format=torch.contiguous_format).view(-1)
            for chunk, rows in _rows(parts, len(flat)):
                held = rows.isfinite().sum(0)
                # a hair more, as 0.42 * 150 is a little less than 63; of a few holders one, or two, are left in the middle
                dropped = (self.trim * held.double() + 1e-9).long().minimum((held - 1).clamp(min=0) // 2)
                rank = torch.arange(len(rows), device=rows.device).unsqueeze(1)
                kept = (rank >= dropped) & (rank < held - dropped)
                mean = rows.sort(0).values.masked_fill_(~kept, 0).sum(0) / kept.sum(0)
                flat[chunk] = torch.where(held > 0, cast_like(flat[chunk].double() + mean, old), flat[chunk])
            new[name] = torch.empty_like(old.detach()).copy_(flat.view(old.shape))
        return new


class Krum(_Robust):
    """Where all clients hold a coordinate, the mean of those that are closest to many others; the median elsewhere.

    Buffers get their median too.

    Args:
        hostile: f, how many clients of a round may be hostile; it needs ``2 * hostile + 3`` updates, and ``hostile + keep``.
        keep: How many clients to take the mean of: 1, or more for multi-Krum.

    Raises:
        ValueError: For numbers out of range; for fewer updates than it needs.
    """

    def __init__(self, hostile: int, keep: int = 1) -> None:
        super().__init__()
        if hostile < 0 or keep < 1:
            raise ValueError(f"expected hostile of at least 0 and keep of at least 1, got {hostile} and {keep}")
        self.hostile = hostile
        self.keep = keep
        self.fewest = max(2 * hostile + 3, hostile + keep)

    @override
    def _merged(self, template: Mapping[str, Tensor], updates: list[SparseUpdate]) -> dict[str, Tensor]:
        closest = krum_scores(template, updates, self.hostile).argsort(stable=True)[: self.keep].tolist()
        chosen = _mean(template, [as_delta(template, updates[index]) for index in closest])
        new = TrimmedMean()._merged(template, updates)
        for name in updates[0].values:
            masks = [mask for update in updates if (mask := _holders(update, name)) is not None]
            common = torch.stack(masks).all(0) if masks else torch.ones_like(new[name], dtype=torch.bool)
            new[name] = torch.where(common.to(new[name].device), chosen[name], new[name])
        return new

    def __repr__(self) -> str:
        return f"Krum(hostile={self.hostile}, keep={self.keep})"


class ClippedMean(_Robust):
    """The mean over holders of changes, each shortened to the cohort's median length; buffers by their median.

    Of a client that prunes a weight the way to zero is shortened like any other change: under methods that send absent
    ``"zero"`` weights (SparsyFed, Top-K) the mean is dense.

    Args:
        norm: What lengths are: ``"rms"``, per weight, so that clients that hold more are not clipped more, or ``"l2"``.

    Raises:
        ValueError: For another norm.
    """

    def __init__(self, norm: Literal["rms", "l2"] = "rms") -> None:
        super().__init__()
        if norm not in ("rms", "l2"):
            raise ValueError(f"expected norm 'rms' or 'l2', got {norm!r}")
        self.norm = norm

    @override
    def _merged(self, template: Mapping[str, Tensor], updates: list[SparseUpdate]) -> dict[str, Tensor]:
        lengths = [self._length(as_delta(template, update)) for update in updates]
        limit = median(lengths)
        # made twice, so that only one is there at a time
        changes = (as_delta(template, update) for update in updates)
        scales = [limit / length if length > limit else 1.0 for length in lengths]
        mean = _mean(template, (_scaled(change, scale) for change, scale in zip(changes, scales, strict=True)))
        sent = {name for update in updates for name in update.buffers}
        return mean | TrimmedMean()._merged({name: template[name] for name in sent}, updates)

    def _length(self, change: SparseUpdate) -> float:
        length = math.sqrt(sum(float(value.square().sum()) for value in change.values.values()))
        return length if self.norm == "l2" else length / math.sqrt(max(1, change.num_values))


def krum_scores(template: Mapping[str, Tensor], updates: Sequence[SparseUpdate], hostile: int) -> Tensor:
    """Krum's scores, the smaller the closer to others: float64 of shape ``(updates,)``.

    Args:
        template: The server's tensors, by name.
        updates: What clients sent.
        hostile: f: a score is the sum of the ``updates - f - 2`` smallest distances, at least one.

    Returns:
        A score is infinite where a client has too few others that hold anything it holds.

    Raises:
        ValueError: For too few updates.
    """
    others = len(updates) - hostile - 2
    if others < 1:
        raise ValueError(f"expected at least {hostile + 3} updates where {hostile} may be hostile, got {len(updates)}")
    squares = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    common = torch.zeros_like(squares)
    for name in dict.fromkeys(name for update in updates for name in update.values):
        for _, rows in _rows(_parts(name, template[name], updates), template[name].numel()):
            held = rows.isfinite().double()
            rows = rows.nan_to_num_(0.0)
            one_way = rows.square() @ held.T
            squares += (one_way + one_way.T - 2 * rows @ rows.T).cpu()
            common += (held @ held.T).cpu()
    distances = torch.where(common > 0, squares.clamp(min=0) / common, math.inf).fill_diagonal_(math.inf)
    return distances.sort(1).values[:, :others].sum(1)


def _parts(name: str, old: Tensor, updates: Sequence[SparseUpdate]) -> list[_Part | None]:
    """What each update would change of one tensor, a parameter or a buffer; None where it does not speak of it."""
    parts: list[_Part | None] = []
    for update in updates:
        if name in update.values:
            change = as_delta({name: old}, replace(update, values={name: update.values[name]}))
            where = None if change.masks[name] is None else change.positions(name)
            parts.append((change.values[name].reshape(-1), where))
        elif name in update.buffers:
            parts.append((update.buffers[name].detach().reshape(-1).double() - old.detach().reshape(-1).double(), None))
        else:
            parts.append(None)
    return parts


def _rows(parts: Sequence[_Part | None], size: int) -> Iterator[tuple[slice, Tensor]]:
    """Changes of a tensor, some coordinates at a time: float64 of shape ``(clients, coordinates)``, NaN where not held.

    Nothing where nobody speaks of it.
    """
    device = next((part[0].device for part in parts if part is not None), None)
    for start in range(0, size if device is not None else 0, _CHUNK):
        stop = min(start + _CHUNK, size)
        rows = torch.full((len(parts), stop - start), math.nan, dtype=torch.float64, device=device)
        for row, part in zip(rows, parts, strict=True):
            if part is None:
                continue
            values, where = part
            if where is None:
                row.copy_(values[start:stop])
            else:
                first, last = torch.searchsorted(where, where.new_tensor([start, stop])).tolist()
                row.index_copy_(0, where[first:last] - start, values[first:last])
        yield slice(start, stop), rows.masked_fill_(rows.isinf(), math.nan)


def _holders(update: SparseUpdate, name: str) -> Tensor | None:
    """The mask of what an update speaks of; None if that is all."""
    return update.masks[name] if update.absent == "unheld" else None


def _scaled(change: SparseUpdate, scale: float) -> SparseUpdate:
    return replace(change, values={name: value * scale for name, value in change.values.items()})


def _mean(template: Mapping[str, Tensor], changes: Iterable[SparseUpdate]) -> dict[str, Tensor]:
    mean = MaskedMean()
    mean.start(template)
    for change in changes:
        mean.add(change)
    return mean.result()
