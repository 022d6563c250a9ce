import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_fedsparse.bounded_reading import PayloadError, deflate
from lightning_fedsparse.container import PositionCoding
from lightning_fedsparse.gaps import pack_gaps, unpack_gaps
from lightning_fedsparse.positions import decode_positions, encode_positions
from lightning_fedsparse.update import MaskSet

CHANGES, GAPS, PACKED, BITMAP = (PositionCoding(code) for code in (2, 3, 4, 5))


def mask_set(mask):
    return MaskSet.of({"w": torch.as_tensor(mask)})


def random_mask(size, density, seed=0):
    return torch.rand(size, generator=torch.Generator().manual_seed(seed)) < density


def decode(coding, section, size, count, reference=None):
    return decode_positions(coding, memoryview(section), size=size, count=count, reference=reference, name="w")


def entropy_bytes(size, density):
    return size * -(density * math.log2(density) + (1 - density) * math.log2(1 - density)) / 8


# literals


def test_gaps_bytes():
    # skipped before each of 2, 3, 10: 2, 0, 6; in unary 001, 1, 0000001
    assert pack_gaps(np.array([2, 3, 10]), 16) == bytes([0x80, 0b00110000, 0b00100000])
    # 12 and 8 shifted by 3: low bits 0 0, 0 0 and 1 0; what is left is 1 and 1, in unary 01, 01
    section = memoryview(bytes([0x80 | 3, 0, 0, 0b10000000, 0b01010000]))
    assert unpack_gaps(section, 2, 32, "w").tolist() == [12, 21]
    # 300 skipped, then 19 times 0: in bytes that is 255, 45, and zeros, which Huffman codes shorten more
    run = np.array([300, *range(301, 320)])
    assert pack_gaps(run, 400) in (b"\0" + deflate(bytes([255, 45] + [0] * 19)), _unary_by_hand(run))
    many = np.flatnonzero(random_mask(100_000, 0.2).numpy())
    gaps = np.diff(many, prepend=-1) - 1
    assert pack_gaps(many, 100_000) == b"\0" + deflate(gaps.astype(np.uint8).data)


def _unary_by_hand(members):
    """The shortest unary coding over all shifts, written out bit by bit."""
    gaps = [later - earlier - 1 for earlier, later in zip([-1, *members], members, strict=False)]

    def packed(bits):
        bits += "0" * (-len(bits) % 8)
        return bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8))

    def coded(shift):
        planes = b"".join(packed("".join(str(gap >> bit & 1) for gap in gaps)) for bit in range(shift))
        return bytes([0x80 | shift]) + planes + packed("".join("0" * (gap >> shift) + "1" for gap in gaps))

    return min((coded(shift) for shift in range(20)), key=len)


@pytest.mark.parametrize("members", [[5], [0], [0, 1, 2, 3], [999], [3, 17, 18, 400, 999], list(range(7, 1000, 31))])
def test_short_lists_of_gaps_are_in_the_shortest_unary_coding(members):
    section = pack_gaps(np.array(members), 1000)
    assert len(section) <= len(_unary_by_hand(members))
    assert unpack_gaps(memoryview(section), len(members), 1000, "w").tolist() == members


def test_bitmap_bytes():
    mask = mask_set([True, False, False, True, False, True, True, False, True, False])
    assert encode_positions(mask, "w", reference=None) == (BITMAP, bytes([0b10010110, 0b10000000]))


@pytest.mark.parametrize("keeps", [False, True])
def test_a_mask_that_keeps_nothing_or_everything_has_an_empty_section(keeps):
    for size in (0, 1, 9, 100_000):
        coding, section = encode_positions(mask_set(torch.full((size,), keeps)), "w", reference=None)
        assert section == b""
        mask, _ = decode(coding, section, size, size * keeps)
        assert mask.tolist() == [keeps] * size


# properties


@settings(deadline=None)
@given(st.sets(st.integers(0, 2000)), st.integers(0, 1_000_000))
def test_gaps_round_trip(members, room):
    ascending = np.array(sorted(members), np.int64)
    universe = max(members, default=0) + 1 + room
    section = memoryview(pack_gaps(ascending, universe))
    assert unpack_gaps(section, len(members), universe, "w").tolist() == ascending.tolist()


@settings(deadline=None)
@given(
    st.lists(st.booleans(), max_size=70),
    st.none() | st.lists(st.integers(0, 69), max_size=4),
)
def test_small_masks_round_trip(mask, flips):
    bits = torch.tensor(mask, dtype=torch.bool)
    reference = None
    if flips is not None:
        other = bits.clone()
        other[[flip for flip in flips if flip < len(mask)]] ^= True
        reference = mask_set(other)
    coding, section = encode_positions(mask_set(bits), "w", reference=reference)
    found, positions = decode(coding, section, len(mask), sum(mask), reference)
    assert found.tolist() == mask
    assert positions is None or positions.tolist() == np.flatnonzero(mask).tolist()


@pytest.mark.parametrize("density", [0.0005, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 0.95, 0.999])
def test_random_masks_come_near_their_entropy(density):
    size = 500_000
    mask = random_mask(size, density)
    coding, section = encode_positions(mask_set(mask), "w", reference=None)
    bound = entropy_bytes(size, mask.float().mean().item())
    assert bound <= len(section) <= 1.012 * bound + 150
    found, positions = decode(coding, section, size, int(mask.sum()))
    assert np.array_equal(found, mask.numpy())
    assert positions is None or np.array_equal(positions, np.flatnonzero(mask.numpy()))


