r"""Progress -> value: how a sparsity, a penalty or a learning rate changes over a run.

With :math:`p` the fraction done, :math:`t` the step and :math:`T` the total:

=============  ======================================================================
constant       :math:`v`
linear         :math:`b + (a - b)(1 - p)` from :math:`a` to :math:`b`
cubic          :math:`b + (a - b)(1 - p)^3`: steep first, flat at the end
cosine         :math:`b + (a - b)(1 + \cos \pi p) / 2`: flat at both ends
staircase      :math:`v \lfloor tQ/T \rfloor / Q`
exponential    :math:`a d^t`, per step whatever the total
dip            another schedule, but one value between two points of the run
=============  ======================================================================

The cubic form is from M. Zhu, S. Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model
compression", 2017, https://arxiv.org/abs/1710.01878 (eq. 1). The two staircases are for FedDIP's penalty (Q. Long et
al., ICDM 2023, https://arxiv.org/abs/2309.06805): the plain one is this library's default, the one with an offset is
what the released code (https://github.com/EricLoong/feddip, 4327d96, ``lambda_shrink_cur``) computes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

__all__ = [
    "ConstantSchedule",
    "CosineSchedule",
    "CubicSchedule",
    "DipSchedule",
    "ExponentialSchedule",
    "LinearSchedule",
    "OffsetStaircaseSchedule",
    "Progress",
    "Schedule",
    "StaircaseSchedule",
    "require_sparsities",
]


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Args:
        step: Steps done, from 0: rounds of a federation, optimizer steps or epochs of a plain Trainer.
        total: Steps of the whole run, positive; ``math.inf`` where the end is not known.

    Raises:
        ValueError: A negative step, or a total that is not positive.
    """

    step: int
    total: int | float

    def __post_init__(self) -> None:
        if self.step < 0:
            raise ValueError(f"expected a progress step of at least 0, got {self.step}")
        if not self.total > 0:
            raise ValueError(f"expected a positive total of progress steps, got {self.total}")

    @property
    def finite_total(self) -> int | float:
        """The total, for whoever needs the run to have an end.

        Raises:
            ValueError: The total is infinite.
        """
        if math.isinf(self.total):
            raise ValueError(
                f"expected a run with an end for a schedule over its length, got an infinite total at step {self.step}: "
                "set max_steps, max_epochs or the number of rounds"
            )
        return self.total

    @property
    def fraction(self) -> float:
        """Share of the run that is done, in [0, 1]; 1 for steps past the end."""
        return min(self.step / self.finite_total, 1.0)


class Schedule(ABC):
    """A value that depends on progress and on nothing else."""

    @abstractmethod
    def __call__(self, progress: Progress | float) -> float:
        """Value at this progress.

        Args:
            progress: A :class:`Progress`, or a fraction in [0, 1].

        Raises:
            ValueError: A fraction outside [0, 1], or an infinite total where the schedule spans the run.
            TypeError: A fraction where the schedule counts steps.
        """


@dataclass(frozen=True)
class ConstantSchedule(Schedule):
    """The same value at every step.

    Args:
        value: The value, finite.
    """

    value: float

    def __post_init__(self) -> None:
        _require_finite(self, value=self.value)

    def __call__(self, progress: Progress | float) -> float:
        """The value, whatever the progress."""
        return self.value


@dataclass(frozen=True)
class LinearSchedule(Schedule):
    """A straight line from ``initial`` to ``final``, both reached exactly.

    Args:
        initial: Value at the start.
        final: Value at the end.
    """

    initial: float
    final: float

    def __post_init__(self) -> None:
        _require_finite(self, initial=self.initial, final=self.final)

    def __call__(self, progress: Progress | float) -> float:
        """Value at this progress."""
        return _between(self, 1 - _fraction(progress))


@dataclass(frozen=True)
class CubicSchedule(Schedule):
    """``final + (initial - final) * (1 - p)**3``: most of the change comes early.

    Args:
        initial: Value at the start.
        final: Value at the end.

    Example:
        >>> CubicSchedule(0.5, 0.9)(0.5)  # 0.9 - 0.4 / 8
        0.85
    """

    initial: float
    final: float

    def __post_init__(self) -> None:
        _require_finite(self, initial=self.initial, final=self.final)

    def __call__(self, progress: Progress | float) -> float:
        """Value at this progress."""
        return _between(self, (1 - _fraction(progress)) ** 3)


@dataclass(frozen=True)
class CosineSchedule(Schedule):
    """Half a cosine from ``initial`` to ``final``: little change at both ends.

    Args:
        initial: Value at the start.
        final: Value at the end.
    """

    initial: float
    final: float

    def __post_init__(self) -> None:
        _require_finite(self, initial=self.initial, final=self.final)

    def __call__(self, progress: Progress | float) -> float:
        """Value at this progress."""
        return _between(self, (1 + math.cos(math.pi * _fraction(progress))) / 2)


