"""Saving and loading a federation: one file, never half-written, tensors and primitives only."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch

__all__ = ["CHECKPOINT_VERSION", "load_checkpoint", "save_checkpoint"]

CHECKPOINT_VERSION = 1


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
