"""Ascending numbers <-> bytes: how far apart they are, under the shortest of three codes.

Two of them make a section of known length: the gaps' low bits as bit planes and the rest in bytes under Huffman codes, or
in unary where there are too few gaps to pay for a table of codes. The third is a Golomb code; it knows where it ends and
fills up one byte only, and so suits the many small tensors of small models.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lightning_fedsparse.bounded_reading import PayloadError, Reader, deflate, inflate, varint
from lightning_fedsparse.golomb import pack_golomb, read_golomb

__all__ = ["Gaps", "pack_gaps", "read_gaps", "unpack_gaps"]

Positions = NDArray[np.int64]

_ESCAPE = 255
_UNARY = 0x80  # beside the shift, which is below 32
_FEW = 65_536  # bytes up to which a table of codes can cost more than Huffman codes save over the others


def pack_gaps(members: Positions, universe: int) -> bytes:
    """Code ascending numbers below ``universe``: how far apart they are, in bytes under Huffman codes.

    A gap is the count of numbers skipped. Its low ``k`` bits travel as bit planes (they are noise), the rest as a byte,
    or as so many bytes 255 and a last one below 255. ``k`` comes first and leaves most gaps one byte. Where there are
    too few gaps to pay for a table of codes, the rest travels in unary instead: so many zeros and a one.

    >>> unpack_gaps(memoryview(pack_gaps(np.array([0, 1, 300]), 1000)), 3, 1000, "x").tolist()
    [0, 1, 300]
    """
    return Gaps(members, universe).pack()


def unpack_gaps(section: memoryview, count: int, universe: int, what: str) -> Positions:
    """Read what :func:`pack_gaps` wrote; the numbers are ascending and below ``universe`` or it raises."""
    if count == 0:
        if len(section):
            raise PayloadError(f"{what} has no positions but {len(section)} bytes of them")
        return np.empty(0, np.int64)
    reader = Reader(section)
    first = reader.byte(f"the positions of {what}")
    shift = first & ~_UNARY
    if universe >> shift == 0:
        raise PayloadError(f"the gaps of {what} are shifted by {shift} bits, too many for {universe} entries")
    planes = [reader.take((count + 7) // 8, f"the positions of {what}") for _ in range(shift)]
    if count % 8 and any(plane[-1] & (0xFF >> count % 8) for plane in planes):
        raise PayloadError(f"the bit planes of {what} do not end with the last gap")
    coarse = universe >> shift
    packed = reader.take(reader.left, what)
    # how many coarse steps were skipped up to each number
    ends = _unary_ends(packed, count, what) if first & _UNARY else _byte_ends(packed, count, coarse, what)
    if ends[-1] > coarse:
        raise PayloadError(f"the positions of {what} reach beyond its {universe} entries")
    if not shift:
        members = ends
        members += np.arange(count)
    else:
        gaps = np.diff(ends, prepend=0) << shift
        for bit, plane in enumerate(planes):
            gaps |= np.unpackbits(np.frombuffer(plane, np.uint8), count=count).astype(np.int64) << bit
        members = np.cumsum(gaps + 1) - 1
    if members[-1] >= universe:
        raise PayloadError(f"the positions of {what} reach {members[-1]} in a tensor of {universe} entries")
    return members


def read_gaps(reader: Reader, count: int, universe: int, what: str) -> Positions:
    """Read what :meth:`Gaps.pack_delimited` wrote; the numbers are ascending and below ``universe`` or it raises."""
    if count == 0:
        return np.empty(0, np.int64)
    divisor = reader.varint(f"the divisor of the gaps of {what}", universe)
    if not divisor:
        length = reader.varint(f"the bytes of the positions of {what}", reader.left)
        return unpack_gaps(reader.take(length, f"the positions of {what}"), count, universe, what)
    members = np.cumsum(read_golomb(reader, count, divisor, universe, what) + 1) - 1
    if members[-1] >= universe:
        raise PayloadError(f"the positions of {what} reach {members[-1]} in a tensor of {universe} entries")
    return members


def _byte_ends(packed: memoryview, count: int, coarse: int, what: str) -> Positions:
    high = np.frombuffer(inflate(packed, count + coarse // _ESCAPE, f"the positions of {what}"), np.uint8)
    last = high != _ESCAPE
    found = int(np.count_nonzero(last))
    if found != count or not last[-1]:
        raise PayloadError(f"the positions of {what} hold {found} gaps, not {count}, or end within one")
    ends = np.cumsum(high, dtype=np.int64)
    return ends if found == high.size else ends[last]


def _unary_ends(packed: memoryview, count: int, what: str) -> Positions:
    ones = np.flatnonzero(np.unpackbits(np.frombuffer(packed, np.uint8)))
    if ones.size != count or ones[-1] // 8 != len(packed) - 1:
        raise PayloadError(f"the positions of {what} hold {ones.size} gaps, not {count}, or do not end with the last")
    ends: Positions = ones - np.arange(count)
    return ends


class Gaps:
    """Gaps of ascending numbers, split for coding: noise bits, and the bytes that Huffman codes shorten."""

    def __init__(self, members: Positions, universe: int) -> None:
        self.gaps = np.empty(0, np.int32)
        self.shift = 0
        self.low = b""
        self.high = np.empty(0, np.uint8)
        if not members.size:
            return
        # a mean gap of 32 to 64 in bytes: escapes are rare, and what the raw bits lose is below 0.1 %
        self.shift = max(0, (universe // members.size).bit_length() - 6)
        ascending = members.astype(np.int32)
        gaps = ascending.copy()
        gaps[1:] -= ascending[:-1] + np.int32(1)
        self.gaps = gaps
        self.low = _bit_planes(gaps, self.shift)
        high = gaps >> self.shift
        self.high = high.astype(np.uint8)
        if high.max() >= _ESCAPE:
            # rare: only these are divided
            long = np.flatnonzero(high >= _ESCAPE)
            self.high[long] = high[long] % _ESCAPE
            self.high = np.insert(self.high, np.repeat(long, high[long] // _ESCAPE), np.uint8(_ESCAPE))

    def pack(self) -> bytes:
        """A section for :func:`unpack_gaps`."""
        if not self.high.size:
            return b""
        packed = self._in_bytes()
        return min(packed, self._in_unary(), key=len) if len(packed) < _FEW else packed

    def pack_delimited(self) -> bytes:
        """The same for a place where nothing says how long it is, for :func:`read_gaps`."""
        if not self.high.size:
            return b""
        packed = self._in_bytes()
        measured = b"\0" + varint(len(packed)) + packed
        return min(measured, pack_golomb(self.gaps), key=len) if len(packed) < _FEW else measured

    def _in_bytes(self) -> bytes:
        return bytes([self.shift]) + self.low + deflate(self.high.data)

    def _in_unary(self) -> bytes:
        """The whole coding with the gaps' high parts in unary, at the shift where that is shortest."""
        # one bit more of shift costs a bit per gap and halves the rest; the best is near log2 of the mean gap
        count = len(self.gaps)
        sizes = {
            shift: shift * -(-count // 8) + -(-(count + int((self.gaps >> shift).sum(dtype=np.int64))) // 8)
            for shift in range(self.shift + 7)
        }
        shift = min(sizes, key=lambda shift: sizes[shift])
        ones = np.cumsum((self.gaps >> shift) + 1, dtype=np.int64) - 1
        bits = np.zeros(int(ones[-1]) + 1, np.bool_)
        bits[ones] = True
        return bytes([shift | _UNARY]) + _bit_planes(self.gaps, shift) + np.packbits(bits).tobytes()


def _bit_planes(gaps: NDArray[np.int32], count: int) -> bytes:
    return b"".join(np.packbits((gaps >> bit & 1).astype(np.bool_)).tobytes() for bit in range(count))
