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
import torch
from numpy.typing import NDArray

from lightning_fedsparse.bounded_reading import PayloadError, Reader, deflate, inflate, varint
from lightning_fedsparse.container import PositionCoding
from lightning_fedsparse.gaps import Gaps, read_gaps, unpack_gaps
from lightning_fedsparse.update import MaskSet

__all__ = ["decode_positions", "encode_mask", "encode_positions", "read_positions"]

Bits = NDArray[np.bool_]
Positions = NDArray[np.int64]

_SMALL = 32_768  # entries up to which every coding is tried: cheaper than estimating
_CLOSE = 1.02  # estimates are good to about a percent each
_PARTS = 16
_BLOCK = 32_767  # symbols that zlib puts under one set of Huffman codes at memory level 9


def encode_mask(
    masks: MaskSet, name: str, *, reference: MaskSet | None, held: bool, delimited: bool = False
) -> tuple[PositionCoding, bytes, int | None]:
    """Code what one tensor's mask is for a receiver, or say that it knows.

    Args:
        masks: The masks of the update.
        name: The tensor.
        reference: Masks that the receiver holds.
        held: Whether ``masks`` are known to be those of the reference.
        delimited: As in :func:`encode_positions`.

    Returns:
        The coding, its section, and how many values the mask keeps; None if there is no mask.
    """
    mask = masks[name]
    if mask is None:
        return PositionCoding.DENSE, b"", None
    theirs = None if reference is None else reference.get(name)
    if theirs is None or theirs.shape != mask.shape:
        reference = None
    if (
        reference is not None
        and theirs is not None
        and (held or mask is theirs or torch.equal(mask.cpu(), theirs.cpu()))
    ):
        return PositionCoding.KNOWN, b"", reference.positions(name).numel()
    coding, section = encode_positions(masks, name, reference=reference, delimited=delimited)
    return coding, section, int(np.count_nonzero(_bits(masks, name)))


