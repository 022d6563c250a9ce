"""Values of one tensor <-> bytes: without loss, as short floats, or as small integers.

The exponents of trained weights are few and skewed, their mantissas are noise. The bits of a float are rotated left by
one, which puts (the first) eight exponent bits into the top byte and the sign among the noise: the top bytes travel
under Huffman codes, the others as they are. On gaussian float32 values that is 0.83 of the raw size. Floats can also be
rounded before they travel (:mod:`lightning_fedsparse.quantization`); other dtypes travel raw.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_fedsparse.bounded_reading import PayloadError, Reader, deflate, inflate, varint
from lightning_fedsparse.container import Section, ValueCoding
from lightning_fedsparse.quantization import LEVELS, dequantize, quantize, round_to_dtype

__all__ = ["LOSSLESS", "VALUE_TYPES", "ValueType", "decode_values", "encode_rounded_values", "encode_values"]

ValueType = Literal["float32", "bfloat16", "float16", "int8", "int4"]
VALUE_TYPES: tuple[ValueType, ...] = get_args(ValueType)
LOSSLESS: ValueType = "float32"

_CHUNK = 2**14  # words that are taken apart or put together at a time: what is made on the way stays in cache
# below this the code lengths cost more than the exponents save
_SMALLEST_PLANES = 64
_CARRIERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# exponent bits of a carrier: all set in infinities (mantissa zero) and NaNs
_EXPONENTS = {
    torch.float16: 0x7C00,
    torch.bfloat16: 0x7F80,
    torch.float32: 0x7F80_0000,
    torch.float64: 0x7FF0_0000_0000_0000,
}
_IN_PLANES = {torch.float32: np.uint32, torch.float16: np.uint16, torch.bfloat16: np.uint16}
_SHORT_FLOATS = {
    "bfloat16": (ValueCoding.BFLOAT16, torch.bfloat16),
    "float16": (ValueCoding.FLOAT16, torch.float16),
}
_INTEGERS = {"int8": (ValueCoding.INT8, 8), "int4": (ValueCoding.INT4, 4)}


def encode_values(values: Tensor) -> tuple[ValueCoding, Section]:
    """Code a tensor's elements in row-major order, without loss, the smaller way."""
    flat = _flat(values)
    words = flat.view(_CARRIERS[flat.element_size()]).numpy()
    if flat.dtype in _IN_PLANES and flat.numel() >= _SMALLEST_PLANES:
        planes = _split_planes(words.view(_IN_PLANES[flat.dtype]))
        if planes is not None:
            return ValueCoding.PLANES, planes
    return ValueCoding.RAW, words.astype(words.dtype.newbyteorder("<"), copy=False).tobytes()


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
    bits = _INTEGERS[value_type][1] if value_type in _INTEGERS else 16
    if value_type == LOSSLESS or not values.is_floating_point() or bits >= 8 * values.element_size():
        return encode_values(values)
    flat = _flat(values).to(torch.float32)
    if value_type in _SHORT_FLOATS:
        coding, dtype = _SHORT_FLOATS[value_type]
        inner, section = encode_values(round_to_dtype(flat, dtype, generator=generator))
        return coding, b"".join((bytes([inner]), section))
    coding, _ = _INTEGERS[value_type]
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
    _check_values(values, what, infinities=infinities)
    return values


def _flat(values: Tensor) -> Tensor:
    return values.detach().cpu().contiguous().reshape(-1)


def _decode_exact(coding: ValueCoding, section: memoryview, count: int, dtype: torch.dtype, what: str) -> Tensor:
    carrier = torch.empty(0, dtype=_CARRIERS[dtype.itemsize]).numpy().dtype
    if coding == ValueCoding.PLANES:
        if dtype not in _IN_PLANES:
            raise PayloadError(f"the values of {what} are coded as PLANES, which is not for {dtype}")
        words = _join_planes(section, count, dtype.itemsize, what).view(carrier)
    else:
        if len(section) != count * carrier.itemsize:
            raise PayloadError(
                f"{what} has {len(section)} bytes of values, not the {count * carrier.itemsize} it needs"
            )
        words = np.frombuffer(section, carrier.newbyteorder("<")).astype(carrier)  # a copy: torch wants it writable
    if dtype == torch.bool and words.size and words.max() > 1:
        raise PayloadError(f"{what} is bool but holds the byte {words.max()}")
    return torch.from_numpy(words).view(dtype)


