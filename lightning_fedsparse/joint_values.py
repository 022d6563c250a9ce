"""Values of all tensors of a model <-> bytes, together.

Every tensor has a part whose length follows from what the receiver knows: scales of integers, the noise of floats, the bytes
of what is neither. What codes well, the top bytes of floats and the integers, comes last, in one deflate stream for all
tensors: they share a table of codes where tables would cost more than they save, which in small models they do.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_fedsparse.bounded_reading import PayloadError, Reader, deflater, inflate
from lightning_fedsparse.float_bits import (
    IN_PLANES,
    check_values,
    from_raw,
    join_planes,
    noise_bytes,
    split_planes,
    to_raw,
    words_of,
)
from lightning_fedsparse.frame import Section
from lightning_fedsparse.quantization import quantize, round_to_dtype
from lightning_fedsparse.value_coding import (
    INTEGERS,
    LOSSLESS,
    SHORT_FLOATS,
    ValueType,
    flat_values,
    from_codes,
    is_rounded,
    read_scales,
)

__all__ = ["Wanted", "read_values", "write_values"]

Bytes = NDArray[np.uint8]

_LARGE = 32_767  # top bytes that have a table of codes of their own in any case
_TABLE = 40  # bytes that one more table of codes takes


@dataclass(frozen=True)
class Wanted:
    """One tensor whose values are read.

    Args:
        name: For messages.
        count: Its values.
        dtype: What they become.
        value_type: How they travel.
        infinities: Whether infinities pass; NaNs never do.
    """

    name: str
    count: int
    dtype: torch.dtype
    value_type: ValueType = LOSSLESS
    infinities: bool = False


def write_values(
    tensors: Iterable[tuple[Tensor, ValueType]], *, block: int | None, generator: torch.Generator | None
) -> list[Section]:
    """Code the elements of tensors, in row-major order each.

    Args:
        tensors: Any tensors, each with how it travels: without loss where the type takes no fewer bits than it has.
        block: Values that share a scale, for integers; None for one scale.
        generator: Source of the rounding; needed where anything is rounded.
    """
    sections: list[Section] = []
    tops: list[Bytes] = []
    for tensor, value_type in tensors:
        flat = flat_values(tensor)
        if is_rounded(flat.dtype, value_type):
            assert generator is not None  # the caller has one or refuses to round
            flat = flat.to(torch.float32)
            if value_type in INTEGERS:
                _, bits = INTEGERS[value_type]
                # a block of everything would make an empty tensor's blocks empty too
                codes, scales = quantize(flat, bits=bits, block=block or max(1, len(flat)), generator=generator)
                sections.append(to_raw(scales))
                tops.append(codes.numpy().view(np.uint8))
                continue
            flat = round_to_dtype(flat, SHORT_FLOATS[value_type][1], generator=generator)
        if flat.dtype in IN_PLANES:
            noise = np.empty(noise_bytes(flat.numel(), flat.dtype), np.uint8)
            tops.append(split_planes(words_of(flat), noise))
            sections.append(noise.data)
        else:
            sections.append(to_raw(flat))
    return [*sections, _deflate_together(tops)]


def read_values(reader: Reader, wanted: Sequence[Wanted], *, block: int) -> list[Tensor]:
    """Read what :func:`write_values` wrote, to the end of the reader.

    Args:
        reader: Stands at the values.
        wanted: The tensors.
        block: Values that share a scale, for integers; 0 for one scale.

    Returns:
        1-D tensors.

    Raises:
        PayloadError: If these are not the values of such tensors, or one of them is not finite.
    """
    parts: list[tuple[Tensor | memoryview, int]] = []
    for one in wanted:
        what = repr(one.name)
        dtype = _travelling(one)
        if dtype is None:
            parts.append((read_scales(reader, one.count, block, what), one.count))
        elif dtype in IN_PLANES:
            noise = reader.take(noise_bytes(one.count, dtype), f"the mantissas of {what}")
            parts.append((noise, one.count))
        else:
            raw = reader.take(one.count * dtype.itemsize, f"the values of {what}")
            parts.append((from_raw(raw, one.count, dtype, what), 0))
    together = sum(count for _, count in parts)
    section = reader.take(reader.left, "the exponents")
    inflated = inflate(section, together, "the stream of exponents") if together else bytes(section)
    if len(inflated) != together:
        raise PayloadError(f"the payload has {len(inflated)} exponents for {together} values")
    tops = np.split(np.frombuffer(inflated, np.uint8), np.cumsum([count for _, count in parts]))
    return [_put_together(one, part, top, block) for one, (part, _), top in zip(wanted, parts, tops, strict=False)]


def _travelling(one: Wanted) -> torch.dtype | None:
    """The dtype that travels; None for scaled integers."""
    if not is_rounded(one.dtype, one.value_type):
        return one.dtype
    return None if one.value_type in INTEGERS else SHORT_FLOATS[one.value_type][1]


def _put_together(one: Wanted, part: Tensor | memoryview, top: Bytes, block: int) -> Tensor:
    what, dtype = repr(one.name), _travelling(one)
    if dtype is None:
        assert isinstance(part, Tensor)
        values = from_codes(top.view(np.int8).copy(), part, INTEGERS[one.value_type][1], block, what)
    else:
        values = part if isinstance(part, Tensor) else join_planes(np.frombuffer(part, np.uint8), top, dtype)
    values = values.to(one.dtype)
    check_values(values, what, infinities=one.infinities)
    return values


def _deflate_together(tops: Sequence[Bytes]) -> bytes:
    """One stream, with new codes from one tensor to the next where they save more than their table takes."""
    if not any(top.size for top in tops):
        return b""
    packer = deflater()
    packed: list[bytes] = []
    shared = np.zeros(256, np.int64)  # histogram of what is to be coded by the same codes
    for top in tops:
        own = np.bincount(top, minlength=256) if top.size < _LARGE else None
        if own is None or _entropy(shared) + _entropy(own) + _TABLE < _entropy(shared + own):
            packed.append(packer.flush(zlib.Z_BLOCK))
            shared = np.zeros(256, np.int64)
        if own is not None:
            shared = shared + own
        packed.append(packer.compress(top.data))
        if own is None:
            packed.append(packer.flush(zlib.Z_BLOCK))
    return b"".join([*packed, packer.flush()])


def _entropy(histogram: NDArray[np.int64]) -> float:
    """Bytes that its symbols take under codes of their own, the table not counted."""
    counts = histogram[histogram > 0]
    return float((counts * np.log2(counts.sum() / counts)).sum()) / 8
