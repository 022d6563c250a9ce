"""Payloads that leave to a schema what their tensors are."""

import re
import struct
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_fedsparse.bounded_reading import deflate, varint
from lightning_fedsparse.payload import Limits, MaskSet, PayloadError, Schema, decode, encode, payload_sizes
from lightning_fedsparse.schema import fingerprint
from lightning_fedsparse.update import SparseUpdate, gather
from lightning_fedsparse.wire import Wire
from tests.payload_examples import EDITS, assert_same, edited, random_update, seed_updates, updates
from tests.vectors.make import schema_of


def framed_by_schema(content):
    """A payload with this content, whatever it says."""
    data = b"\x89FSP\2" + content
    return data + struct.pack("<I", zlib.crc32(data))


def content_of(data):
    return data[5:-4]


# literals


SCHEMA = Schema.of({"w": torch.zeros(5)}, {"steps": torch.tensor(0)})
HELD = MaskSet.of({"w": torch.tensor([True, False, False, True, True])})
VALUES = bytes([0, 0, 0, 0, 0, 0]) + bytes([0, 0, 0x80]) + deflate(bytes([0x7F, 0x80, 0x80]))


def test_by_eye():
    # 1, 2, 3 are 3f800000, 40000000, 40400000; rotated left by one 7f000000, 80000000, 80800000
    values = bytes(6) + bytes([0, 0, 0x80]) + deflate(bytes([0x7F, 0x80, 0x80]))
    update = SparseUpdate({"w": torch.tensor([1.0, 2.0, 3.0])}, dict(HELD), 42)
    # no flags, 42 examples, the schema; 3 bytes of positions: BITMAP is 5, 101 in three bits, then 3 of 5 kept in three
    by_hand = b"\0\x2a" + SCHEMA.fingerprint + b"\3" + bytes([0b101_00000, 0b011_00000, 0b10011_000]) + values
    assert content_of(encode(update, schema=SCHEMA)) == by_hand
    # on the masks that the receiver has: leans, held; there are no positions
    by_hand = b"\6\x2a" + SCHEMA.fingerprint + fingerprint(HELD.id) + values
    assert content_of(encode(update, schema=SCHEMA, reference=HELD)) == by_hand
    assert_same(decode(framed_by_schema(by_hand), schema=SCHEMA, reference=HELD), update)


def test_the_example_of_the_specification():
    page = (Path(__file__).parents[1] / "docs" / "payload_format.md").read_text()
    listing = page.split("```")[3].strip().splitlines()
    data = bytes.fromhex("".join(re.split(" {3,}", line)[0] for line in listing))
    assert_same(decode(data, schema=SCHEMA), SparseUpdate({"w": torch.tensor([1.0, 2.0, 3.0])}, dict(HELD), 42))


def test_an_upload_of_the_loop_by_eye():
    update = SparseUpdate(
        {"w": torch.tensor([1.0, 2.0, 3.0])},
        HELD,
        600,
        buffers={"steps": torch.tensor(7)},
        metrics={"train_loss": 0.25, "x": 1.0},
        mask_id=HELD.id,
    )
    data = encode(update, schema=SCHEMA, reference=HELD)
    assert_same(decode(data, schema=SCHEMA, reference=HELD), update)
    # leans, held, buffers, notes; 600; the mask id is the reference's; two metrics, the first by its code
    notes = b"\1\2\1" + struct.pack("<d", 0.25) + b"\0\1x" + struct.pack("<d", 1.0)
    front = bytes([0b110110]) + varint(600) + SCHEMA.fingerprint + fingerprint(HELD.id) + notes
    values = VALUES[:9] + struct.pack("<q", 7) + VALUES[9:]
    assert content_of(data) == front + values


