"""Values of one tensor <-> bytes: without loss, as short floats, or as small integers.

Of floats the top bytes (:mod:`lightning_fedsparse.float_bits`) travel under Huffman codes, the others as they are. On
gaussian float32 values that is 0.83 of the raw size. Floats can also be rounded before they travel
(:mod:`lightning_fedsparse.quantization`); other dtypes travel raw.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_fedsparse.bounded_reading import PayloadError, Reader, deflate, inflate, varint
from lightning_fedsparse.container import ValueCoding
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
from lightning_fedsparse.quantization import LEVELS, dequantize, quantize, round_to_dtype

__all__ = [
    "INTEGERS",
    "LOSSLESS",
    "SHORT_FLOATS",
    "VALUE_TYPES",
    "ValueType",
    "decode_values",
    "encode_rounded_values",
    "encode_values",
    "flat_values",
    "from_codes",
    "is_rounded",
    "read_scales",
]

ValueType = Literal["float32", "bfloat16", "float16", "int8", "int4"]
VALUE_TYPES: tuple[ValueType, ...] = get_args(ValueType)  # append only: the index is a code on the wire
LOSSLESS: ValueType = "float32"

# below this the code lengths cost more than the exponents save
_SMALLEST_PLANES = 64
SHORT_FLOATS = {
    "bfloat16": (ValueCoding.BFLOAT16, torch.bfloat16),
    "float16": (ValueCoding.FLOAT16, torch.float16),
}
INTEGERS = {"int8": (ValueCoding.INT8, 8), "int4": (ValueCoding.INT4, 4)}


def encode_values(values: Tensor) -> tuple[ValueCoding, Section]:
    """Code a tensor's elements in row-major order, without loss, the smaller way."""
    flat = flat_values(values)
    if flat.dtype in IN_PLANES and flat.numel() >= _SMALLEST_PLANES:
        section = np.empty(flat.numel() * flat.element_size(), np.uint8)
        noise = noise_bytes(flat.numel(), flat.dtype)
        exponents = np.frombuffer(deflate(split_planes(words_of(flat), section[:noise]).data), np.uint8)
        if exponents.size < flat.numel():
            section[noise : noise + exponents.size] = exponents
            return ValueCoding.PLANES, section[: noise + exponents.size].data
    return ValueCoding.RAW, to_raw(flat)


def is_rounded(dtype: torch.dtype, value_type: ValueType) -> bool:
    """Whether values of a dtype lose anything: floats of more bits than the type has do."""
    bits = INTEGERS[value_type][1] if value_type in INTEGERS else 16
    return value_type != LOSSLESS and dtype.is_floating_point and bits < 8 * dtype.itemsize


def encode_rounded_values(
    values: Tensor, value_type: ValueType, *, block: int | None, generator: torch.Generator
) -> tuple[ValueCoding, Section]:
    """Round a tensor's elements and code them; without loss where the type takes no fewer bits than they have.

    Args:
        values: Any tensor; floats of 64 bits are taken as float32 first.
        value_type: How they travel.
        block: Values that share a scale, for integers; None for one scale.
        generator: Source of the rounding.
    """
    if not is_rounded(values.dtype, value_type):
        return encode_values(values)
    flat = flat_values(values).to(torch.float32)
    if value_type in SHORT_FLOATS:
        coding, dtype = SHORT_FLOATS[value_type]
        inner, section = encode_values(round_to_dtype(flat, dtype, generator=generator))
        return coding, b"".join((bytes([inner]), section))
    coding, bits = INTEGERS[value_type]
    # a block of everything would make an empty tensor's blocks empty too
    codes, scales = quantize(flat, bits=bits, block=block or max(1, len(flat)), generator=generator)
    return coding, varint(block or 0) + scales.numpy().astype("<f4").tobytes() + _pack_codes(codes.numpy(), bits)


def decode_values(
    coding: ValueCoding, section: memoryview, *, count: int, dtype: torch.dtype, what: str, infinities: bool
) -> Tensor:
    """Read what :func:`encode_values` or :func:`encode_rounded_values` wrote.

    Args:
        coding: How ``section`` is coded.
        section: The coded bytes.
        count: Elements that the header declares.
        dtype: Of the tensor.
        what: The tensor, for messages.
        infinities: Whether infinities pass; NaNs never do.

    Returns:
        A 1-D tensor.

    Raises:
        PayloadError: If the section is not ``count`` such elements, or one of them is not finite.
    """
    if coding in (ValueCoding.RAW, ValueCoding.PLANES):
        values = _decode_exact(coding, section, count, dtype, what)
    elif not dtype.is_floating_point:
        raise PayloadError(f"the values of {what} are coded as {coding.name}, which is for floats, not {dtype}")
    elif coding in (ValueCoding.BFLOAT16, ValueCoding.FLOAT16):
        if dtype.itemsize == 2:
            raise PayloadError(f"the values of {what} are coded as {coding.name}, which {dtype} has no use for")
        reader = Reader(section)
        inner = reader.byte(f"the coding of {what}")
        if inner not in (ValueCoding.RAW, ValueCoding.PLANES):
            raise PayloadError(f"the rounded values of {what} have code {inner}, neither RAW nor PLANES")
        short = torch.bfloat16 if coding == ValueCoding.BFLOAT16 else torch.float16
        values = _decode_exact(ValueCoding(inner), reader.take(reader.left, what), count, short, what).to(dtype)
    else:
        values = _decode_integers(section, 8 if coding == ValueCoding.INT8 else 4, count, what).to(dtype)
    check_values(values, what, infinities=infinities)
    return values


