"""What the decoder is held to, whatever it is given: one check for the fuzz target and for the tests.

An input is not a payload but what one is made of: a byte that says which masks the receiver holds and how to go on, the
length of a header, the header, and the sections; or the content of a payload by the schema of the receiver's model. So that
mutations reach beyond the checksum and the header's compression, these are put on afterwards; every eighth input is taken as
a payload as it is. Whatever comes of it is refused with ``PayloadError``, or is an update that

- the minimal decoder, which shares no code with the package, reads to the same bits,
- has finite parameters, values as its masks say, and no more elements than the receiver's limits,
- is the same after encoding and decoding once more, and
- passes the check against the receiver's model, or is refused by that.

A payload that only one of the two decoders accepts is a wrong acceptance.
"""

import struct
import zlib
from pathlib import Path

import torch

from lightning_fedsparse.payload import Limits, MaskSet, PayloadError, Schema, check_update, decode, encode
from lightning_fedsparse.update import SparseUpdate, gather
from tests import minimal_decoder
from tests.test_vectors import described_minimally, plain_reference
from tests.vectors.describing import described, described_schema

FRONT = struct.Struct("<4sBII")
LIMITS = Limits(max_bytes=2**17, max_elements=20_000, max_tensors=20, max_header_bytes=4096)
RAW = 7  # of eight: the input is a payload
COMPACT = 6  # of eight: the input is the content of a payload by the schema


def model():
    """Parameters and buffers of the receiver, and two mask sets that it may hold."""
    generator = torch.Generator().manual_seed(0)
    parameters = {"a": torch.randn(20, 30, generator=generator), "b": torch.randn(7, generator=generator).bfloat16()}
    buffers = {"mean": torch.randn(5, generator=generator), "steps": torch.tensor(3)}
    first = MaskSet.of({"a": torch.rand(20, 30, generator=generator) < 0.2, "b": None})
    second = MaskSet.of({"a": torch.rand(20, 30, generator=generator) < 0.6, "b": torch.arange(7) < 3})
    return parameters, buffers, (first, second)


PARAMETERS, BUFFERS, MASKS = model()
SCHEMA = Schema.of(PARAMETERS, BUFFERS)
PLAIN_SCHEMA = described_schema(SCHEMA)
HELD = (None, *MASKS)
PLAIN = (None, *(plain_reference(masks) for masks in MASKS))


def payload_of(data: bytes) -> tuple[bytes, int]:
    """What an input stands for, and which masks the receiver holds."""
    how = data[0] if data else 0
    held = how // 8 % len(HELD)
    if how % 8 == RAW:
        return data[1:], held
    if how % 8 == COMPACT:
        framed = b"\x89FSP\2" + data[1:]
        return framed + struct.pack("<I", zlib.crc32(framed)), held
    (length,) = struct.unpack("<H", data[1:3].ljust(2, b"\0"))
    header, sections = data[3 : 3 + length], data[3 + length :]
    packer = zlib.compressobj(1, zlib.DEFLATED, -15)
    packed = packer.compress(header) + packer.flush()
    framed = FRONT.pack(b"\x89FSP", 1, len(packed), len(header)) + packed + sections
    return framed + struct.pack("<I", zlib.crc32(framed)), held


def input_of(data: bytes, held: int) -> bytes:
    """The input that stands for a payload."""
    if data[4] == 2:
        return bytes([8 * held + COMPACT]) + data[5:-4]
    _, _, packed, _ = FRONT.unpack_from(data)
    header = zlib.decompress(data[FRONT.size : FRONT.size + packed], -15)
    return bytes([8 * held]) + struct.pack("<H", len(header)) + header + data[FRONT.size + packed : -4]


