"""Where a run is kept: its recipe, its history and its checkpoints, for one process at a time.

A round's row is in the history before the round is in a checkpoint, and every checkpoint says which row it goes with: a run
that goes on cuts off what comes after that row, so that no round is there twice and none is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from lightning_fedsparse.checkpoint import load_checkpoint, save_checkpoint
from lightning_fedsparse.checkpointing import Checkpointing
from lightning_fedsparse.durable import replace_file, shorten, writing
from lightning_fedsparse.locking import locked
from lightning_fedsparse.recipe import RECIPE_NAME
from lightning_fedsparse.records import RoundRecord, append_record, read_history, whole_lines

__all__ = ["RunFolder"]


class RunFolder:
    """A run's files; without a path nothing is kept.

    ``recipe.yaml``, where the run has a recipe, ``history.jsonl``, ``checkpoints/last.ckpt`` and ``checkpoints/round=N.ckpt``.

    Args:
        path: The folder; made when the run starts.
        checkpointing: When to save, and what stays; after every round and the latest if None.
    """

    def __init__(self, path: str | Path | None, checkpointing: Checkpointing | None = None) -> None:
        self.path = None if path is None else Path(path)
        self.checkpointing = checkpointing or Checkpointing()

    @property
    def checkpoint(self) -> Path | None:
        """Where the last checkpoint is, or will be."""
        return None if self.path is None else self.path / "checkpoints" / "last.ckpt"

    @property
    def saved(self) -> Path | None:
        """The last checkpoint, if there is one."""
        return self.checkpoint if self.checkpoint is not None and self.checkpoint.is_file() else None

    def locked(self) -> AbstractContextManager[None]:
        """Hold the folder against other runs.

        Raises:
            OSError: If it can't be written to.
            RuntimeError: If another run is at work in it.
        """
        return nullcontext() if self.path is None else locked(self.path)

    def start(self) -> None:
        """See that a run can start here.

        Raises:
            ValueError: If there is a run already.
        """
        if self.path is not None and ((self.path / "history.jsonl").exists() or self.saved):
            raise ValueError(f"expected an empty run folder, found a run in {self.path}: resume it or take another")

    def load(self, ckpt_path: str | Path) -> dict[str, Any] | None:
        """Load the checkpoint to go on from.

        Args:
            ckpt_path: A checkpoint's path, or ``"last"`` for this folder's own.

        Returns:
            Its content; None if this folder has none yet: its run ended before it saved, and starts anew.

        Raises:
            ValueError: If there is no such checkpoint, or it can't be read.
        """
        if ckpt_path != "last":
            return load_checkpoint(Path(ckpt_path))
        if self.path is None or self.checkpoint is None:
            raise ValueError("expected default_root_dir with ckpt_path='last', got None: there is no run folder")
        if self.saved is None:
            self._discard_start(self.path / "history.jsonl")
            return None
        return load_checkpoint(self.saved)

    def go_on(self, saved: Mapping[str, Any], ckpt_path: str | Path) -> list[RoundRecord]:
        """Cut the history off after a checkpoint's row; where there is no history, begin it with that row.

        A checkpoint that is not this folder's last becomes that, so that the run goes on from it if it is killed at once.

        Args:
            saved: The checkpoint's content.
            ckpt_path: Where :meth:`load` found it.

        Returns:
            The records up to there; only that one where there is no run folder.

        Raises:
            ValueError: If there is a history without that row.
        """
        row: str = saved["record"]
        if self.path is None or self.checkpoint is None:
            return [RoundRecord.from_json(row)]
        history = self.path / "history.jsonl"
        rows = whole_lines(history) if history.exists() else [row]
        if row not in rows:
            raise ValueError(
                f"expected the history of the checkpoint's run in {history}, found one without the row of its round "
                f"{saved['round']}"
            )
        if ckpt_path != "last":
            save_checkpoint(self.checkpoint, saved)
        if not history.exists():
            append_record(history, RoundRecord.from_json(row))
        shorten(history, sum(len(line.encode()) + 1 for line in rows[: rows.index(row) + 1]))
        return read_history(history)

    def keep_recipe(self, text: str) -> None:
        """Write the resolved recipe, unless it is there."""
        if self.path is not None:
            path = self.path / RECIPE_NAME
            if not path.is_file() or path.read_text(encoding="utf-8") != text:
                replace_file(path, lambda file: file.write(text.encode()))

    def append(self, record: RoundRecord) -> None:
        """Append a record to the history.

        Raises:
            OSError: If it can't be written.
        """
        if self.path is not None:
            append_record(self.path / "history.jsonl", record)

    def is_due(self, done: int, total: int) -> bool:
        """Whether :meth:`save` is to be called after ``done`` of ``total`` rounds."""
        return self.path is not None and self.checkpointing.is_due(done, total)

    def save(self, history: Sequence[RoundRecord], total: int, content: Callable[[], Mapping[str, Any]]) -> list[int]:
        """Save the round that was recorded last, if it is time.

        Args:
            history: The records so far.
            total: Rounds of the run.
            content: Makes what a checkpoint holds beside its row of the history.

        Returns:
            Rounds of all checkpoints that are kept now; nothing if none was saved.

        Raises:
            OSError: If it can't be written; the last checkpoint is then as it was.
        """
        last = history[-1]
        if self.checkpoint is None or not self.is_due(last.round, total):
            return []
        saved = {"round": last.round, "record": last.to_json(), **content()}
        kept = self._keep_best(history, saved) if last.round and self.checkpointing.monitor is not None else []
        # the last one comes last: a run that ends before it does this round again, and what stands above with it
        save_checkpoint(self.checkpoint, saved)
        return [last.round, *kept]

    def _keep_best(self, history: Sequence[RoundRecord], saved: Mapping[str, Any]) -> list[int]:
        assert self.checkpoint is not None
        folder = self.checkpoint.parent
        files = {int(path.stem.partition("=")[2]): path for path in folder.glob("round=*.ckpt")}
        now = history[-1].round
        best = self.checkpointing.best({*files, now}, {record.round: record for record in history})
        if now in best:
            save_checkpoint(folder / f"round={now}.ckpt", saved)
        for number in files.keys() - {*best}:
            with writing(files[number]):
                files[number].unlink()
        return best

    def _discard_start(self, history: Path) -> None:
        if not history.exists():
            return
        if len(whole_lines(history)) > 1:
            raise ValueError(f"expected a checkpoint to go on from, found none at {self.checkpoint}")
        shorten(history, 0)
