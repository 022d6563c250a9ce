"""Numbers <-> bits by a Golomb code, the best code of whole bits for gaps between independent random positions.

A number ``g`` is ``q * M + r``: ``q`` in unary, ``r`` in binary, in one bit less where it is small and ``M`` is no power of
two. The bits of all numbers are put together by their kind, so that numpy reads and writes them at once, and only the last
byte is filled up.

R. G. Gallager, D. C. Van Voorhis, "Optimal source codes for geometrically distributed integer alphabets", IEEE
Transactions on Information Theory 21(2), 1975, https://doi.org/10.1109/TIT.1975.1055357.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from lightning_fedsparse.bounded_reading import PayloadError, Reader, varint

__all__ = ["pack_golomb", "read_golomb"]


def pack_golomb(numbers: NDArray[np.int32]) -> bytes:
    """The divisor and the numbers, at least one of them, none negative.

    5 = 2 * 2 + 1 and 0 = 0 * 2 + 0: remainders 1 and 0, in unary 001 and 1.

    >>> pack_golomb(np.array([5, 0], np.int32)) == bytes([2, 0b10_001_1_00])
    True
    """
    divisor = _best_divisor(numbers)
    bits, short = _remainder_bits(divisor)
    quotients, remainders = np.divmod(numbers, np.int32(divisor))
    is_long = remainders >= short
    padded = remainders + np.int32(short)
    heads = np.where(is_long, padded >> 1, remainders)
    planes = [(heads >> bit & 1).astype(np.bool_) for bit in range(bits - 1)]
    tails = (padded[is_long] & 1).astype(np.bool_) if bits else np.empty(0, np.bool_)
    ones = np.cumsum(quotients + 1, dtype=np.int64) - 1
    unary = np.zeros(int(ones[-1]) + 1, np.bool_)
    unary[ones] = True
    return varint(divisor) + np.packbits(np.concatenate([*planes, tails, unary])).tobytes()


def read_golomb(reader: Reader, count: int, divisor: int, universe: int, what: str) -> NDArray[np.int64]:
    """Read what :func:`pack_golomb` wrote behind its divisor.

    Args:
        reader: Stands behind the divisor, and afterwards behind the numbers.
        count: How many numbers, at least 1.
        divisor: At least 1.
        universe: What their sum can't be more than.
        what: The tensor, for messages.
    """
    bits, short = _remainder_bits(divisor)
    most = count * (bits + 1) + universe // divisor
    found = np.unpackbits(np.frombuffer(reader.peek((most + 7) // 8), np.uint8))
    at = max(bits - 1, 0) * count
    if at + count > found.size:
        raise PayloadError(f"the positions of {what} have {found.size} bits, too few for {count} gaps")
    heads = np.zeros(count, np.int64)
    for bit in range(bits - 1):
        heads |= found[bit * count : (bit + 1) * count].astype(np.int64) << bit
    if bits:
        is_long = heads >= short
        tails = found[at : at + np.count_nonzero(is_long)]
        at += tails.size
        heads[is_long] = (heads[is_long] << 1 | tails) - short
    ones = np.flatnonzero(found[at:])[:count]
    if ones.size < count:
        raise PayloadError(f"the positions of {what} hold {ones.size} gaps, not {count}")
    if int(ones[-1]) + 1 - count > universe // divisor:
        raise PayloadError(f"the positions of {what} reach beyond its {universe} entries")
    end = at + int(ones[-1]) + 1
    if found[end : end + -end % 8].any():
        raise PayloadError(f"the gaps of {what} do not end with the last")
    reader.take((end + 7) // 8, f"the positions of {what}")
    return (np.diff(ones, prepend=-1) - 1) * divisor + heads


def _remainder_bits(divisor: int) -> tuple[int, int]:
    """Bits of a long remainder, and how many remainders are short."""
    bits = (divisor - 1).bit_length()
    return bits, (1 << bits) - divisor


def _best_divisor(numbers: NDArray[np.int32]) -> int:
    """The cheapest near ``ln(2)`` times the mean, where it is for random positions; off by an eighth it costs nothing."""
    around = math.log(2) * (float(numbers.mean()) + 0.5)
    candidates = sorted({max(1, round(around * 2 ** (step / 4))) for step in range(-4, 5)})
    return min(candidates, key=lambda divisor: _cost(numbers, divisor))


def _cost(numbers: NDArray[np.int32], divisor: int) -> int:
    bits, short = _remainder_bits(divisor)
    quotients, remainders = np.divmod(numbers, np.int32(divisor))
    in_unary = int(quotients.sum(dtype=np.int64)) + len(numbers)
    return in_unary + (len(numbers) * (bits - 1) + int(np.count_nonzero(remainders >= short)) if bits else 0)