def test_fingerprints_tell_models_apart():
    specs = ({"a": torch.zeros(2, 3), "b": torch.zeros(4)}, {"c": torch.zeros(1)})
    schema = Schema.of(*specs)
    assert schema.fingerprint == Schema.of(*specs).fingerprint
    others = (
        Schema.of({"b": torch.zeros(4), "a": torch.zeros(2, 3)}, specs[1]),
        Schema.of({"a": torch.zeros(3, 2), "b": torch.zeros(4)}, specs[1]),
        Schema.of({"a": torch.zeros(2, 3), "b": torch.zeros(4).half()}, specs[1]),
        Schema.of({**specs[0], **specs[1]}, {}),
        Schema.of({"a\4": torch.zeros(2, 3), "b": torch.zeros(4)}, specs[1]),
    )
    assert len({schema.fingerprint, *(other.fingerprint for other in others)}) == 6


def test_a_small_model_takes_twenty_bytes_beside_its_values():
    shapes = {"conv1": (6, 1, 5, 5), "bias1": (6,), "conv2": (16, 6, 5, 5), "bias2": (16,), "fc1": (120, 400)}
    generator = torch.Generator().manual_seed(0)
    weights = {name: 0.05 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    masks = MaskSet.of(
        {n: None if w.ndim == 1 else torch.rand(w.shape, generator=generator) < 0.05 for n, w in weights.items()}
    )
    update = SparseUpdate(gather(weights, masks), masks, 600)
    schema = Schema.of(weights, {})
    sizes = payload_sizes(encode(update, schema=schema, reference=masks), schema=schema, reference=masks)
    assert (sizes.positions, sizes.header, sizes.codings) == (0, 20, {"dense": 2, "known": 3})
    full = payload_sizes(encode(update, schema=schema), schema=schema)
    described = payload_sizes(encode(update))
    assert full.total == full.positions + full.values + full.header
    # beside frame, front and length of the positions: 3 bits for each tensor, 8 + 12 + 16 for counts
    assert full.header == 9 + 7 + 4 + 2 + 2 + 5
    assert full.positions <= described.positions
    assert full.values <= described.values


# properties


@settings(deadline=None, max_examples=150)
@given(updates(), st.sampled_from(["none", "own", "other"]))
def test_decoding_undoes_encoding(update, leaning):
    schema, reference = schema_of(update), None
    if leaning == "own":
        reference = MaskSet.of(update.masks)
    elif leaning == "other":
        generator = torch.Generator().manual_seed(0)
        reference = MaskSet.of(
            {
                name: None if mask is None else mask & (torch.rand(mask.shape, generator=generator) < 0.9)
                for name, mask in update.masks.items()
            }
        )
    data = encode(update, schema=schema, reference=reference)
    found = decode(data, schema=schema, reference=reference)
    assert_same(found, update)
    assert payload_sizes(data, schema=schema, reference=reference).total == len(data)
    if leaning == "own":
        assert found.masks is reference


@pytest.mark.parametrize("values", ["bfloat16", "float16", "int8", "int4"])
@pytest.mark.parametrize("block", [None, 7])
def test_rounded_values_are_those_of_the_other_form(values, block):
    generator = torch.Generator().manual_seed(0)
    weights = {
        "a": torch.randn(30, 40, generator=generator),
        "b": torch.randn(5, generator=generator).double(),
        "c": torch.randn(9, generator=generator).half(),
        "n": torch.arange(3),
        "o": torch.empty(0),
    }
    masks = MaskSet.of({**dict.fromkeys(weights), "a": torch.rand(30, 40, generator=generator) < 0.3})
    update = SparseUpdate(gather(weights, masks), masks, buffers={"m": torch.randn(4, generator=generator)})
    schema = schema_of(update)
    by_schema = encode(update, schema=schema, values=values, block=block, seed=1)
    described = encode(update, values=values, block=block, seed=1)
    assert len(by_schema) < len(described)
    assert_same(decode(by_schema, schema=schema), decode(described))


def test_large_and_small_tensors_in_one_stream():
    scales = (1.0, 1e-9, 1e-9, 1e9, 1.0)
    generator = torch.Generator().manual_seed(0)
    sizes = (40_000, 5000, 50_000, 5000, 70)
    weights = {
        f"w{i}": scale * torch.randn(size, generator=generator)
        for i, (size, scale) in enumerate(zip(sizes, scales, strict=True))
    }
    update = SparseUpdate(weights, dict.fromkeys(weights))
    data = encode(update, schema=schema_of(update))
    assert_same(decode(data, schema=schema_of(update)), update)
    assert payload_sizes(data, schema=schema_of(update)).values <= payload_sizes(encode(update)).values + 100


# errors when encoding


@pytest.mark.parametrize(
    ("update", "message"),
    [
        (SparseUpdate({}, {}), "expected the 1 parameters of the schema, got 0"),
        (SparseUpdate({"v": torch.zeros(5)}, {"v": None}), r"'w' of shape \(5,\) and torch.float32, got 'v' of shape"),
        (SparseUpdate({"w": torch.zeros(4)}, {"w": None}), r"got 'w' of shape \(4,\) and torch.float32"),
        (SparseUpdate({"w": torch.zeros(5).half()}, {"w": None}), "got 'w' of shape .* and torch.float16"),
        (
            SparseUpdate({"w": torch.zeros(5)}, {"w": None}, buffers={"steps": torch.zeros(1)}),
            "expected the buffers of the schema in its order, 'steps' of shape",
        ),
        (SparseUpdate({"w": torch.zeros(2)}, {"w": HELD["w"]}), "expected the 3 kept values of 'w' in one dimension"),
    ],
)
def test_updates_of_another_model(update, message):
    with pytest.raises(ValueError, match=message):
        encode(update, schema=SCHEMA)


def test_a_model_that_payloads_can_not_carry():
    with pytest.raises(ValueError, match="expected 'w' to have a dtype that a payload can carry, got torch.complex64"):
        Schema.of({"w": torch.zeros(2, dtype=torch.cfloat)}, {})
    with pytest.raises(ValueError, match="expected parameters and buffers of different names, got 'w' among both"):
        Schema.of({"w": torch.zeros(2)}, {"w": torch.zeros(2)})
    with pytest.raises(ValueError, match="expected 'w' to have at most 2147483647 elements, got 2147483648"):
        Schema.of({"w": torch.empty(2**31, device="meta")}, {})


# errors when decoding


def test_the_schema_must_be_the_one_that_is_named():
    update = SparseUpdate({"w": torch.ones(5)}, {"w": None})
    data = encode(update, schema=SCHEMA)
    other = Schema.of({"w": torch.zeros(5)}, {})
    ours, theirs = SCHEMA.fingerprint.hex(), other.fingerprint.hex()
    with pytest.raises(PayloadError, match=f"the payload is of the schema {ours} but the receiver holds none"):
        decode(data)
    with pytest.raises(PayloadError, match=f"the payload is of the schema {ours} but the receiver holds {theirs}"):
        decode(data, schema=other)
    with pytest.raises(PayloadError, match=f"the schema {ours} but the receiver holds none"):
        payload_sizes(data)


def test_the_reference_must_be_the_one_that_is_leant_on():
    update = SparseUpdate({"w": torch.ones(3)}, HELD)
    data = encode(update, schema=SCHEMA, reference=HELD)
    other = MaskSet.of({"w": None})
    print_of = fingerprint(HELD.id).hex()
    with pytest.raises(PayloadError, match=f"leans on the masks {print_of} but the receiver holds none"):
        decode(data, schema=SCHEMA)
    with pytest.raises(
        PayloadError, match=f"{print_of} but the receiver holds {fingerprint(other.id).hex()}, which is"
    ):
        decode(data, schema=SCHEMA, reference=other)
    for masks, message in (
        ({"v": HELD["w"]}, "which has other parameters than the schema"),
        ({"w": torch.ones(4, dtype=torch.bool)}, "'w' leans on a mask that its reference does not have"),
    ):
        with pytest.raises(PayloadError, match=message):
            decode(data, schema=SCHEMA, reference=MaskSet(HELD.id, masks))


def test_travelling_masks_must_have_their_id():
    masks = MaskSet("somebody else's", {"w": HELD["w"]})
    declared = fingerprint("somebody else's").hex()
    with pytest.raises(PayloadError, match=f"{fingerprint(HELD.id).hex()} but the payload declares {declared}"):
        decode(encode(SparseUpdate({"w": torch.ones(3)}, masks), schema=SCHEMA), schema=SCHEMA)


def front(flags=0, examples=1, rest=b""):
    return varint(flags) + varint(examples) + SCHEMA.fingerprint + rest


LEANT = fingerprint(HELD.id)
BITMAP = b"\3" + bytes([0b101_00000, 0b011_00000, 0b10011_000])
DENSE = b"\1\0"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the flags needs 1 bytes but 0 are left"),
        (varint(2**11) + front()[1:], "the flags is 2048, more than the limit of 2047"),
        (front(3 << 6), "the meaning of absent has code 3, beyond the last known one, 2"),
        (front(5 << 8), "the type of values has code 5, beyond the last known one, 4"),
        (front(4), "has the masks of its reference but names no reference"),
        (front(2 | 4 | 8, rest=2 * LEANT), "names no reference, or other masks as well"),
        (front(examples=10**13), "num_examples is 10{13}, more than the limit"),
        (front()[:-1], "the schema's fingerprint needs 4 bytes but 3 are left"),
        (front(32, rest=b"\1"), "the mask id is that of a reference but the payload names none"),
        (front(32, rest=varint(3 + 513)), "the length of the mask id is 516, more than the limit of 515"),
        (front(32, rest=b"\4\xff"), "the mask id is not UTF-8"),
        (front(32, rest=b"\0\1\2"), "the code of a metric's name is 2, more than the limit of 1"),
        (front(32, rest=b"\0\2" + 2 * (b"\1" + bytes(8))), "metric 'train_loss' comes twice"),
        (front(rest=b"\5\0"), "the bytes of the positions is 5, more than the limit of 2"),
        (front(rest=b"\0"), "the codings of the positions needs 1 bytes but 0 are left"),
        (front(rest=b"\1\x10"), "the codings of the positions do not end with the last parameter's"),
        (front(rest=b"\1\xc0"), "a position coding has code 6, beyond the last known one, 5"),
        (front(rest=b"\1\x20"), "'w' leans on a mask that its reference does not have"),
        (front(rest=b"\2\xa0\xe0"), "the count of 'w' is 7, more than the limit of 5"),
        (front(rest=b"\2\xa0\x61"), "the counts of the positions do not end with the last parameter's"),
        (front(rest=b"\2\xa0\x60"), "the bitmap of 'w' needs 1 bytes but 0 are left"),
        (front(rest=b"\4" + BITMAP[1:] + b"\0" + VALUES), "the positions have 1 bytes after the last tensor's"),
        (front(rest=BITMAP + VALUES[:5]), "the mantissas of 'w' needs 9 bytes but 5 are left"),
        (front(rest=BITMAP + VALUES[:9]), "the deflate stream of the stream of exponents|does not end"),
        (front(rest=BITMAP + VALUES + b"\0"), "does not end where its section ends"),
        (front(rest=BITMAP + VALUES[:9] + deflate(b"\1\2")), "the payload has 2 exponents for 3 values"),
        (front(rest=BITMAP + VALUES[:9] + deflate(bytes(4))), "expands to more than the 3 bytes"),
        (front(rest=BITMAP + VALUES[:9] + deflate(b"\xff\x80\x80")), "'w' holds values that are not finite, 1 of 3"),
        (front(16, rest=DENSE + bytes(15)), "the values of 'steps' needs 8 bytes but 0 are left"),
        (front(3 << 8, rest=b"\0" + DENSE + struct.pack("<f", -1.0)), "its scales are not all finite and positive"),
        (front(3 << 8, rest=b"\0" + DENSE + struct.pack("<f", 1) + deflate(b"\x80" * 5)), "'w' has a code beyond 127"),
        (front(4 << 8, rest=b"\0" + DENSE + struct.pack("<f", 1) + deflate(b"\x08" * 5)), "'w' has a code beyond 7"),
    ],
)
def test_bad_contents(content, message):
    with pytest.raises(PayloadError, match=message):
        decode(framed_by_schema(content), schema=SCHEMA)


