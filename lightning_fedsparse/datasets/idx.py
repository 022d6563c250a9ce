"""Reader of IDX files, the layout of MNIST and its relatives.

Two zero bytes, one byte for the type, one for the number of dimensions, each dimension as a big-endian 32-bit number,
then the values, big-endian, in row-major order. Y. LeCun, C. Cortes, C. J. C. Burges, "The MNIST database of
handwritten digits", http://yann.lecun.com/exdb/mnist/.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["read_idx"]

_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_GZIP_MAGIC = b"\x1f\x8b"


def read_idx(path: Path) -> npt.NDArray[Any]:
    """Read an IDX file, plain or gzipped.

    Returns:
        Array of the shape and type that the header states, in native byte order.

    Raises:
        ValueError: If the header is not one of IDX, or the file is longer or shorter than its header states.
    """
    with path.open("rb") as stream:
        packed = stream.read(2) == _GZIP_MAGIC
    try:
        with gzip.open(path) if packed else path.open("rb") as stream:
            head = stream.read(4)
            if len(head) < 4 or head[:2] != b"\0\0" or head[2] not in _TYPES or not head[3]:
                raise ValueError(f"{path} is not an IDX file: it begins with {head.hex(' ')}")
            dtype, dimensions = np.dtype(_TYPES[head[2]]), head[3]
            sizes = stream.read(4 * dimensions)
            if len(sizes) < 4 * dimensions:
                raise ValueError(f"{path} ends inside its header of {dimensions} dimensions")
            shape = struct.unpack(f">{dimensions}I", sizes)
            expected = math.prod(shape) * dtype.itemsize
            # all there is, not what the header claims: a false claim must not allocate
            values = stream.read()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a complete gzip file: {error}") from None
    if len(values) != expected:
        raise ValueError(f"{path} holds {len(values)} bytes of values, its header states {expected} (shape {shape})")
    return np.frombuffer(values, dtype).reshape(shape).astype(dtype.newbyteorder("="))
