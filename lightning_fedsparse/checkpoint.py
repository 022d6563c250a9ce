"""Where a run is kept: history and checkpoints, never half-written, tensors and primitives only."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch

from lightning_fedsparse.records import RoundRecord, append_record, read_history, rewrite_history

__all__ = ["CHECKPOINT_VERSION", "RunFolder", "load_checkpoint", "save_checkpoint"]

CHECKPOINT_VERSION = 1


class RunFolder:
    """A run's files: ``history.jsonl`` and ``checkpoints/last.ckpt``; without a path nothing is kept.

    Args:
        path: The folder; made when the run starts.
    """

    def __init__(self, path: str | Path | None) -> None:
        self.path = None if path is None else Path(path)

    @property
    def checkpoint(self) -> Path | None:
        """Where the last checkpoint is, or will be."""
        return None if self.path is None else self.path / "checkpoints" / "last.ckpt"

    @property
    def saved(self) -> Path | None:
        """The last checkpoint, if there is one."""
        return self.checkpoint if self.checkpoint is not None and self.checkpoint.is_file() else None

    def start(self) -> None:
        """Make the folder for a fresh run.

        Raises:
            ValueError: If there is a history already.
        """
        if self.path is not None:
            if (self.path / "history.jsonl").exists():
                raise ValueError(
                    f"expected an empty run folder, found a history in {self.path}: resume it or take another"
                )
            self.path.mkdir(parents=True, exist_ok=True)

    def resume(self, ckpt_path: str | Path) -> tuple[dict[str, Any], list[RoundRecord]]:
        """Load a checkpoint and cut the history back to its round.

        Args:
            ckpt_path: A checkpoint's path, or ``"last"`` for this folder's own.

        Returns:
            The checkpoint's content and the records up to its round.

        Raises:
            ValueError: If there is no such checkpoint, or it can't be read.
        """
        if ckpt_path == "last":
            if self.checkpoint is None:
                raise ValueError("expected default_root_dir with ckpt_path='last', got None: there is no run folder")
            ckpt_path = self.checkpoint
        content = load_checkpoint(Path(ckpt_path))
        records: list[RoundRecord] = []
        if self.path is not None:
            self.path.mkdir(parents=True, exist_ok=True)
            history = self.path / "history.jsonl"
            if history.exists():
                records = [record for record in read_history(history) if record.round <= content["round"]]
                rewrite_history(history, records)
        return content, records

    def append(self, record: RoundRecord) -> None:
        """Append a record to the history."""
        if self.path is not None:
            append_record(self.path / "history.jsonl", record)

    def save(self, content: dict[str, Any]) -> None:
        """Replace the last checkpoint."""
        if self.checkpoint is not None:
            save_checkpoint(self.checkpoint, content)


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint beside ``path``, flush it to the disk and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        torch.save({"version": CHECKPOINT_VERSION, **content}, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint without unpickling anything but tensors and primitives.

    Raises:
        ValueError: If the file is missing, is no checkpoint of a federation, or has another version.
    """
    if not path.is_file():
        raise ValueError(f"expected a federation's checkpoint, found no file at {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise ValueError(f"expected a federation's checkpoint, got a file that can't be read: {path}") from error
    if not isinstance(content, dict) or "version" not in content:
        raise ValueError(f"expected a federation's checkpoint, got something else in {path}")
    if content["version"] != CHECKPOINT_VERSION:
        raise ValueError(f"expected checkpoint version {CHECKPOINT_VERSION}, got {content['version']} in {path}")
    return content