def check(data: bytes) -> bool:
    """Hold one input against everything above; whether it was accepted.

    Raises:
        AssertionError: For a wrong acceptance.
    """
    payload, held = payload_of(data)
    try:
        update = decode(payload, reference=HELD[held], schema=SCHEMA, limits=LIMITS)
    except PayloadError as error:
        # the minimal decoder knows nothing of limits
        if not any(word in str(error) for word in ("limit", "elements", "expands to more")):
            refused_by_the_other(payload, held, str(error))
        return False
    found = described(update)
    assert found == described_minimally(minimal_decoder.decode(payload, PLAIN[held], PLAIN_SCHEMA))
    elements = 0
    for name, value in update.values.items():
        mask = update.masks[name]
        assert mask is None or value.shape == (int(mask.sum()),)
        assert value.isfinite().all()
        elements += value.numel() if mask is None else mask.numel()
    assert elements <= LIMITS.max_elements + sum(
        mask.numel() for masks in MASKS for mask in masks.values() if mask is not None
    )
    again = encode(update, reference=HELD[held])
    assert described(decode(again, reference=HELD[held])) == found
    if payload[4] == 2:
        again = encode(update, reference=HELD[held], schema=SCHEMA)
        assert described(decode(again, reference=HELD[held], schema=SCHEMA)) == found
    try:
        check_update(update, PARAMETERS, buffers=BUFFERS, support=HELD[held])
    except PayloadError:
        return True
    assert update.values.keys() == PARAMETERS.keys()
    return True


def refused_by_the_other(payload: bytes, held: int, reason: str) -> None:
    try:
        minimal_decoder.decode(payload, PLAIN[held], PLAIN_SCHEMA)
    except minimal_decoder.RefusedError:
        return
    raise AssertionError(f"only the minimal decoder accepts what was refused: {reason}")


def seeds():
    """Name -> input: one for every coding, and hostile ones."""
    for number, masks in enumerate(MASKS, start=1):
        update = SparseUpdate(
            gather(PARAMETERS, masks), masks, 5, buffers=BUFFERS, metrics={"loss": 1.0}, mask_id=masks.id
        )
        for held in range(len(HELD)):
            yield f"masks{number}_held{held}", input_of(encode(update, reference=HELD[held]), held)
        for values in ("bfloat16", "float16", "int8", "int4"):
            rounded = encode(update, reference=masks, values=values, seed=number, block=64 if number == 1 else None)
            yield f"masks{number}_{values}", input_of(rounded, number)
        for held in range(len(HELD)):
            by_schema = encode(update, reference=HELD[held], schema=SCHEMA)
            yield f"schema_masks{number}_held{held}", input_of(by_schema, held)
        for values in ("float16", "int8", "int4"):
            by_schema = encode(update, reference=masks, schema=SCHEMA, values=values, seed=number, block=64)
            yield f"schema_masks{number}_{values}", input_of(by_schema, number)
    moved = MASKS[0]["a"].clone().view(-1)
    moved[MASKS[0].positions("a")[::9]] = False
    moved[::97] = True
    near = MaskSet.of({"a": moved.view(20, 30), "b": None})
    yield "changes", input_of(encode(SparseUpdate(gather(PARAMETERS, near), near), reference=MASKS[0]), 1)
    by_schema = encode(SparseUpdate(gather(PARAMETERS, near), near), reference=MASKS[0], schema=SCHEMA)
    yield "schema_changes", input_of(by_schema, 1)
    odd = {"flags": torch.tensor([True, False]), "steps": torch.tensor(3), "mask": torch.tensor([0.0, -torch.inf])}
    yield "buffers", input_of(encode(SparseUpdate(PARAMETERS, dict.fromkeys(PARAMETERS), buffers=odd)), 0)
    dense = SparseUpdate(PARAMETERS, dict.fromkeys(PARAMETERS), kind="delta", absent="zero")
    yield "dense", input_of(encode(dense), 0)
    yield "raw", bytes([RAW]) + encode(dense)
    yield "schema_dense", input_of(encode(dense, schema=SCHEMA), 0)
    tiny = SparseUpdate({"w": torch.tensor([1.0])}, {"w": torch.tensor([True, False, False])}, absent="unheld")
    yield "tiny", input_of(encode(tiny), 0)
    sparse = MaskSet.of({"w": torch.arange(9000) % 97 == 5})
    yield "gaps", input_of(encode(SparseUpdate(gather({"w": torch.zeros(9000)}, sparse), sparse)), 0)
    bomb = bytearray(input_of(encode(tiny), 0))
    yield "cut", bytes(bomb[: len(bomb) // 2])


def write_corpus(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in seeds():
        (folder / f"{name}.bin").write_bytes(data)
