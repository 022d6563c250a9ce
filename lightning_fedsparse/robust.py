r"""Robust means: a few hostile or broken clients can't drag them away.

All are over the holders of a coordinate, those whose mask keeps it: a client that holds less has no say about the rest, and
filling its place with zeros would let two attackers among five clients decide what three do not hold. With the changes
:math:`d_c` that clients' uploads would make, all of :math:`n` clients counting alike whatever their examples:

- :class:`TrimmedMean`: per coordinate, without the :math:`\lfloor \beta m \rfloor` smallest and largest of its :math:`m`
  holders' changes; :math:`\beta = 1/2` is the median.
- :class:`Krum`: the clients with the smallest sums of their :math:`n - f - 2` smallest distances to others, a distance being
  the mean squared difference on the coordinates that two clients have in common.
- :class:`ClippedMean`: the mean of changes none of which is longer than the cohort's median.

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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_fedsparse.aggregation import Aggregator, MaskedMean, cast_like
from lightning_fedsparse.screening import Change, change_of, size_of
from lightning_fedsparse.update import SparseUpdate, as_delta, positions_in

__all__ = ["ClippedMean", "Krum", "TrimmedMean", "krum_scores"]

_CHUNK = 2**16  # coordinates that are looked at together


class _Robust(Aggregator):
    """Keeps the uploads of a round until all are there."""

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
        self._updates.append(update)

    @override
    @torch.no_grad()
    def result(self) -> dict[str, Tensor]:
        template, updates = self._started(), self._updates
        if not updates:
            raise ValueError("expected at least one update before result(), got none")
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

    A coordinate that nobody holds keeps its bits, and what is not finite counts as not held.

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
            flat = old.detach().clone(memory_format=torch.contiguous_format).view(-1)
            for chunk, rows in _rows(_parts(name, old, updates), len(flat)):
                held = rows.isfinite().sum(0)
                # a hair more, as 0.29 * 100 is a little less than 29; at least one holder, or two, are left in the middle
                dropped = torch.minimum((self.trim * held + 1e-9).long(), (held - 1).clamp(min=0) // 2)
                rank = torch.arange(len(rows), device=rows.device).unsqueeze(1)
                kept = (rank >= dropped) & (rank < held - dropped)
                mean = rows.sort(0).values.masked_fill_(~kept, 0).sum(0) / kept.sum(0)
                flat[chunk] = torch.where(held > 0, cast_like(flat[chunk].double() + mean, old), flat[chunk])
            new[name] = torch.empty_like(old.detach()).copy_(flat.view(old.shape))
        return new


class Krum(_Robust):
    """The mean, over holders, of the clients that are closest to many others; buffers by their median.

    Args:
        hostile: f, how many clients of a round may be hostile; a round needs ``2 * hostile + 3`` updates.
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
        self.fewest = max(2 * hostile + 3, keep)

    @override
    def _merged(self, template: Mapping[str, Tensor], updates: list[SparseUpdate]) -> dict[str, Tensor]:
        if len(updates) < self.fewest:
            raise ValueError(f"expected at least {self.fewest} updates for {self}, got {len(updates)}")
        scores = krum_scores(template, updates, self.hostile)
        closest = scores.argsort(stable=True)[: self.keep].tolist()
        return _mean_of_changes(template, [updates[index] for index in closest], [1.0] * self.keep)

    def __repr__(self) -> str:
        return f"Krum(hostile={self.hostile}, keep={self.keep})"


class ClippedMean(_Robust):
    """The mean over holders of changes, each shortened to the cohort's median length; buffers by their median.

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
        lengths = [self._length(change_of(template, update)) for update in updates]
        limit = median(lengths)
        scales = [limit / length if length > limit else 1.0 for length in lengths]
        return _mean_of_changes(template, updates, scales)

    def _length(self, change: Change) -> float:
        count = sum(part.numel() for part, _ in change.values())
        return size_of(change) * (math.sqrt(count) if self.norm == "l2" else 1)


def krum_scores(template: Mapping[str, Tensor], updates: Sequence[SparseUpdate], hostile: int) -> Tensor:
    """Krum's scores, the smaller the closer to others: float64 of shape ``(updates,)``.

    Args:
        template: The server's tensors, by name.
        updates: What clients sent.
        hostile: f: a score is the sum of the ``updates - f - 2`` smallest distances.

    Returns:
        A score is infinite where a client has too few others that hold anything it holds.
    """
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
    return distances.sort(1).values[:, : len(updates) - hostile - 2].sum(1)


_Part = tuple[Tensor, Tensor | None]


def _parts(name: str, old: Tensor, updates: Sequence[SparseUpdate]) -> list[_Part | None]:
    """What each upload would change of one tensor, a parameter or a buffer; None where it does not speak of it."""
    parts: list[_Part | None] = []
    for update in updates:
        if name in update.values:
            parts.append(change_of({name: old}, replace(update, values={name: update.values[name]}))[name])
        elif name in update.buffers:
            parts.append((update.buffers[name].detach().reshape(-1).double() - old.detach().reshape(-1).double(), None))
        else:
            parts.append(None)
    return parts


def _rows(parts: Sequence[_Part | None], size: int) -> Iterator[tuple[slice, Tensor]]:
    """Changes of a tensor, some coordinates at a time: float64 of shape ``(clients, coordinates)``, NaN where not held."""
    device = next((part[0].device for part in parts if part is not None), torch.device("cpu"))
    for start in range(0, size, _CHUNK):
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


def _mean_of_changes(
    template: Mapping[str, Tensor], updates: Sequence[SparseUpdate], scales: Sequence[float]
) -> dict[str, Tensor]:
    mean, middle = MaskedMean(), TrimmedMean()
    mean.start(template)
    middle.start(template)
    for update, scale in zip(updates, scales, strict=True):
        change = as_delta(template, update)
        mean.add(replace(change, values={name: value * scale for name, value in change.values.items()}))
        middle.add(SparseUpdate({}, {}, buffers=update.buffers))
    sent = {name for update in updates for name in update.buffers}
    middles = middle.result()
    return {name: middles[name] if name in sent else tensor for name, tensor in mean.result().items()}
