r"""Uploads held against those of the cohort: too long a way, or in another direction.

With the change :math:`d_c` that client :math:`c`'s upload would make to the :math:`n_c` weights it speaks of, and
:math:`s_c = \lVert d_c \rVert / \sqrt{n_c}` (which clients of different size have in common), an upload is refused if

.. math:: s_c > a \operatorname{median}_j s_j \qquad\text{or}\qquad
    \cos\Big(d_c, \sum_{j \ne c} d_j / \lVert d_j \rVert\Big) < b

the sum taken at the weights that :math:`c` speaks of. Bounding norms is the common first defence against poisoned updates (Z.
Sun, P. Kairouz, A. T. Suresh, H. B. McMahan, "Can You Really Backdoor Federated Learning?", 2019,
https://arxiv.org/abs/1911.07963); here they are refused and not clipped. Neither bound stops an adversary who knows it.

Use it against broken clients and plain attacks. Honest clients whose data have nothing in common may disagree in direction:
see what a bound refuses before relying on it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from lightning_fedsparse.update import SparseUpdate

__all__ = ["Change", "Screen", "Screening", "alignment", "change_of", "size_of", "too_large"]

Change = Mapping[str, tuple[Tensor, Tensor | None]]

_FEWEST = 3  # of two uploads that differ, nobody can say which is wrong


def change_of(weights: Mapping[str, Tensor], update: SparseUpdate) -> dict[str, tuple[Tensor, Tensor | None]]:
    """What an upload would change, at the weights that it speaks of.

    Args:
        weights: The server's, by name.
        update: Of either kind; under absent ``"zero"`` weights it speaks of all.

    Returns:
        For each name the change (float64, flat) and its ascending positions, None if it is of all entries.

    Example:
        >>> update = SparseUpdate({"w": torch.tensor([5.0])}, {"w": torch.tensor([False, True])})
        >>> change_of({"w": torch.tensor([1.0, 2.0])}, update)
        {'w': (tensor([3.], dtype=torch.float64), tensor([1]))}
    """
    changes: dict[str, tuple[Tensor, Tensor | None]] = {}
    for name, value in update.values.items():
        value = value.detach().reshape(-1).double()
        where = None if update.masks[name] is None else update.positions(name)
        if update.kind == "delta":
            changes[name] = value, where
            continue
        old = weights[name].detach().reshape(-1).double()
        if where is None:
            changes[name] = value - old, None
        elif update.absent == "zero":
            changes[name] = (-old).index_add_(0, where, value), None
        else:
            changes[name] = value - old[where], where
    return changes


def size_of(change: Change) -> float:
    """Root of the mean squared change per weight; 0 where there is none."""
    count = sum(part.numel() for part, _ in change.values())
    return _norm(change) / math.sqrt(count) if count else 0.0


def too_large(sizes: Sequence[float], multiple: float) -> list[bool]:
    """Which sizes are above a multiple of their median.

    Example:
        >>> too_large([1.0, 1.2, 9.0], multiple=5.0)
        [False, False, True]
    """
    limit = multiple * median(sizes)
    return [size > limit for size in sizes]


def alignment(change: Change, total: Mapping[str, Tensor]) -> float:
    """Cosine between a change and the sum of the others' directions; 0 if either is nothing.

    Args:
        change: One client's.
        total: Flat sums, by name, of all clients' directions, this client's among them.
    """
    length = _norm(change)
    if length == 0:
        return 0.0
    product = squares = 0.0
    for name, (part, where) in change.items():
        others = (total[name] if where is None else total[name][where]) - part / length
        product += float(part @ others)
        squares += float(others @ others)
    return product / (length * math.sqrt(squares)) if squares else 0.0


@dataclass(frozen=True)
class Screen:
    """Bounds on what a valid upload may be beside those of its cohort.

    Every valid upload of a round waits, encoded, until the last is there: memory grows with the cohort by the bytes of its
    uploads and what its clients remember. Each upload is decoded once more, with ``cosine`` twice more, which also keeps the
    sum of directions: one model in float64. With fewer than three valid uploads nothing is refused.

    Args:
        norm: Largest change per weight, in multiples of the cohort's median, above 1; None for no bound.
        cosine: Least cosine to the sum of the others' directions, in [-1, 1); None for no bound.

    Raises:
        ValueError: For a bound out of range, or without any.
    """

    norm: float | None = None
    cosine: float | None = None

    def __post_init__(self) -> None:
        if self.norm is None and self.cosine is None:
            raise ValueError("expected a screen with a bound, norm or cosine, got none")
        if self.norm is not None and not 1 < self.norm < math.inf:
            raise ValueError(f"expected norm above 1, in multiples of the cohort's median, got {self.norm}")
        if self.cosine is not None and not -1 <= self.cosine < 1:
            raise ValueError(f"expected cosine in [-1, 1), got {self.cosine}")


class Screening:
    """One round's screening.

    Args:
        screen: The bounds.
        weights: The server's weights, as broadcast.
    """

    def __init__(self, screen: Screen, weights: Mapping[str, Tensor]) -> None:
        self._screen = screen
        self._weights = weights
        self._sizes: dict[str, float] = {}
        self._total: dict[str, Tensor] = {}

    def see(self, client_id: str, update: SparseUpdate) -> None:
        """Take in a valid upload's size and direction."""
        change = change_of(self._weights, update)
        self._sizes[client_id] = size_of(change)
        length = _norm(change)
        if self._screen.cosine is None or length == 0:
            return
        for name, (part, where) in change.items():
            if name not in self._total:
                self._total[name] = torch.zeros(self._weights[name].numel(), dtype=torch.float64)
            if where is None:
                self._total[name] += part / length
            else:
                self._total[name].index_add_(0, where, part / length)

    def refused(self, uploads: Iterable[tuple[str, SparseUpdate]]) -> dict[str, str]:
        """Which of the uploads seen so far are out of bounds.

        Args:
            uploads: All of them, once more, by client id; read one at a time, and only for the bound on directions.

        Returns:
            One sentence per refused client.
        """
        sentences: dict[str, str] = {}
        if len(self._sizes) < _FEWEST:
            return sentences
        if self._screen.norm is not None:
            large = too_large(list(self._sizes.values()), self._screen.norm)
            middle = median(self._sizes.values())
            for (client_id, size), is_large in zip(self._sizes.items(), large, strict=True):
                if is_large:
                    sentences[client_id] = (
                        f"expected a change per weight of at most {self._screen.norm:g} times the cohort's median "
                        f"{middle:.3g}, got {size:.3g}"
                    )
        if self._screen.cosine is not None:
            for client_id, update in uploads:
                cosine = alignment(change_of(self._weights, update), self._total)
                if cosine < self._screen.cosine:
                    sentences.setdefault(
                        client_id,
                        f"expected a cosine of at least {self._screen.cosine:g} to the others' direction, got {cosine:.3g}",
                    )
        return sentences


def _norm(change: Change) -> float:
    return math.sqrt(sum(float(part @ part) for part, _ in change.values()))
