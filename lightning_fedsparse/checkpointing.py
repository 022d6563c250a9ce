"""When a federation is saved, and which checkpoints stay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_fedsparse.records import RoundRecord

__all__ = ["Checkpointing"]


@dataclass(frozen=True)
class Checkpointing:
    """When the federation is saved; the names are those of Lightning's ``ModelCheckpoint``.

    The latest checkpoint is ``checkpoints/last.ckpt``. With ``monitor``, those of the best rounds stay beside it as
    ``checkpoints/round=NUMBER.ckpt``. Any of them can be resumed from, and holds a model for ``load_folded``.

    Args:
        every_n_rounds: Rounds between checkpoints, at least 1; one is written at the end in any case.
        monitor: A number of the round's record, such as ``"val_accuracy"`` or ``"train_loss"``, by which rounds are
            compared; None keeps the latest checkpoint only. Rounds that were not evaluated are not among the best.
        mode: Whether the smallest (``"min"``) or the largest (``"max"``) is best; of equals the earlier round is.
        save_top_k: How many of the best stay, at least 1; -1 keeps all.
    """

    every_n_rounds: int = 1
    monitor: str | None = None
    mode: Literal["min", "max"] = "min"
    save_top_k: int = 1

    def __post_init__(self) -> None:
        """Check the values."""
        if self.every_n_rounds < 1:
            raise ValueError(f"expected a checkpoint every 1 or more rounds, got every_n_rounds={self.every_n_rounds}")
        if self.mode not in ("min", "max"):
            raise ValueError(f"expected mode 'min' or 'max', got {self.mode!r}")
        if self.save_top_k < 1 and self.save_top_k != -1:
            raise ValueError(f"expected save_top_k of at least 1, or -1 for all, got {self.save_top_k}")
        if self.monitor is None and self.save_top_k != 1:
            raise ValueError(
                f"expected monitor, by which rounds are compared, with save_top_k={self.save_top_k}, got none"
            )

    def is_due(self, done: int, total: int) -> bool:
        """Whether to save after ``done`` of ``total`` rounds."""
        return done % self.every_n_rounds == 0 or done == total

    def best(self, saved: Iterable[int], history: Mapping[int, RoundRecord]) -> list[int]:
        """Which of the saved rounds stay, best first; in their order where all do.

        Args:
            saved: Rounds that have a checkpoint of their own, and the last one, which may get one.
            history: The records so far, by round; a round that is not there does not stay.
        """
        if self.monitor is None:
            return []
        known = sorted(number for number in saved if number in history)
        if self.save_top_k == -1:
            # those before had their number when they were saved; to look at all of them each time would be quadratic
            return known if known and self.monitor in history[known[-1]].scalars else known[:-1]
        sign = 1 if self.mode == "min" else -1
        values = {number: history[number].scalars.get(self.monitor) for number in known}
        ranked = sorted((sign * value, number) for number, value in values.items() if value is not None)
        return [number for _, number in ranked[: self.save_top_k]]

    def require_monitor(self, history: Sequence[RoundRecord]) -> None:
        """Require the monitored number in a round's record.

        Raises:
            ValueError: If no record has it, naming the numbers of the last.
        """
        if self.monitor is not None and not any(self.monitor in record.scalars for record in reversed(history)):
            found = ", ".join(sorted(history[-1].scalars))
            raise ValueError(f"expected {self.monitor!r}, which is monitored, among a round's numbers, got {found}")