def _split_planes(words: NDArray[np.unsignedinteger]) -> memoryview | None:
    """The words in planes; None if that is no shorter."""
    size, bits = words.itemsize, words.dtype.type
    noise = (size - 1) * words.size
    section = np.empty(size * words.size, np.uint8)
    low, middle = _noise_planes(section[:noise], size)
    top = np.empty(words.size, np.uint8)
    for start in range(0, words.size, _CHUNK):
        chunk = slice(start, start + _CHUNK)
        rotated = words[chunk] << bits(1)
        rotated |= words[chunk] >> bits(8 * size - 1)
        low[chunk] = rotated
        if middle is not None:
            rotated >>= bits(16)
            middle[chunk] = rotated
        rotated >>= bits(8)
        top[chunk] = rotated
    exponents = np.frombuffer(deflate(top.data), np.uint8)
    if exponents.size >= words.size:
        return None
    section[noise : noise + exponents.size] = exponents
    return section[: noise + exponents.size].data


def _join_planes(section: memoryview, count: int, size: int, what: str) -> NDArray[np.unsignedinteger]:
    noise = (size - 1) * count
    if len(section) < noise:
        raise PayloadError(f"{what} has {len(section)} bytes of values, fewer than the {noise} of its mantissas")
    exponents = inflate(section[noise:], count, f"the exponents of {what}")
    if len(exponents) != count:
        raise PayloadError(f"{what} has {len(exponents)} exponents for {count} values")
    top = np.frombuffer(exponents, np.uint8)
    low, middle = _noise_planes(np.frombuffer(section[:noise], np.uint8), size)
    words: NDArray[np.unsignedinteger] = np.empty(count, np.uint32 if size == 4 else np.uint16)
    bits = words.dtype.type
    for start in range(0, count, _CHUNK):
        chunk = slice(start, start + _CHUNK)
        rotated = top[chunk].astype(bits)
        if middle is not None:
            rotated <<= bits(8)
            rotated |= middle[chunk]
        rotated <<= bits(8 * low.itemsize)
        rotated |= low[chunk]
        np.left_shift(rotated, bits(8 * size - 1), out=words[chunk])
        rotated >>= bits(1)
        words[chunk] |= rotated
    return words


def _noise_planes(noise: NDArray[np.uint8], size: int) -> tuple[NDArray[np.unsignedinteger], NDArray[np.uint8] | None]:
    """The low bytes of all words, two of each where there are four in a word, and then the third ones."""
    if size == 2:
        return noise, None
    low, middle = np.split(noise, [len(noise) // 3 * 2])
    return low.view("<u2"), middle


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
    block = reader.varint(f"the block of {what}", 2**63) or max(1, count)
    blocks = -(-count // block)
    scales = np.frombuffer(reader.take(4 * blocks, f"the scales of {what}"), "<f4").astype(np.float32)
    if not (np.isfinite(scales) & (scales >= 0)).all():
        raise PayloadError(f"{what} holds values that are not finite: its scales are not all finite and positive")
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
    if count and (codes.min() < -LEVELS[bits] or codes.max() > LEVELS[bits]):
        raise PayloadError(f"{what} has a code beyond {LEVELS[bits]}")
    # no block is longer than the tensor: a hostile one must not be padded to
    return dequantize(torch.from_numpy(codes), torch.from_numpy(scales), block=min(block, max(1, count)))


def _check_values(values: Tensor, what: str, *, infinities: bool) -> None:
    if values.dtype in _EXPONENTS:
        words = values.view(_CARRIERS[values.element_size()]).numpy()
        exponent = words.dtype.type(_EXPONENTS[values.dtype])
        magnitude = words & words.dtype.type(np.iinfo(words.dtype).max)
        refused = magnitude > exponent if infinities else magnitude >= exponent
        if refused.any():
            raise PayloadError(f"{what} holds values that are not finite, {np.count_nonzero(refused)} of {words.size}")
