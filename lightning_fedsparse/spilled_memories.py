"""What clients remember, in files instead of in the memory of this process.

Files and checkpoints stay consistent wherever a run is killed, because no file is ever changed: every write makes a new file,
and a checkpoint holds the names of the files that were in force. What the last checkpoint refers to is deleted only after the
next one is on the disk, and a file that no checkpoint refers to is what a killed run left behind.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lightning_fedsparse.durable import sync_folder
from lightning_fedsparse.memories import ClientMemories, Memory

__all__ = ["SpilledMemories"]


class _File(NamedTuple):
    """One memory on the disk, as a checkpoint refers to it.

    Args:
        done: Rounds that were done when it was written.
        digest: Checksum of its content, hexadecimal.
        size: Bytes.
    """

    done: int
    digest: str
    size: int


@dataclass(frozen=True)
class _Former:
    """A file that is no longer in force, for checkpoints of more than ``file.done`` and at most ``until`` rounds."""

    client_id: str
    file: _File
    until: int

    def is_of(self, rounds: int) -> bool:
        return self.file.done < rounds <= self.until


class SpilledMemories(ClientMemories):
    """Memories in files of a folder, one per client, read when their client is sampled.

    A file is written beside its place and renamed, is on the disk before a checkpoint refers to it, and holds tensors and
    primitives only. Checkpoints refer to the files instead of holding the memories.

    Args:
        folder: Where the files of this run, and of no other, are; ``memories`` in the run folder if None.
        quota_bytes: Bytes that the memories may take after each round, without a limit if None: those of the clients that
            were not sampled for longest are given up, with a warning the first time, and each round's record names
            them. Files that a checkpoint still refers to are not counted.

    Raises:
        ValueError: For a quota below 1; when the run starts, without any folder, or for a new run in a folder with memories;
            when it is resumed, for files that are gone; when a client is sampled, for a file that was damaged.
        OSError: If a file can't be written.
    """

    def __init__(self, folder: str | Path | None = None, *, quota_bytes: int | None = None) -> None:
        if quota_bytes is not None and quota_bytes < 1:
            raise ValueError(f"expected quota_bytes to be at least 1, got {quota_bytes}")
        self.folder = None if folder is None else Path(folder)
        self.quota_bytes = quota_bytes
        self._path = Path()
        self._reset()

    def _reset(self) -> None:
        self._files: OrderedDict[str, _File] = OrderedDict()  # those sampled longest ago come first
        self._bytes = 0
        self._former: list[_Former] = []
        self._unsynced: set[Path] = set()
        self._done = 0
        self._saved = 0
        self._swept = False
        self._warned = False

    def __getitem__(self, client_id: str) -> Memory:
        return self._read(client_id, self._files[client_id])

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __contains__(self, client_id: object) -> bool:
        return client_id in self._files  # without reading

    def start(self, run_folder: Path | None, *, fresh: bool, sweeps: bool = True) -> None:
        """See :meth:`ClientMemories.start`."""
        self._reset()
        self._swept = not sweeps
        if self.folder is None and run_folder is None:
            raise ValueError("expected a folder for SpilledMemories in a run without default_root_dir, got none")
        self._path = self.folder or run_folder / "memories"  # type: ignore[operator]
        if fresh and self._found():
            raise ValueError(f"expected no client memories where a run begins, found some in {self._path}")

    def put(self, client_id: str, memory: Memory) -> None:
        """See :meth:`ClientMemories.put`."""
        buffer = io.BytesIO()
        torch.save(dict(memory), buffer)
        content = buffer.getvalue()
        file = _File(self._done, _digest(content), len(content))
        if self._files.get(client_id) != file:
            self._write(client_id, file, content)
            self.refer(client_id, file)

    def reference(self, client_id: str) -> Any | None:
        """See :meth:`ClientMemories.reference`."""
        return tuple(self._files[client_id])

    def refer(self, client_id: str, reference: Any) -> None:
        """See :meth:`ClientMemories.refer`."""
        file = _File(*reference)
        if self._files.get(client_id) != file:
            if client_id in self._files:
                self._retire(client_id, until=self._done)
            self._files[client_id] = file
            self._bytes += file.size
        self._files.move_to_end(client_id)  # ranks that are told the same then have one order

    def end_round(self, done: int, sampled: Iterable[str]) -> list[str]:
        """See :meth:`ClientMemories.end_round`."""
        for client_id in sampled:
            if client_id in self._files:
                self._files.move_to_end(client_id)
        evicted = []
        while self.quota_bytes is not None and self._bytes > self.quota_bytes:
            evicted.append(next(iter(self._files)))
            self._retire(evicted[-1], until=done - 1)
        if evicted and not self._warned:
            self._warned = True
            warnings.warn(
                f"client memories need more than their quota_bytes={self.quota_bytes}: the clients that were not sampled "
                f"for longest lose theirs, first {evicted[0]!r} in round {done}; the records say which",
                stacklevel=2,
            )
        self._done = done
        return evicted

    def state_dict(self) -> dict[str, Any]:
        """See :meth:`ClientMemories.state_dict`; the files are on the disk when it returns."""
        if self._unsynced:
            _sync(self._path, self._unsynced)
            self._unsynced.clear()
        files = {client_id: tuple(file) for client_id, file in self._files.items()}
        former = [(old.client_id, tuple(old.file), old.until) for old in self._former]
        return {"memories": {}, "memory_files": {"done": self._done, "files": files, "former": former}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :meth:`ClientMemories.load_state_dict`; also takes what ``HeldMemories`` gave."""
        if "memory_files" not in state:
            for client_id, memory in state["memories"].items():
                self.put(client_id, memory)
            return
        saved = state["memory_files"]
        self._done = self._saved = saved["done"]
        self._files = OrderedDict((client_id, _File(*file)) for client_id, file in saved["files"].items())
        self._bytes = sum(file.size for file in self._files.values())
        self._former = [_Former(client_id, _File(*file), until) for client_id, file, until in saved["former"]]
        found = self._found()
        for client_id, file in self._files.items():
            path = self._place(client_id, file)
            if found.get(path.name) != file.size:
                what = "no file" if path.name not in found else f"{found[path.name]} bytes"
                raise ValueError(
                    f"expected {file.size} bytes of memory for client {client_id!r}, found {what} at {path}"
                )

    def saved(self, rounds: Collection[int]) -> None:
        """See :meth:`ClientMemories.saved`."""
        self._saved = self._done
        former, self._former = self._former, []
        for old in former:
            if any(old.is_of(done) for done in rounds):
                self._former.append(old)
            else:
                self._place(old.client_id, old.file).unlink(missing_ok=True)
        if not self._swept:
            kept = {self._place(client_id, file).name for client_id, file in self._files.items()}
            kept |= {self._place(old.client_id, old.file).name for old in self._former}
            for name in self._found().keys() - kept:
                (self._path / name).unlink(missing_ok=True)
            self._swept = True

    def _retire(self, client_id: str, *, until: int) -> None:
        """Take a file out of force; it goes at once if no checkpoint can refer to it."""
        file = self._files.pop(client_id)
        self._bytes -= file.size
        if file.done < self._saved:
            self._former.append(_Former(client_id, file, until))
        else:
            path = self._place(client_id, file)
            path.unlink(missing_ok=True)
            self._unsynced.discard(path)

    # -- files -----------------------------------------------------------------------------------------------------

    def _place(self, client_id: str, file: _File) -> Path:
        # the client by a digest: an id may be no name of a file. All of it in the name: no other content ever gets this name
        return self._path / f"{_digest(client_id.encode())}-{file.done}-{file.digest}.memory"

    def _found(self) -> dict[str, int]:
        """Sizes of all files in the folder that are memories, or were to become some."""
        if not self._path.is_dir():
            return {}
        with os.scandir(self._path) as entries:
            return {entry.name: entry.stat().st_size for entry in entries if _NAME.fullmatch(entry.name)}

    def _write(self, client_id: str, file: _File, content: bytes) -> None:
        path = self._place(client_id, file)
        temporary = path.with_name(path.name + ".tmp")
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(content)
            temporary.replace(path)
        except OSError as error:
            raise OSError(
                f"expected to write the memory of client {client_id!r} to {self._path}, got: {error.strerror}"
            ) from error
        self._unsynced.add(path)

    def _read(self, client_id: str, file: _File) -> Memory:
        path = self._place(client_id, file)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ValueError(f"expected the memory of client {client_id!r} at {path}, got: {error.strerror}") from error
        if _digest(content) != file.digest:
            raise ValueError(
                f"expected the memory of client {client_id!r} as it was written, got a damaged file: {path}"
            )
        try:
            memory: Memory = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"expected tensors and primitives in the memory of client {client_id!r}, got other objects in {path}"
            ) from error
        return memory


_NAME = re.compile(r"[0-9a-f]{32}-\d+-[0-9a-f]{32}\.memory(\.tmp)?")


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _sync(folder: Path, files: Iterable[Path]) -> None:
    """Have files, and their names in their folder, on the disk."""
    for path in files:
        with path.open("r+b") as file:
            os.fsync(file.fileno())
    sync_folder(folder)