def flat_values(values: Tensor) -> Tensor:
    """The elements in row-major order, on the CPU."""
    return values.detach().cpu().contiguous().reshape(-1)


def _decode_exact(coding: ValueCoding, section: memoryview, count: int, dtype: torch.dtype, what: str) -> Tensor:
    if coding == ValueCoding.RAW:
        return from_raw(section, count, dtype, what)
    if dtype not in IN_PLANES:
        raise PayloadError(f"the values of {what} are coded as PLANES, which is not for {dtype}")
    noise = noise_bytes(count, dtype)
    if len(section) < noise:
        raise PayloadError(f"{what} has {len(section)} bytes of values, fewer than the {noise} of its mantissas")
    exponents = inflate(section[noise:], count, f"the exponents of {what}")
    if len(exponents) != count:
        raise PayloadError(f"{what} has {len(exponents)} exponents for {count} values")
    return join_planes(np.frombuffer(section[:noise], np.uint8), np.frombuffer(exponents, np.uint8), dtype)


def _pack_codes(codes: NDArray[np.int8], bits: int) -> bytes:
    """A byte, 1 if Huffman codes follow and 0 if not; then the codes, one or two to a byte where they are raw."""
    raw = codes.tobytes()
    if bits == 4:
        nibbles = np.pad(codes.view(np.uint8) & 15, (0, len(codes) % 2))
        raw = (nibbles[::2] << 4 | nibbles[1::2]).tobytes()
    packed = deflate(codes.data)
    return b"\1" + packed if len(packed) < len(raw) else b"\0" + raw


def _decode_integers(section: memoryview, bits: int, count: int, what: str) -> Tensor:
    reader = Reader(section)
    block = reader.varint(f"the block of {what}", 2**63)
    scales = read_scales(reader, count, block, what)
    packed = reader.byte(f"the packing of {what}")
    if packed > 1:
        raise PayloadError(f"the packing of {what} has code {packed}, beyond the last known one, 1")
    data = reader.take(reader.left, what)
    if packed or bits == 8:
        plain = inflate(data, count, f"the codes of {what}") if packed else bytes(data)
        if len(plain) != count:
            raise PayloadError(f"{what} has {len(plain)} codes for {count} values")
        codes = np.frombuffer(plain, np.int8).copy()
    else:
        if len(data) != (count + 1) // 2:
            raise PayloadError(f"{what} has {len(data)} bytes of codes, not the {(count + 1) // 2} of {count} values")
        if count % 2 and data[-1] & 15:
            raise PayloadError(f"the codes of {what} do not end with the last value")
        both = np.frombuffer(data, np.int8)
        # shifting an int8 to the right keeps its sign
        codes = np.stack([both >> 4, (both << 4).view(np.int8) >> 4], 1).reshape(-1)[:count].copy()
    return from_codes(codes, scales, bits, block, what)


def read_scales(reader: Reader, count: int, block: int, what: str) -> Tensor:
    """The scales of so many values, one for each block; of all values if ``block`` is 0."""
    blocks = -(-count // (block or max(1, count)))
    scales = np.frombuffer(reader.take(4 * blocks, f"the scales of {what}"), "<f4").astype(np.float32)
    if not (np.isfinite(scales) & (scales >= 0)).all():
        raise PayloadError(f"{what} holds values that are not finite: its scales are not all finite and positive")
    return torch.from_numpy(scales)


def from_codes(codes: NDArray[np.int8], scales: Tensor, bits: int, block: int, what: str) -> Tensor:
    """The float32 values that integers and scales stand for, if the integers are in range."""
    if codes.size and (codes.min() < -LEVELS[bits] or codes.max() > LEVELS[bits]):
        raise PayloadError(f"{what} has a code beyond {LEVELS[bits]}")
    # no block is longer than the tensor: a hostile one must not be padded to
    size = max(1, codes.size)
    return dequantize(torch.from_numpy(codes), scales, block=min(block or size, size))
