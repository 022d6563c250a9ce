"""Payloads that were damaged, by chance or on purpose: whatever arrives is an update or a PayloadError."""

import struct
import zlib

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lightning_fedsparse.payload import Limits, PayloadError, decode, encode
from tests.payload_examples import EDITS, SEEDS, assert_same, edited, framed, header_of


def decodes_or_refuses(data, reference):
    try:
        update = decode(data, reference=reference, limits=Limits(max_bytes=10**6, max_elements=10**6))
    except PayloadError:
        return
    assert update.values.keys() == update.masks.keys()
    for name, mask in update.masks.items():
        assert mask is None or update.values[name].numel() == mask.sum()
        assert not update.values[name].is_floating_point() or update.values[name].isfinite().all()
    again = encode(update, reference=reference)
    assert_same(decode(again, reference=reference), update)


@settings(deadline=None, max_examples=400)
@given(st.sampled_from(range(len(SEEDS))), st.sampled_from(["bytes", "header", "sections", "raw"]), EDITS)
@example(0, "bytes", [("flip", 0.99, 0)])
def test_fuzzed_payloads(seed, part, edits):
    data, reference = SEEDS[seed]
    header, sections = header_of(data)
    if part == "raw":
        data = edited(data, edits)
    elif part == "bytes":
        data = edited(data[:-4], edits)
        data += struct.pack("<I", zlib.crc32(data))
    elif part == "header":
        data = framed(edited(header, edits), sections)
    else:
        data = framed(header, edited(sections, edits))
    decodes_or_refuses(data, reference)


@settings(deadline=None)
@given(st.binary(max_size=60), st.binary(max_size=60))
def test_random_bytes(header, sections):
    decodes_or_refuses(header, None)
    decodes_or_refuses(framed(header, sections), None)


@given(st.sampled_from(range(len(SEEDS))), st.floats(0, 1, exclude_max=True))
def test_every_truncation_and_every_flipped_bit_is_noticed(seed, where):
    data, reference = SEEDS[seed]
    at = int(where * len(data))
    flipped = data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :]
    for damaged in (data[:at], flipped, data + b"\0"):
        with pytest.raises(PayloadError):
            decode(damaged, reference=reference)
