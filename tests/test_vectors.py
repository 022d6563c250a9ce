"""Payloads whose meaning is written down, and a second decoder that agrees with the first about every payload."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_fedsparse.bounded_reading import Reader
from lightning_fedsparse.container import DTYPES, PositionCoding, ValueCoding, read_container
from lightning_fedsparse.frame import read_frame
from lightning_fedsparse.payload import Limits, MaskSet, PayloadError, Schema, decode, encode, payload_sizes
from lightning_fedsparse.schema import TensorSpec
from tests import minimal_decoder
from tests.payload_examples import EDITS, SEEDS, edited, framed, header_of, updates
from tests.test_schema_payload import COMPACT_SEEDS, content_of, framed_by_schema
from tests.vectors.describing import described, described_masks, described_schema
from tests.vectors.make import schema_of

FOLDER = Path(__file__).parent / "vectors"
VECTORS = [
    (folder.name, name, entry)
    for folder in sorted(FOLDER.glob("v*"))
    for name, entry in json.loads((folder / "vectors.json").read_text(encoding="utf-8")).items()
]


def plain_reference(masks):
    """A mask set as the minimal decoder takes it."""
    described = described_masks(masks)
    return {"id": masks.id, "shapes": described["shapes"], "masks": bits_of(described["masks"])}


def bits_of(masks):
    return {name: None if mask is None else [int(bit) for bit in mask] for name, mask in masks.items()}


def described_minimally(found):
    """What the minimal decoder found, in the form of the vectors."""
    sizes = {**minimal_decoder.SIZES, "bool": 1, "uint8": 1}

    def tensor(part):
        size = sizes[part["dtype"]]
        row = {**part, "bits": "".join(word.to_bytes(size, "big").hex() for word in part["bits"])}
        if part.get("mask") is not None:
            row["mask"] = "".join(map(str, part["mask"]))
        return row

    return {
        **found,
        "metrics": {name: value.hex() for name, value in found["metrics"].items()},
        "parameters": {name: tensor(part) for name, part in found["parameters"].items()},
        "buffers": {name: tensor(part) for name, part in found["buffers"].items()},
    }


def masks_of_entry(entry):
    """The reference that a vector leans on."""
    if entry["reference"] is None:
        return None
    shapes = entry["reference"]["shapes"]
    return MaskSet.of(
        {
            name: None if bits is None else torch.tensor(bits, dtype=torch.bool).reshape(shapes[name])
            for name, bits in bits_of(entry["reference"]["masks"]).items()
        }
    )


def schema_of_entry(entry):
    """The schema that a vector is of; None where it describes its tensors itself."""
    if "schema" not in entry:
        return None
    specs = (
        tuple(TensorSpec(name, tuple(shape), getattr(torch, dtype)) for name, dtype, shape in entry["schema"][part])
        for part in ("parameters", "buffers")
    )
    return Schema(*specs)


@pytest.mark.parametrize(
    ("version", "name", "entry"), VECTORS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_vectors_mean_what_they_meant(version, name, entry):
    data = (FOLDER / version / f"{name}.bin").read_bytes()
    reference = masks_of_entry(entry)
    plain = None if reference is None else {**entry["reference"], "masks": bits_of(entry["reference"]["masks"])}
    assert reference is None or reference.id == plain["id"]
    schema = schema_of_entry(entry)
    assert described(decode(data, reference=reference, schema=schema)) == entry["update"]
    assert described_minimally(minimal_decoder.decode(data, plain, entry.get("schema"))) == entry["update"]


def test_vectors_cover_every_coding_of_version_1():
    positions, values, dtypes, within = set(), set(), set(), set()
    for version, name, _ in VECTORS:
        if version != "v1":
            continue
        _, reader = read_frame((FOLDER / version / f"{name}.bin").read_bytes(), Limits())
        header = read_container(reader, Limits())
        for record in header.parameters + header.buffers:
            positions.add((record.positions, header.named))
            values.add(record.values)
            dtypes.add(record.dtype)
            where, what = reader.take(record.position_bytes, ""), Reader(reader.take(record.value_bytes, ""))
            if record.positions == PositionCoding.GAPS and len(where):
                within.add(("unary" if where[0] > 127 else "bytes", where[0] & 127 > 0))
            if record.values in (ValueCoding.INT8, ValueCoding.INT4):
                block = what.varint("", 2**62) or max(1, record.count)
                what.take(4 * -(-record.count // block), "")
                within.add((record.values, what.byte("")))
    assert {coding for coding, _ in positions} == set(PositionCoding)
    assert {(PositionCoding.CHANGES, named) for named in (True, False)} <= positions
    assert values == set(ValueCoding)
    assert dtypes == set(DTYPES)
    assert {("bytes", False), ("bytes", True), ("unary", True)} <= within
    assert {(coding, packed) for coding in (ValueCoding.INT8, ValueCoding.INT4) for packed in (0, 1)} <= within


def test_vectors_cover_every_coding_of_version_2():
    codings, within = set(), set()
    for version, name, entry in VECTORS:
        if version == "v2":
            update = entry["update"]
            within |= {update["kind"], update["absent"], bool(update["metrics"]), entry["reference"] is not None}
            data = (FOLDER / version / f"{name}.bin").read_bytes()
            sizes = payload_sizes(data, schema=schema_of_entry(entry), reference=masks_of_entry(entry))
            codings |= sizes.codings.keys()
    assert codings == {coding.name.lower() for coding in PositionCoding}
    assert within == {"weights", "delta", "unchanged", "zero", "unheld", True, False}


@settings(deadline=None, max_examples=100)
@given(updates(), st.sampled_from(["float32", "bfloat16", "float16", "int8", "int4"]), st.sampled_from([None, 5]))
def test_both_decoders_agree_on_what_is_encoded(update, values, block):
    reference = MaskSet.of(update.masks)
    for schema in (None, schema_of(update)):
        for held in (None, reference):
            data = encode(update, reference=held, schema=schema, values=values, block=block, seed=0)
            assert both_read_or_refuse(data, held, schema) is not None or values != "float32"


def both_read_or_refuse(data, reference, schema=None):
    """Decode by both and compare; None if both refuse."""
    limits = Limits(max_bytes=10**6, max_elements=10**5)
    try:
        found = described(decode(data, reference=reference, schema=schema, limits=limits))
    except PayloadError as error:
        found = None
        # the minimal decoder has no limits of its own
        if "limit" in str(error) or "elements" in str(error):
            return None
    try:
        plain = None if reference is None else plain_reference(reference)
        other = described_minimally(minimal_decoder.decode(data, plain, schema and described_schema(schema)))
    except minimal_decoder.RefusedError:
        other = None
    assert found == other
    return found


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(range(len(SEEDS))), st.sampled_from(["header", "sections"]), EDITS)
def test_both_decoders_agree_on_what_is_hostile(seed, part, edits):
    data, reference = SEEDS[seed]
    header, sections = header_of(data)
    both_read_or_refuse(
        framed(edited(header, edits), sections) if part == "header" else framed(header, edited(sections, edits)),
        reference,
    )


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(range(len(COMPACT_SEEDS))), EDITS)
def test_both_decoders_agree_on_what_is_hostile_by_a_schema(seed, edits):
    data, reference, schema = COMPACT_SEEDS[seed]
    both_read_or_refuse(framed_by_schema(edited(content_of(data), edits)), reference, schema)
