"""Values of one tensor <-> bytes, without loss.

The exponents of trained weights are few and skewed, their mantissas are noise. For float32 the bits are rotated left by
one, which puts the eight exponent bits into the top byte and the sign among the noise: the top bytes travel under
Huffman codes, the other three as they are. On gaussian values that is 0.83 of the raw size. Other dtypes travel raw.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_fedsparse.bounded_reading import PayloadError, deflate, inflate
from lightning_fedsparse.container import ValueCoding

__all__ = ["decode_values", "encode_values"]

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


def encode_values(values: Tensor) -> tuple[ValueCoding, bytes]:
    """Code a tensor's elements in row-major order, the smaller way."""
    flat = values.detach().cpu().contiguous().reshape(-1)
    carrier = _CARRIERS[flat.element_size()]
    words = flat.view(carrier).numpy()
    if flat.dtype == torch.float32 and flat.numel() >= _SMALLEST_PLANES:
        planes = _split_planes(words.view(np.uint32))
        if len(planes) < words.nbytes:
            return ValueCoding.PLANES, planes
    return ValueCoding.RAW, words.astype(words.dtype.newbyteorder("<"), copy=False).tobytes()


def decode_values(
    coding: ValueCoding, section: memoryview, *, count: int, dtype: torch.dtype, what: str, infinities: bool
) -> Tensor:
    """Read what :func:`encode_values` wrote.

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
    carrier = torch.empty(0, dtype=_CARRIERS[dtype.itemsize]).numpy().dtype
    if coding == ValueCoding.PLANES:
        if dtype != torch.float32:
            raise PayloadError(f"the values of {what} are coded as PLANES, which is for float32, not {dtype}")
        words = _join_planes(section, count, what).view(carrier)
    else:
        if len(section) != count * carrier.itemsize:
            raise PayloadError(
                f"{what} has {len(section)} bytes of values, not the {count * carrier.itemsize} it needs"
            )
        words = np.frombuffer(section, carrier.newbyteorder("<")).astype(carrier)  # a copy: torch wants it writable
    _check_words(words, dtype, what, infinities=infinities)
    return torch.from_numpy(words).view(dtype)


def _split_planes(words: NDArray[np.uint32]) -> bytes:
    rotated = words << 1 | words >> 31
    exponents = deflate((rotated >> 24).astype(np.uint8).data)
    return rotated.astype("<u2").tobytes() + (rotated >> 16).astype(np.uint8).tobytes() + exponents


def _join_planes(section: memoryview, count: int, what: str) -> NDArray[np.uint32]:
    if len(section) < 3 * count:
        raise PayloadError(f"{what} has {len(section)} bytes of values, fewer than the {3 * count} of its mantissas")
    exponents = inflate(section[3 * count :], count, f"the exponents of {what}")
    if len(exponents) != count:
        raise PayloadError(f"{what} has {len(exponents)} exponents for {count} values")
    words = np.frombuffer(exponents, np.uint8).astype(np.uint32)
    words <<= 8
    words |= np.frombuffer(section[2 * count : 3 * count], np.uint8)
    words <<= 16
    words |= np.frombuffer(section[: 2 * count], "<u2")
    return words >> np.uint32(1) | words << np.uint32(31)


def _check_words(words: NDArray[np.signedinteger], dtype: torch.dtype, what: str, *, infinities: bool) -> None:
    if dtype == torch.bool and words.size and words.max() > 1:
        raise PayloadError(f"{what} is bool but holds the byte {words.max()}")
    if dtype in _EXPONENTS:
        exponent = words.dtype.type(_EXPONENTS[dtype])
        magnitude = words & words.dtype.type(np.iinfo(words.dtype).max)
        refused = magnitude > exponent if infinities else magnitude >= exponent
        if refused.any():
            raise PayloadError(f"{what} holds values that are not finite, {np.count_nonzero(refused)} of {words.size}")
