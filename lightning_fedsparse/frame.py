"""What every payload begins and ends with: ``magic | version | content | CRC-32``.

The version says how the content is to be read: it describes its tensors itself (:mod:`lightning_fedsparse.container`), or
names a schema that the receiver holds as well (:mod:`lightning_fedsparse.compact`). The checksum finds accidents, the
checks of the content refuse hostile input; neither proves who sent a payload.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

from lightning_fedsparse.bounded_reading import Limits, PayloadError, Reader

__all__ = ["BY_SCHEMA", "SELF_DESCRIBING", "Section", "read_frame", "write_frame"]

Section = bytes | memoryview
MAGIC = b"\x89FSP"
SELF_DESCRIBING = 1
BY_SCHEMA = 2
_OVERHEAD = len(MAGIC) + 1 + 4


def write_frame(version: int, content: Sequence[Section]) -> bytes:
    """Put the beginning and the checksum around the parts of a content."""
    parts: list[Section] = [MAGIC, bytes([version]), *content]
    checksum = 0
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    return b"".join([*parts, struct.pack("<I", checksum)])


def read_frame(data: bytes, limits: Limits) -> tuple[int, Reader]:
    """Check the frame and return the version and a reader of the content.

    Raises:
        PayloadError: If it is too long or too short, no payload, of an unknown version, or damaged.
    """
    if len(data) > limits.max_bytes:
        raise PayloadError(f"the payload has {len(data)} bytes, more than the limit of {limits.max_bytes}")
    if len(data) < _OVERHEAD:
        raise PayloadError(f"the payload has {len(data)} bytes, fewer than its frame of {_OVERHEAD}")
    view = memoryview(data)
    if view[: len(MAGIC)] != MAGIC:
        raise PayloadError(f"not a payload: it starts with {data[: len(MAGIC)]!r} instead of {MAGIC!r}")
    version = view[len(MAGIC)]
    if version not in (SELF_DESCRIBING, BY_SCHEMA):
        raise PayloadError(
            f"payload version {version} is unknown: this decoder reads versions {SELF_DESCRIBING} and {BY_SCHEMA}"
        )
    (declared,) = struct.unpack("<I", view[-4:])
    found = zlib.crc32(view[:-4])
    if found != declared:
        raise PayloadError(f"the checksum is {found:08x} but the payload declares {declared:08x}: it was damaged")
    return version, Reader(view[len(MAGIC) + 1 : -4])
