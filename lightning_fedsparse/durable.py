"""Files that are there as a whole or not at all, whatever ends the process or the machine in between."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

__all__ = ["append_line", "replace_file", "shorten", "sync_folder", "writing"]

TEMPORARY = ".tmp"
"""What the name of a file ends in that is still being written; one that was left behind does no harm."""


def replace_file(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file beside ``path``, flush it to the disk and rename it: readers find the old content or the new.

    Args:
        path: Where the file is to be; its folder is made if it is not there.
        write: Writes the content into the open file.

    Raises:
        OSError: If it can't be written; the file that was there is then as it was.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            sync_folder(path.parent)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)  # a full disk has better uses
            raise


def append_line(path: Path, line: str) -> None:
    """Append a line and flush it to the disk.

    Raises:
        OSError: If it can't be written; what was there is then as it was.
    """
    with writing(path):
        new = not path.exists()
        # without a buffer, which would try to write the rest again when the file is closed
        with path.open("ab", buffering=0) as file:
            size = file.tell()
            left = memoryview(f"{line}\n".encode())
            try:
                while left:
                    left = left[file.write(left) :]
            except OSError:
                file.truncate(size)
                raise
            os.fsync(file.fileno())
        if new:
            sync_folder(path.parent)


def shorten(path: Path, size: int) -> None:
    """Cut a file off after ``size`` bytes, on the disk.

    Raises:
        OSError: If it can't be written.
    """
    with writing(path), path.open("rb+") as file:
        file.truncate(size)
        os.fsync(file.fileno())


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise what the system says against writing ``path`` as one sentence.

    Raises:
        OSError: Naming the path and the reason, such as a full disk.
    """
    try:
        yield
    except OSError as error:
        raise OSError(f"expected to write {path}, got: {error.strerror or error}") from error


def sync_folder(folder: Path) -> None:
    """Flush to the disk which names a folder holds."""
    if sys.platform == "win32":  # where folders can't be opened, and renaming is durable by itself
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
