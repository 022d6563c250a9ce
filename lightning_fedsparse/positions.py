"""Kept positions of one tensor <-> bytes, near the entropy of the mask.

``n*H(d)/8`` bytes, ``H`` the binary entropy of the density ``d``, is what an unstructured mask of ``n`` entries needs.
Three codings stay within a few percent of it, each at its own densities: a bitmap (near 1/2), a bitmap under Huffman
codes, and Huffman-coded gaps between the positions of the rarer kind, kept or dropped (sparse or nearly full masks).
Against a mask that the receiver holds, the changes alone travel, or nothing. Which coding a tensor takes is decided by
size, and the size is measured: by coding small masks every way, and from histograms of what would be coded for large
ones, where candidates that come out close are all coded.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from lightning_fedsparse.bounded_reading import PayloadError, Reader, deflate, inflate, varint
from lightning_fedsparse.container import PositionCoding
from lightning_fedsparse.update import MaskSet

__all__ = ["decode_positions", "encode_positions", "pack_gaps", "unpack_gaps"]

Bits = NDArray[np.bool_]
Positions = NDArray[np.int64]

_ESCAPE = 255
_UNARY = 0x80  # beside the shift, which is below 32
_MOST_UNARY = 65_536  # bytes up to which a table of codes can cost more than Huffman codes save over unary
_SMALL = 32_768  # entries up to which every coding is tried: cheaper than estimating
_CLOSE = 1.02  # estimates are good to about a percent each
_PARTS = 16
_BLOCK = 32_767  # symbols that zlib puts under one set of Huffman codes at memory level 9


def encode_positions(masks: MaskSet, name: str, *, reference: MaskSet | None) -> tuple[PositionCoding, bytes]:
    """Code one mask in the smallest way.

    Args:
        masks: The masks of the update; ``name`` must have one.
        name: The tensor.
        reference: Masks that the receiver holds, where ``name`` has one of the same shape; else None.
    """
    mask = _bits(masks, name)
    count = int(np.count_nonzero(mask))
    bitmap = np.packbits(mask)
    candidates: list[tuple[PositionCoding, float, Callable[[], bytes]]] = [
        (PositionCoding.BITMAP, float(bitmap.size), bitmap.tobytes)
    ]

    def offer(coding: PositionCoding, symbols: NDArray[np.uint8], apart: int, pack: Callable[[], bytes]) -> None:
        candidates.append((coding, 0.0 if mask.size <= _SMALL else apart + _huffman_bytes(symbols), pack))

    offer(PositionCoding.PACKED_BITMAP, bitmap, 0, lambda: deflate(bitmap.data))
    members = _kept(masks, name) if 2 * count <= mask.size else np.flatnonzero(~mask)
    gaps = _Gaps(members, mask.size)
    offer(PositionCoding.GAPS, gaps.high, len(gaps.low), gaps.pack)
    if reference is not None:
        changes = _Changes(mask, _kept(masks, name), _bits(reference, name), _kept(reference, name))
        high = np.concatenate([changes.dropped.high, changes.added.high])
        offer(PositionCoding.CHANGES, high, len(changes.dropped.low) + len(changes.added.low), changes.pack)

    smallest = min(size for _, size, _ in candidates)
    coded = [(coding, pack()) for coding, size, pack in candidates if mask.size <= _SMALL or size <= smallest * _CLOSE]
    return min(coded, key=lambda candidate: len(candidate[1]))


def decode_positions(
    coding: PositionCoding, section: memoryview, *, size: int, count: int, reference: MaskSet | None, name: str
) -> tuple[Bits, Positions | None]:
    """Read what :func:`encode_positions` wrote.

    Args:
        coding: How ``section`` is coded; neither DENSE nor KNOWN.
        section: The coded bytes.
        size: Entries of the mask.
        count: Kept entries that the header declares.
        reference: The receiver's masks, which ``CHANGES`` leans on: ``name`` must have one of ``size`` entries.
        name: The tensor.

    Returns:
        The mask, flat, and its ascending positions where they came for free, else None.

    Raises:
        PayloadError: If the section is not ``count`` positions of a mask of ``size`` entries.
    """
    what = repr(name)
    kept: Positions | None = None
    if coding == PositionCoding.GAPS:
        if 2 * count <= size:
            kept = unpack_gaps(section, count, size, what)
            mask = np.zeros(size, np.bool_)
            mask[kept] = True
        else:
            mask = np.ones(size, np.bool_)
            mask[unpack_gaps(section, size - count, size, what)] = False
    elif coding == PositionCoding.CHANGES:
        assert reference is not None  # the caller has one or refuses the payload
        mask = _apply_changes(Reader(section), _bits(reference, name), _kept(reference, name), count, what)
    else:
        packed = bytes(section)
        if coding == PositionCoding.PACKED_BITMAP:
            packed = inflate(section, (size + 7) // 8, f"the bitmap of {what}")
        mask = _unpack_bitmap(packed, size, what)
    found = int(np.count_nonzero(mask))
    if found != count:
        raise PayloadError(f"the positions of {what} keep {found} entries but the header declares {count}")
    return mask, kept


def pack_gaps(members: Positions, universe: int) -> bytes:
    """Code ascending numbers below ``universe``: how far apart they are, in bytes under Huffman codes.

    A gap is the count of numbers skipped. Its low ``k`` bits travel as bit planes (they are noise), the rest as a byte,
    or as so many bytes 255 and a last one below 255. ``k`` comes first and leaves most gaps one byte. Where there are
    too few gaps to pay for a table of codes, the rest travels in unary instead: so many zeros and a one.

    >>> unpack_gaps(memoryview(pack_gaps(np.array([0, 1, 300]), 1000)), 3, 1000, "x").tolist()
    [0, 1, 300]
    """
    return _Gaps(members, universe).pack()


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


class _Gaps:
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
        if not self.high.size:
            return b""
        packed = bytes([self.shift]) + self.low + deflate(self.high.data)
        unary = self._in_unary() if len(packed) < _MOST_UNARY else packed
        return min(packed, unary, key=len)

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


class _Changes:
    """What leads from one mask to another: ranks of dropped entries among the kept ones, positions of added ones."""

    def __init__(self, mask: Bits, kept: Positions, reference: Bits, before: Positions) -> None:
        dropped = np.flatnonzero(~mask[before])
        added = kept[~reference[kept]]
        self.dropped_count = dropped.size
        self.dropped = _Gaps(dropped, before.size)
        self.added = _Gaps(added, mask.size)

    def pack(self) -> bytes:
        dropped = self.dropped.pack()
        return varint(self.dropped_count) + varint(len(dropped)) + dropped + self.added.pack()


def _apply_changes(reader: Reader, reference: Bits, before: Positions, count: int, what: str) -> Bits:
    dropped_count = reader.varint(f"the number of positions that {what} drops", before.size)
    section = reader.take(reader.varint(f"the bytes of what {what} drops", reader.left), what)
    dropped = unpack_gaps(section, dropped_count, before.size, what)
    added_count = count - (before.size - dropped_count)
    if not 0 <= added_count <= reference.size - before.size:
        raise PayloadError(f"{what} keeps {count} entries by adding {added_count} to its reference: no such change")
    added = unpack_gaps(reader.take(reader.left, what), added_count, reference.size, what)
    if reference[added].any():
        raise PayloadError(f"{what} adds a position that its reference mask keeps already")
    mask = reference.copy()
    mask[before[dropped]] = False
    mask[added] = True
    return mask


def _unpack_bitmap(packed: bytes, size: int, what: str) -> Bits:
    if len(packed) != (size + 7) // 8:
        raise PayloadError(f"the bitmap of {what} has {len(packed)} bytes, not the {(size + 7) // 8} of {size} entries")
    if size % 8 and packed[-1] & (0xFF >> size % 8):
        raise PayloadError(f"the bitmap of {what} keeps positions beyond its {size} entries")
    return np.unpackbits(np.frombuffer(packed, np.uint8), count=size).view(np.bool_)


def _huffman_bytes(symbols: NDArray[np.uint8]) -> float:
    """About what Huffman codes make of bytes: their entropy, but at least one bit for a symbol however frequent."""
    blocks = -(-symbols.size // _BLOCK)
    bits = 0.0
    # zlib makes codes block by block, so masks that change along the way are estimated part by part
    for part in np.array_split(symbols, max(1, min(blocks, _PARTS))):
        counts = np.sort(np.bincount(part, minlength=256))[::-1]
        counts = counts[counts > 0]
        entropy = 0.0
        while counts.size > 1 and 2 * counts[0] > counts.sum():
            entropy += float(counts.sum())
            counts = counts[1:]
        if counts.size > 1:
            entropy += float((counts * np.log2(counts.sum() / counts)).sum())
        # each block begins with its code lengths
        bits += max(entropy, part.size) + max(1, part.size / _BLOCK) * (100 + 4.0 * counts.size)
    return bits / 8


def _bits(masks: MaskSet, name: str) -> Bits:
    mask = masks[name]
    assert mask is not None  # dense tensors have no positions to code
    bits: Bits = mask.detach().reshape(-1).cpu().numpy()
    return bits


def _kept(masks: MaskSet, name: str) -> Positions:
    positions: Positions = masks.positions(name).cpu().numpy()
    return positions
