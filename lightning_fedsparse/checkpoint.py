"""The file of a checkpoint: tensors and primitives only, never half-written, and read only if every bit is as it was written.

It is what ``torch.save`` writes, so that ``torch.load`` reads it, followed by a digest of all that: ``torch.load`` does not
verify the checksums of its own format.
"""

from __future__ import annotations

import hashlib
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from lightning_fedsparse.durable import replace_file

__all__ = ["CHECKPOINT_VERSION", "load_checkpoint", "save_checkpoint"]

CHECKPOINT_VERSION = 2

_MARK = b"sha256:"
_TRAILER = len(_MARK) + hashlib.sha256().digest_size
_CHUNK = 2**20
# types themselves: what derives from them, as NumPy's float64 does from float, is pickled by its class
_LEAVES = {
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    Tensor,
    nn.Parameter,
    torch.Size,
    torch.dtype,
    torch.device,
}


def save_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint, whole and on the disk before it takes the place of one that is there.

    Raises:
        OSError: If it can't be written; the checkpoint that was there is then as it was.
        TypeError: If :func:`load_checkpoint` could not read it, naming what is no tensor or plain value.
    """
    _require_loadable(content, "")
    replace_file(path, lambda file: _write(file, {"version": CHECKPOINT_VERSION, **content}))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint without unpickling anything but tensors and primitives.

    Raises:
        ValueError: If the file is missing, can't be read, is not as it was written, is no checkpoint of a federation, or
            has another version.
    """
    if not path.is_file():
        raise ValueError(f"expected a federation's checkpoint, found no file at {path}")
    changed = f"expected a federation's checkpoint as it was written, got one that was changed or cut off since: {path}"
    try:
        digests = _digests(path)
        if digests is not None and digests[0] != digests[1]:
            raise ValueError(changed)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise ValueError(f"expected a federation's checkpoint, got a file that can't be read: {path}") from error
    if not isinstance(content, dict) or not isinstance(content.get("version"), int):
        raise ValueError(f"expected a federation's checkpoint, got something else in {path}")
    if content["version"] != CHECKPOINT_VERSION:
        age = "a newer" if content["version"] > CHECKPOINT_VERSION else "an older"
        raise ValueError(
            f"expected checkpoint version {CHECKPOINT_VERSION}, got {content['version']} in {path}, which {age} "
            "lightning-fedsparse wrote"
        )
    if digests is None:
        raise ValueError(changed)
    return content


def _require_loadable(value: Any, where: str) -> None:
    kind = type(value)
    if kind in (dict, OrderedDict):
        for key, part in value.items():
            _require_loadable(key, f"{where}, key")
            _require_loadable(part, f"{where}.{key}".lstrip("."))
    elif kind in (list, tuple, set):
        for place, part in enumerate(value):
            _require_loadable(part, f"{where}.{place}")
    elif kind not in _LEAVES:
        raise TypeError(
            f"expected tensors and plain values in a checkpoint, got {kind.__module__}.{kind.__qualname__} at {where}"
        )


class _Digesting:
    """Writes into a file and digests what is written."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def _write(file: IO[bytes], content: dict[str, Any]) -> None:
    digesting = _Digesting(file)
    try:
        torch.save(content, digesting)  # type: ignore[arg-type]  # all that it needs of a file
    except RuntimeError as error:
        # the archive's end fails after what it could not write, and hides that
        raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
    file.write(_MARK + digesting.digest.digest())


def _digests(path: Path) -> tuple[bytes, bytes] | None:
    """The digest of a file's content and the one that stands at its end; None where none does, as in other files."""
    digest = hashlib.sha256()
    left = path.stat().st_size - _TRAILER
    with path.open("rb") as file:
        while left > 0 and (chunk := file.read(min(left, _CHUNK))):
            digest.update(chunk)
            left -= len(chunk)
        trailer = file.read()
    return (digest.digest(), trailer.removeprefix(_MARK)) if trailer.startswith(_MARK) else None