def test_bytes_behind_tensors_that_have_no_exponents():
    schema = Schema.of({"n": torch.tensor(0)}, {})
    data = encode(SparseUpdate({"n": torch.tensor(5)}, {"n": None}), schema=schema)
    assert decode(data, schema=schema).values["n"] == 5
    with pytest.raises(PayloadError, match="the payload has 2 exponents for 0 values"):
        decode(framed_by_schema(content_of(data) + b"\3\0"), schema=schema)


def test_a_stream_that_expands_further_than_it_may_is_not_expanded():
    bomb = deflate(bytes(10**7), match=True)
    with pytest.raises(PayloadError, match="the stream of exponents expands to more than the 3 bytes"):
        decode(framed_by_schema(front(rest=BITMAP + VALUES[:9] + bomb)), schema=SCHEMA)


# fuzzing: whatever arrives is an update or a PayloadError


def _seeds():
    tensors, buffers, masks, seeds = seed_updates()
    schema = Schema.of(tensors, buffers)
    for update in seeds:
        for reference in (None, masks):
            for values in ("float32", "int4"):
                yield encode(update, schema=schema, reference=reference, values=values, seed=0), masks, schema


COMPACT_SEEDS = list(_seeds())


@settings(deadline=None, max_examples=400)
@given(st.sampled_from(range(len(COMPACT_SEEDS))), EDITS)
def test_fuzzed_payloads(seed, edits):
    data, reference, schema = COMPACT_SEEDS[seed]
    spoilt = framed_by_schema(edited(content_of(data), edits))
    try:
        update = decode(spoilt, schema=schema, reference=reference, limits=Limits(max_bytes=10**6))
    except PayloadError:
        return
    assert [update.values[spec.name].dtype for spec in schema.parameters] == [spec.dtype for spec in schema.parameters]
    for spec in schema.parameters:
        value, mask = update.values[spec.name], update.masks[spec.name]
        assert tuple(value.shape if mask is None else mask.shape) == spec.shape
        assert mask is None or value.numel() == mask.sum()
        assert value.isfinite().all()
    again = encode(update, schema=schema, reference=reference)
    assert_same(decode(again, schema=schema, reference=reference), update)
    assert payload_sizes(spoilt, schema=schema, reference=reference).total == len(spoilt)


