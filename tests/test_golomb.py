import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_fedsparse.bounded_reading import PayloadError, Reader
from lightning_fedsparse.gaps import Gaps, read_gaps
from lightning_fedsparse.golomb import pack_golomb


def reader_of(data):
    return Reader(memoryview(data))


def by_hand(numbers, divisor):
    """The bits, number by number; in another order, so that only their count can be compared."""
    bits = 0
    width = math.ceil(math.log2(divisor))
    for number in numbers:
        quotient, rest = divmod(number, divisor)
        bits += quotient + 1
        bits += max(0, width - 1) if rest < 2**width - divisor else width
    return 1 + -(-bits // 8)


def test_by_eye():
    # divisor 3: 0 is short and has head 0; 1 and 2 have head 1 and tails 0 and 1. Gaps 0, 1, 5 = 1 * 3 + 2
    section = bytes([3, 0b011_01_1_1_0, 0b1_0000000])
    reader = reader_of(section + b"next")
    assert read_gaps(reader, 3, 10, "'w'").tolist() == [0, 2, 8]
    assert reader.left == 4


@settings(deadline=None)
@given(st.lists(st.integers(0, 300), min_size=1, max_size=60))
def test_the_divisor_is_nearly_the_best(numbers):
    section = pack_golomb(np.array(numbers, np.int32))
    assert len(section) <= 1.06 * min(by_hand(numbers, divisor) for divisor in range(1, 300)) + 2


@settings(deadline=None)
@given(st.sets(st.integers(0, 3000)), st.integers(0, 1_000_000), st.binary(max_size=3))
def test_delimited_gaps_round_trip_and_end_where_they_end(members, room, behind):
    ascending = np.array(sorted(members), np.int64)
    universe = max(members, default=0) + 1 + room
    reader = reader_of(Gaps(ascending, universe).pack_delimited() + behind)
    assert read_gaps(reader, len(members), universe, "'w'").tolist() == ascending.tolist()
    assert reader.left == len(behind)


def test_random_gaps_come_within_a_percent_of_their_entropy():
    generator = np.random.default_rng(0)
    for density in (0.01, 0.03, 0.1, 0.2):
        mask = generator.random(48_000) < density
        entropy = -(density * math.log2(density) + (1 - density) * math.log2(1 - density)) * 6000
        section = Gaps(np.flatnonzero(mask), mask.size).pack_delimited()
        assert len(section) < 1.01 * entropy * mask.mean() / density + 12


def test_many_gaps_are_under_huffman_codes():
    members = np.flatnonzero(np.random.default_rng(0).random(2_000_000) < 0.05)
    section = Gaps(members, 2_000_000).pack_delimited()
    assert section[0] == 0
    assert read_gaps(reader_of(section), len(members), 2_000_000, "'w'").tolist() == members.tolist()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (b"", "the divisor of the gaps of 'w' needs 1 bytes but 0 are left"),
        (b"\x0b\0", "the divisor of the gaps of 'w' is 11, more than the limit of 10"),
        (b"\3", "the positions of 'w' have 0 bits, too few for 3 gaps"),
        (b"\3" + bytes(8), "the positions of 'w' hold 0 gaps, not 3"),
        (b"\1\xa0", "the positions of 'w' hold 2 gaps, not 3"),
        (b"\3\xe0", "the positions of 'w' hold 0 gaps, not 3"),
        (b"\2\xe0", "the positions of 'w' hold 0 gaps, not 3"),
        (bytes([3, 0b011_01_1_1_0, 0b1_0000001]), "the gaps of 'w' do not end with the last"),
        (b"\1\x00\x0e", "reach beyond its 10 entries"),
        (bytes([5, 0b111_111_11, 0b1_111_0000]), "the positions of 'w' reach 14 in a tensor of 10 entries"),
        (b"\0\5\0", "the bytes of the positions of 'w' is 5, more than the limit of 2"),
    ],
)
def test_bad_sections(section, message):
    with pytest.raises(PayloadError, match=message):
        read_gaps(reader_of(section), 3, 10, "'w'")
