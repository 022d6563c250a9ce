"""The bits of a tensor's elements, and those of floats in two parts: a byte that codes well, and noise.

The exponents of trained weights are few and skewed, their mantissas are noise. The bits of a float are rotated left by
one, which puts (the first) eight exponent bits into the top byte and the sign among the noise.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_fedsparse.bounded_reading import PayloadError

__all__ = ["IN_PLANES", "check_values", "from_raw", "join_planes", "noise_bytes", "split_planes", "to_raw", "words_of"]

Words = NDArray[np.unsignedinteger]
Bytes = NDArray[np.uint8]

IN_PLANES = {torch.float32: np.uint32, torch.float16: np.uint16, torch.bfloat16: np.uint16}

_CHUNK = 2**14  # words that are taken apart or put together at a time: what is made on the way stays in cache
_CARRIERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# exponent bits of a carrier: all set in infinities (mantissa zero) and NaNs
_EXPONENTS = {
    torch.float16: 0x7C00,
    torch.bfloat16: 0x7F80,
    torch.float32: 0x7F80_0000,
    torch.float64: 0x7FF0_0000_0000_0000,
}


def words_of(flat: Tensor) -> Words:
    """The bits of a contiguous CPU tensor of a dtype in ``IN_PLANES``."""
    words: Words = flat.view(_CARRIERS[flat.element_size()]).numpy().view(IN_PLANES[flat.dtype])
    return words


def to_raw(flat: Tensor) -> bytes:
    """The elements of a contiguous CPU tensor, little-endian."""
    words = flat.view(_CARRIERS[flat.element_size()]).numpy()
    return words.astype(words.dtype.newbyteorder("<"), copy=False).tobytes()


def from_raw(section: memoryview, count: int, dtype: torch.dtype, what: str) -> Tensor:
    """Read what :func:`to_raw` wrote."""
    carrier = torch.empty(0, dtype=_CARRIERS[dtype.itemsize]).numpy().dtype
    if len(section) != count * carrier.itemsize:
        raise PayloadError(f"{what} has {len(section)} bytes of values, not the {count * carrier.itemsize} it needs")
    words = np.frombuffer(section, carrier.newbyteorder("<")).astype(carrier)  # a copy: torch wants it writable
    if dtype == torch.bool and words.size and words.max() > 1:
        raise PayloadError(f"{what} is bool but holds the byte {words.max()}")
    return torch.from_numpy(words).view(dtype)


def noise_bytes(count: int, dtype: torch.dtype) -> int:
    """All bytes of the elements but the top ones."""
    return count * (dtype.itemsize - 1)


def split_planes(words: Words, noise: Bytes) -> Bytes:
    """Write all but the rotated words' top bytes into ``noise``, plane by plane, and return the top bytes."""
    size, bits = words.itemsize, words.dtype.type
    low, middle = _noise_planes(noise, size)
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
    return top


def join_planes(noise: Bytes, top: Bytes, dtype: torch.dtype) -> Tensor:
    """The elements that :func:`split_planes` took apart."""
    size = dtype.itemsize
    low, middle = _noise_planes(noise, size)
    words: Words = np.empty(top.size, IN_PLANES[dtype])
    bits = words.dtype.type
    for start in range(0, top.size, _CHUNK):
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
    return torch.from_numpy(words.view(f"i{size}")).view(dtype)


def check_values(values: Tensor, what: str, *, infinities: bool) -> None:
    """Refuse NaNs, and infinities unless they may be."""
    # a sum that is finite has finite terms, and takes a tenth of the time
    if values.dtype in _EXPONENTS and not values.sum().isfinite():
        words = values.view(_CARRIERS[values.element_size()]).numpy()
        exponent = words.dtype.type(_EXPONENTS[values.dtype])
        magnitude = words & words.dtype.type(np.iinfo(words.dtype).max)
        refused = magnitude > exponent if infinities else magnitude >= exponent
        if refused.any():
            raise PayloadError(f"{what} holds values that are not finite, {np.count_nonzero(refused)} of {words.size}")


def _noise_planes(noise: Bytes, size: int) -> tuple[Words, Bytes | None]:
    """The low bytes of all words, two of each where there are four in a word, and then the third ones."""
    if size == 2:
        return noise, None
    low, middle = np.split(noise, [len(noise) // 3 * 2])
    return low.view("<u2"), middle
