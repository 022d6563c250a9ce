"""One run at a time in a folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_fedsparse.durable import writing

__all__ = ["LOCK_NAME", "locked"]

LOCK_NAME = ".lock"

_mine: set[Path] = set()  # the system's locks hold against other processes only


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder, which is made if it is not there, against other runs.

    The system lets go of it when the process ends in whatever way; the file stays and means nothing by itself. A process
    that was forked does not hold it. On Windows only runs of the same process are kept apart.

    Raises:
        OSError: If the folder can't be written to.
        RuntimeError: If a run is at work in it, naming its process.
    """
    path = folder.resolve() / LOCK_NAME
    if path in _mine:  # and not opened again: with any descriptor of it that is closed, the process loses its lock
        raise _in_use(folder, os.getpid())
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with writing(folder):
            if not _lock(handle):
                raise _in_use(folder, os.read(handle, 20).decode())
            os.truncate(handle, 0)
            os.write(handle, str(os.getpid()).encode())
        _mine.add(path)
        yield
    finally:
        _mine.discard(path)
        os.close(handle)


def _in_use(folder: Path, process: int | str) -> RuntimeError:
    return RuntimeError(f"expected one run at a time in {folder}, found process {process} at work there")


def _lock(handle: int) -> bool:
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        # not flock, which a forked loader worker would go on holding after this process was killed
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True