def encode_positions(
    masks: MaskSet, name: str, *, reference: MaskSet | None, delimited: bool = False
) -> tuple[PositionCoding, bytes]:
    """Code one mask in the smallest way.

    Args:
        masks: The masks of the update; ``name`` must have one.
        name: The tensor.
        reference: Masks that the receiver holds, where ``name`` has one of the same shape; else None.
        delimited: Have the section say itself where it ends, for :func:`read_positions`; else its length must be known.
    """
    mask = _bits(masks, name)
    count = int(np.count_nonzero(mask))
    bitmap = np.packbits(mask)
    candidates: list[tuple[PositionCoding, float, Callable[[], bytes]]] = [
        (PositionCoding.BITMAP, float(bitmap.size), bitmap.tobytes)
    ]

    def offer(coding: PositionCoding, symbols: NDArray[np.uint8], apart: int, pack: Callable[[], bytes]) -> None:
        candidates.append((coding, 0.0 if mask.size <= _SMALL else apart + _huffman_bytes(symbols), pack))

    def packed_bitmap() -> bytes:
        packed = deflate(bitmap.data)
        return varint(len(packed)) + packed if delimited else packed

    offer(PositionCoding.PACKED_BITMAP, bitmap, 0, packed_bitmap)
    members = _kept(masks, name) if 2 * count <= mask.size else np.flatnonzero(~mask)
    gaps = Gaps(members, mask.size)
    offer(PositionCoding.GAPS, gaps.high, len(gaps.low), gaps.pack_delimited if delimited else gaps.pack)
    if reference is not None:
        changes = _Changes(mask, _kept(masks, name), _bits(reference, name), _kept(reference, name))
        high = np.concatenate([changes.dropped.high, changes.added.high])
        low = len(changes.dropped.low) + len(changes.added.low)
        offer(PositionCoding.CHANGES, high, low, changes.pack_delimited if delimited else changes.pack)

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
    if coding == PositionCoding.GAPS:
        return _from_gaps(unpack_gaps(section, min(count, size - count), size, what), size, count)
    if coding == PositionCoding.CHANGES:
        assert reference is not None  # the caller has one or refuses the payload
        reader, before = Reader(section), _kept(reference, name)
        dropped_count = reader.varint(f"the number of positions that {what} drops", before.size)
        part = reader.take(reader.varint(f"the bytes of what {what} drops", reader.left), what)
        dropped = unpack_gaps(part, dropped_count, before.size, what)
        added_count = _added_count(before, dropped_count, size, count, what)
        added = unpack_gaps(reader.take(reader.left, what), added_count, size, what)
        return _change(_bits(reference, name), before, dropped, added, what), None
    packed = (
        inflate(section, (size + 7) // 8, f"the bitmap of {what}")
        if coding == PositionCoding.PACKED_BITMAP
        else section
    )
    return _unpack_bitmap(bytes(packed), size, count, what), None


def read_positions(
    coding: PositionCoding, reader: Reader, *, size: int, count: int, reference: MaskSet | None, name: str
) -> tuple[Bits, Positions | None]:
    """Read what :func:`encode_positions` wrote with ``delimited``, and leave the reader behind it.

    Arguments, results and errors are those of :func:`decode_positions`.
    """
    what = repr(name)
    if coding == PositionCoding.GAPS:
        return _from_gaps(read_gaps(reader, min(count, size - count), size, what), size, count)
    if coding == PositionCoding.CHANGES:
        assert reference is not None  # the caller has one or refuses the payload
        before = _kept(reference, name)
        dropped_count = reader.varint(f"the number of positions that {what} drops", before.size)
        dropped = read_gaps(reader, dropped_count, before.size, what)
        added_count = _added_count(before, dropped_count, size, count, what)
        added = read_gaps(reader, added_count, size, what)
        return _change(_bits(reference, name), before, dropped, added, what), None
    length = (size + 7) // 8
    if coding == PositionCoding.PACKED_BITMAP:
        packed = reader.take(reader.varint(f"the bytes of the bitmap of {what}", reader.left), what)
        return _unpack_bitmap(inflate(packed, length, f"the bitmap of {what}"), size, count, what), None
    return _unpack_bitmap(bytes(reader.take(length, f"the bitmap of {what}")), size, count, what), None


class _Changes:
    """What leads from one mask to another: ranks of dropped entries among the kept ones, positions of added ones."""

    def __init__(self, mask: Bits, kept: Positions, reference: Bits, before: Positions) -> None:
        dropped = np.flatnonzero(~mask[before])
        added = kept[~reference[kept]]
        self.dropped_count = dropped.size
        self.dropped = Gaps(dropped, before.size)
        self.added = Gaps(added, mask.size)

    def pack(self) -> bytes:
        dropped = self.dropped.pack()
        return varint(self.dropped_count) + varint(len(dropped)) + dropped + self.added.pack()

    def pack_delimited(self) -> bytes:
        return varint(self.dropped_count) + self.dropped.pack_delimited() + self.added.pack_delimited()


def _from_gaps(members: Positions, size: int, count: int) -> tuple[Bits, Positions | None]:
    """The mask that keeps the members, or all but them: whichever are the rarer ones."""
    sparse = 2 * count <= size
    mask = np.full(size, not sparse)
    mask[members] = sparse
    return mask, members if sparse else None


def _added_count(before: Positions, dropped_count: int, size: int, count: int, what: str) -> int:
    added_count = count - (before.size - dropped_count)
    if not 0 <= added_count <= size - before.size:
        raise PayloadError(f"{what} keeps {count} entries by adding {added_count} to its reference: no such change")
    return added_count


def _change(reference: Bits, before: Positions, dropped: Positions, added: Positions, what: str) -> Bits:
    if reference[added].any():
        raise PayloadError(f"{what} adds a position that its reference mask keeps already")
    mask = reference.copy()
    mask[before[dropped]] = False
    mask[added] = True
    return mask


def _unpack_bitmap(packed: bytes, size: int, count: int, what: str) -> Bits:
    if len(packed) != (size + 7) // 8:
        raise PayloadError(f"the bitmap of {what} has {len(packed)} bytes, not the {(size + 7) // 8} of {size} entries")
    if size % 8 and packed[-1] & (0xFF >> size % 8):
        raise PayloadError(f"the bitmap of {what} keeps positions beyond its {size} entries")
    mask = np.unpackbits(np.frombuffer(packed, np.uint8), count=size).view(np.bool_)
    found = int(np.count_nonzero(mask))
    if found != count:
        raise PayloadError(f"the positions of {what} keep {found} entries but the header declares {count}")
    return mask


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