@pytest.mark.parametrize("density", [0.03, 0.2, 0.6])
def test_subset_comes_near_its_conditional_entropy(density):
    before = random_mask(500_000, density)
    after = before & random_mask(500_000, 0.96, seed=1)
    reference = mask_set(before)
    coding, section = encode_positions(mask_set(after), "w", reference=reference)
    assert coding == CHANGES
    assert len(section) <= 1.02 * entropy_bytes(int(before.sum()), 0.04) + 150
    found, _ = decode(coding, section, 500_000, int(after.sum()), reference)
    assert np.array_equal(found, after.numpy())


def test_changes_take_additions_and_unrelated_references_are_left_alone():
    mask = random_mask(100_000, 0.1)
    near = mask.clone()
    near[:5000] ^= random_mask(5000, 0.1, seed=1)
    for reference, expected in ((near, CHANGES), (random_mask(100_000, 0.1, seed=2), GAPS)):
        coding, section = encode_positions(mask_set(mask), "w", reference=mask_set(reference))
        assert coding == expected
        found, _ = decode(coding, section, 100_000, int(mask.sum()), mask_set(reference))
        assert np.array_equal(found, mask.numpy())


@pytest.mark.parametrize(
    "mask",
    [
        torch.arange(200_000) % 2 == 0,
        torch.arange(200_000) % 20 == 0,
        torch.arange(200_000) < 50_000,
        (torch.arange(200_000) // 64) % 4 == 0,
        torch.arange(200_000) % 1000 < 30,
        random_mask(200_000, 0.125),
        random_mask(200_000, 0.25),
        random_mask(200_000, 0.4),
        torch.cat([random_mask(100_000, 0.001), random_mask(100_000, 0.6)]),
    ],
)
def test_choice_is_the_smallest_within_a_percent(mask):
    bitmap = np.packbits(mask.numpy())
    members = np.flatnonzero(mask.numpy() == (2 * int(mask.sum()) <= mask.numel()))
    sizes = [bitmap.size, len(deflate(bitmap.data)), len(pack_gaps(members, mask.numel()))]
    _, section = encode_positions(mask_set(mask), "w", reference=None)
    assert len(section) <= 1.01 * min(sizes)


# errors


@pytest.mark.parametrize(
    ("coding", "section", "size", "count", "message"),
    [
        (BITMAP, b"\xf0", 9, 4, "the bitmap of 'w' has 1 bytes, not the 2 of 9 entries"),
        (BITMAP, b"\xf0\x01", 9, 5, "keeps positions beyond its 9 entries"),
        (BITMAP, b"\xf0", 8, 3, "keep 4 entries but the header declares 3"),
        (PACKED, b"\xff", 8, 4, "is not a deflate stream"),
        (PACKED, deflate(b"\xf0\0"), 8, 4, "expands to more than the 1 bytes that it can hold"),
        (PACKED, deflate(b"\xf0") + b"\0", 8, 4, "does not end where its section ends"),
        (PACKED, deflate(b"\xf0" * 9)[:-1], 72, 36, "does not end where its section ends"),
        (GAPS, b"\0", 8, 0, "has no positions but 1 bytes of them"),
        (GAPS, b"", 8, 2, "the positions of 'w' needs 1 bytes but 0 are left"),
        (GAPS, b"\4" + deflate(b"\1\1"), 8, 2, "shifted by 4 bits, too many for 8 entries"),
        (GAPS, b"\xff" + deflate(b"\1\1"), 8, 2, "shifted by 127 bits, too many for 8 entries"),
        (GAPS, b"\x80\x40", 8, 2, "hold 1 gaps, not 2"),
        (GAPS, b"\x80\xe0", 8, 2, "hold 3 gaps, not 2"),
        (GAPS, b"\x80", 8, 2, "hold 0 gaps, not 2"),
        (GAPS, b"\x80\xc0\0", 8, 2, "do not end with the last"),
        (GAPS, b"\x80\x00\x81", 8, 2, "reach beyond its 8 entries|reach 16"),
        (GAPS, b"\x81\x20\xc0", 8, 2, "the bit planes of 'w' do not end with the last gap"),
        (GAPS, b"\0" + deflate(b"\1\1\1"), 8, 2, "expands to more than the 2 bytes that it can hold"),
        (GAPS, b"\0" + deflate(b"\1"), 8, 2, "hold 1 gaps, not 2"),
        (GAPS, b"\0" + deflate(b"\1\1\xff"), 1000, 2, "end within one"),
        (GAPS, b"\0" + deflate(b"\4\3"), 8, 2, "reach 8 in a tensor of 8 entries"),
        (GAPS, b"\1\0" + deflate(b"\2\3"), 8, 2, "reach beyond its 8 entries"),
        (GAPS, b"\1\xc0" + deflate(b"\2\1"), 8, 2, "reach 9 in a tensor of 8 entries"),
        (CHANGES, b"\x05\0", 8, 4, "the number of positions that 'w' drops is 5, more than the limit of 4"),
        (CHANGES, b"\x01\x09", 8, 3, "the bytes of what 'w' drops is 9, more than the limit of 1"),
        (CHANGES, b"\x01\x04\0" + deflate(b"\1"), 8, 8, "keeps 8 entries by adding 5 to its reference"),
        (CHANGES, b"\x00\x00", 8, 3, "keeps 3 entries by adding -1 to its reference"),
        (CHANGES, b"\x00\x00\0" + deflate(b"\3"), 8, 5, "adds a position that its reference mask keeps already"),
        (CHANGES, b"\x00\x00\0" + deflate(b"\x08"), 8, 5, "reach 8 in a tensor of 8 entries"),
    ],
)
def test_bad_sections(coding, section, size, count, message):
    reference = mask_set(torch.arange(8) < 4)
    with pytest.raises(PayloadError, match=message):
        decode(coding, section, size, count, reference)