@given(st.sampled_from(range(len(COMPACT_SEEDS))), st.floats(0, 1, exclude_max=True))
def test_every_truncation_and_every_flipped_bit_is_noticed(seed, where):
    data, reference, schema = COMPACT_SEEDS[seed]
    at = int(where * len(data))
    flipped = data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :]
    for damaged in (data[:at], flipped, data + b"\0"):
        with pytest.raises(PayloadError):
            decode(damaged, schema=schema, reference=reference)


@settings(deadline=None)
@given(st.binary(max_size=60))
def test_random_bytes(content):
    for data in (framed_by_schema(content), framed_by_schema(front() + content)):
        try:
            decode(data, schema=SCHEMA, reference=HELD)
        except PayloadError:
            continue


def test_a_payload_that_describes_itself_needs_no_schema_and_minds_none():
    update = random_update([300], 0.5)
    assert_same(decode(encode(update), schema=SCHEMA), update)


def test_a_receiver_is_ready_for_its_own_model_however_large_and_for_no_more():
    small = {"w": torch.zeros(3), "n": torch.zeros((), dtype=torch.int64)}
    assert Schema.of({"w": small["w"]}, {"n": small["n"]}).limits == Limits.for_tensors(small)
    large = Schema.of({"w": torch.empty(2**20, 2**10, device="meta")}, {})
    assert large.limits.max_elements == 2**30 > Limits().max_elements
    assert large.limits.max_bytes > 2**32
    update = SparseUpdate({"w": torch.zeros(2**20)}, {"w": None})
    with pytest.raises(PayloadError, match="a dimension of 'w' is 1048576, more than the limit of 3"):
        Wire().decode(encode(update), schema=Schema.of({"w": small["w"]}, {}), reference=None)