@dataclass(frozen=True)
class StaircaseSchedule(Schedule):
    """``maximum * floor(step * levels / total) / levels``: equal steps up from 0, in integer arithmetic.

    The maximum itself is reached at the end of the run only (``step == total``).

    Args:
        maximum: Value at the end.
        levels: Number of stairs, at least 1.

    Example:
        >>> [StaircaseSchedule(1.0, 4)(Progress(step, 8)) for step in range(8)]
        [0.0, 0.0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75]
    """

    maximum: float
    levels: int

    def __post_init__(self) -> None:
        _require_finite(self, maximum=self.maximum)
        _require_levels(self, self.levels, least=1)

    def __call__(self, progress: Progress | float) -> float:
        """Value at this progress."""
        if isinstance(progress, Progress):
            total = progress.finite_total
            level = min(int(progress.step * self.levels // total), self.levels)
        else:
            # the slack takes 0.29 * 100 = 28.999999999999996 for the 29 that was meant
            level = math.floor(_fraction(progress) * self.levels + 1e-9)
        return self.maximum * level / self.levels


@dataclass(frozen=True)
class OffsetStaircaseSchedule(Schedule):
    """The staircase of FedDIP's released code: 0 for one segment, then ``offset``, then even steps towards ``maximum``.

    With segments of ``total // levels`` steps and ``i = min(step // segment, levels - 1)`` the value is 0 for
    ``i = 0``, else ``offset + (i - 1) * (maximum - offset) / (levels - 1)``. So the maximum is never reached, a maximum
    equal to the offset gives one constant stair, a lower one gives falling stairs, the steps left over after the last
    whole segment stay on the top stair, and so does every step of a run shorter than ``levels``.

    Args:
        maximum: Value that the stairs aim at.
        levels: Number of segments, at least 2.
        offset: Value of the second segment.
    """

    maximum: float
    levels: int = 20
    offset: float = field(default=5e-4, kw_only=True)

    def __post_init__(self) -> None:
        _require_finite(self, maximum=self.maximum, offset=self.offset)
        _require_levels(self, self.levels, least=2)

    def __call__(self, progress: Progress | float) -> float:
        """Value at this progress, which must be a :class:`Progress`."""
        progress = _steps(self, progress)
        segment = int(progress.finite_total // self.levels)
        stair = min(progress.step // segment, self.levels - 1) if segment else self.levels - 1
        return self.offset + (stair - 1) * (self.maximum - self.offset) / (self.levels - 1) if stair else 0.0


@dataclass(frozen=True)
class ExponentialSchedule(Schedule):
    """``initial * decay**step``: the usual decay of a learning rate per round; the total does not matter.

    Args:
        initial: Value at step 0.
        decay: Factor per step.
    """

    initial: float
    decay: float

    def __post_init__(self) -> None:
        _require_finite(self, initial=self.initial, decay=self.decay)

    def __call__(self, progress: Progress | float) -> float:
        """Value at this progress, which must be a :class:`Progress`."""
        return float(self.initial * self.decay ** _steps(self, progress).step)


@dataclass(frozen=True)
class DipSchedule(Schedule):
    """Another schedule, but ``value`` from ``start`` up to ``end``: a sparsity that returns to a denser model for a while.

    The shares are of the time that a callback runs its schedule over, which may end before the run does.

    Args:
        schedule: What holds before and after.
        start: Share of that time at which the dip begins, above 0.
        end: Share of that time before which it is over, above ``start`` and at most 1.
        value: Value in the dip.

    Example:
        >>> dip = DipSchedule(ConstantSchedule(0.9), start=0.5, end=0.75, value=0.6)
        >>> [dip(Progress(step, 8)) for step in range(8)]
        [0.9, 0.9, 0.9, 0.9, 0.6, 0.6, 0.9, 0.9]
    """

    schedule: Schedule
    start: float = field(kw_only=True)
    end: float = field(kw_only=True)
    value: float = field(kw_only=True)

    def __post_init__(self) -> None:
        if not 0 < self.start < self.end <= 1:
            raise ValueError(
                f"expected 0 < start < end <= 1 for DipSchedule, got start={self.start} and end={self.end}"
            )
        _require_finite(self, value=self.value)

    def __call__(self, progress: Progress | float) -> float:
        """Value at this progress."""
        return self.value if self.start <= _fraction(progress) < self.end else self.schedule(progress)


def require_sparsities(schedule: Schedule) -> None:
    """See that a schedule is one of sparsities.

    Raises:
        ValueError: If one of a hundred values along it is outside [0, 1), or the last is below the first.
    """
    values = [schedule(point / 100) for point in range(101)]
    for value in values:
        if not 0 <= value < 1:
            raise ValueError(f"expected a sparsity schedule with values in [0, 1), got {value} from {schedule}")
    if values[-1] < values[0]:
        raise ValueError(
            f"expected a sparsity schedule that does not decrease, got {values[0]} to {values[-1]} from {schedule}"
        )


def _fraction(progress: Progress | float) -> float:
    if isinstance(progress, Progress):
        return progress.fraction
    if not 0 <= progress <= 1:
        raise ValueError(f"expected a progress in [0, 1], got {progress}")
    return progress


def _steps(schedule: Schedule, progress: Progress | float) -> Progress:
    if not isinstance(progress, Progress):
        raise TypeError(f"expected a Progress, because {type(schedule).__name__} counts steps, got {progress!r}")
    return progress


def _between(schedule: LinearSchedule | CubicSchedule | CosineSchedule, remaining: float) -> float:
    """``final + (initial - final) * remaining``, exact at both ends, and constant where the two are equal."""
    if remaining <= 0.5:
        return schedule.final + (schedule.initial - schedule.final) * remaining
    return schedule.initial + (schedule.final - schedule.initial) * (1 - remaining)


def _require_finite(schedule: Schedule, **values: float) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            raise ValueError(f"expected a finite {name} for {type(schedule).__name__}, got {value}")


def _require_levels(schedule: Schedule, levels: int, *, least: int) -> None:
    if levels < least:
        raise ValueError(f"expected at least {least} levels for {type(schedule).__name__}, got {levels}")
