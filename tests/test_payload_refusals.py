"""Updates that can't be encoded, and payloads that are refused, each with its reason."""

import math
import struct
import tracemalloc
import zlib

import pytest
import torch

from lightning_fedsparse.bounded_reading import deflate, varint
from lightning_fedsparse.payload import Limits, MaskSet, PayloadError, decode, encode
from lightning_fedsparse.update import SparseUpdate
from tests.payload_examples import FRONT, assert_same, framed, random_update

# when encoding


@pytest.mark.parametrize(
    ("update", "message"),
    [
        (SparseUpdate({"w": torch.ones(2)}, {}), r"got only one of the two for \['w'\]"),
        (SparseUpdate({}, {"v": None}), r"got only one of the two for \['v'\]"),
        (SparseUpdate({"w": torch.ones(2)}, {"w": torch.tensor([True, False])}), r"expected the 1 kept values of 'w'"),
        (SparseUpdate({"w": torch.ones(1, 1)}, {"w": torch.tensor([True])}), r"in one dimension, got \(1, 1\)"),
        (SparseUpdate({"w": torch.ones(2, dtype=torch.cfloat)}, {"w": None}), "can carry, got torch.complex64"),
        (SparseUpdate({}, {}, num_examples=-1), "expected num_examples of at least 0, got -1"),
        (SparseUpdate({}, {}, kind="sum"), "got 'sum', 'unchanged'"),
        (SparseUpdate({}, {}, absent="held"), "got 'weights', 'held'"),
    ],
)
def test_updates_that_contradict_themselves(update, message):
    with pytest.raises(ValueError, match=message):
        encode(update)


def test_unknown_value_coding():
    with pytest.raises(ValueError, match=r"expected values to be one of \('float32', .*, 'int4'\), got 'int3'"):
        encode(SparseUpdate({}, {}), values="int3")


# when decoding


def test_reference_must_be_the_one_leant_on():
    update = random_update([100], 0.5)
    data = encode(update, reference=update.masks)
    other = random_update([100], 0.5, seed=1).masks
    with pytest.raises(PayloadError, match=f"leans on the masks '{update.masks.id}' but the receiver holds none"):
        decode(data)
    with pytest.raises(PayloadError, match=f"'{update.masks.id}' but the receiver holds '{other.id}'"):
        decode(data, reference=other)


def test_reference_that_shares_no_more_than_the_id():
    update = random_update([100], 0.5)
    data = encode(update, reference=update.masks)
    name = "layer0.weight"
    for masks, message in (
        ({name: None}, f"'{name}' leans on a mask that its reference does not have"),
        ({name: None, "b": None}, "the payload has 1 parameters, its reference 2"),
        (
            {name: torch.ones(1, dtype=torch.bool)},
            "fewer than the 3 of its mantissas|not the 4 it needs|expands to more",
        ),
    ):
        with pytest.raises(PayloadError, match=message):
            decode(data, reference=MaskSet(update.masks.id, masks))


def test_travelling_masks_must_have_their_id():
    masks = MaskSet("somebody else's", {"w": torch.tensor([True])})
    with pytest.raises(PayloadError, match='but the payload declares "somebody else\'s"'):
        decode(encode(SparseUpdate({"w": torch.ones(1)}, masks)))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_parameters_that_are_not_finite(value, dtype):
    for size in (3, 100):
        weight = torch.ones(size, dtype=dtype)
        weight[1] = value
        data = encode(SparseUpdate({"w": weight}, {"w": None}))
        with pytest.raises(PayloadError, match=f"'w' holds values that are not finite, 1 of {size}"):
            decode(data)


def test_buffers_that_are_nan():
    update = SparseUpdate({}, {}, buffers={"mean": torch.tensor([1.0, -math.nan])})
    with pytest.raises(PayloadError, match="'mean' holds values that are not finite, 1 of 2"):
        decode(encode(update))


def tiny(parameter=b"\1w\0\0\0\1\2\x08", buffers=b"\0", front=b"\0\1\1\0\0\0\1\0", count=b"\1"):
    """A header with one parameter, ``w``: float32, dense, raw, of shape (2,) and 8 bytes."""
    return front + count + parameter + buffers


VALUES = struct.pack("<ff", 1, 2)


def test_tiny_is_a_payload():
    assert decode(framed(tiny(), VALUES)).values["w"].tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the payload has 0 bytes, fewer than its frame of 9"),
        (b"PK" + bytes(40), "not a payload: it starts with b'PK"),
        (framed(tiny(), VALUES, version=9), "payload version 9 is unknown: this decoder reads versions 1 and 2"),
        (framed(tiny(), VALUES)[:-1], "the checksum is"),
        (framed(tiny(), VALUES[:-1]), "the sections have 7 bytes but the header declares 8"),
        (framed(tiny(), VALUES + b"\0"), "the sections have 9 bytes but the header declares 8"),
        (framed(tiny() + b"\0", VALUES), "the header has 1 bytes after its last field"),
        (framed(tiny()[:-1], VALUES), "the number of buffers needs 1 bytes but 0 are left"),
        (framed(tiny(front=b"\2\1\1\0\0\0\1\0")), "the kind has code 2, beyond the last known one, 1"),
        (framed(tiny(front=b"\0\3\1\0\0\0\1\0")), "the meaning of absent has code 3"),
        (
            framed(tiny(front=b"\0\1" + b"\xff" * 6 + b"\1\0\0\0\1\0")),
            "num_examples is .*, more than the limit of 10{12}",
        ),
        (
            framed(tiny(front=b"\0\1" + b"\xff" * 9 + b"\1\0\0\0\1\0")),
            "num_examples is an integer of more than 63 bits",
        ),
        (framed(tiny(front=b"\0\1\1\0\0\0\0\0")), "names no reference to take them from"),
        (framed(tiny(front=b"\0\1\1\3\xff\xff\0\0\1\0")), "the mask id is not UTF-8"),
        (framed(tiny(front=b"\0\1\1\0\0\0\1\2" + 2 * (b"\1a" + bytes(8)))), "metric 'a' comes twice"),
        (framed(tiny(front=b"\0\1\1\0\0\0\1\2" + b"\1a")), "'a' needs 8 bytes|is not UTF-8|left"),
        (framed(tiny(b"\1\xff\0\0\0\1\2\x08"), VALUES), "a parameter's name is not UTF-8: b'.xff'"),
        (framed(tiny(b"\1w\x0a\0\0\1\2\x08"), VALUES), "the dtype of 'w' has code 10, beyond the last known one, 9"),
        (framed(tiny(b"\1w\0\6\0\1\2\x08"), VALUES), "the position coding of 'w' has code 6"),
        (framed(tiny(b"\1w\0\0\6\1\2\x08"), VALUES), "the value coding of 'w' has code 6"),
        (framed(tiny(b"\1w\0\1\0\x08"), VALUES), "tensor 'w' leans on a mask but the payload names no reference"),
        (framed(tiny(b"\1w\0\0\0\x21" + b"\1" * 33 + b"\x08"), VALUES), "dimensions of 'w' is 33, more than the limit"),
        (framed(tiny(b"\1w\0\0\0\1\3\x08"), VALUES), "'w' has 8 bytes of values, not the 12 it needs"),
        (framed(tiny(b"\1w\3\0\1\1\2\x08"), VALUES), "coded as PLANES, which is not for torch.float64"),
        (framed(tiny(b"\1w\0\0\1\1\3\x08"), VALUES), "8 bytes of values, fewer than the 9 of its mantissas"),
        (framed(tiny(b"\1w\0\0\1\1\2\x09"), VALUES[:6] + b"\x63\x00\0"), "'w' does not end|'w' has 1 exponents"),
        (framed(tiny(b"\1w\0\5\0\1\2\3\0\x08"), VALUES), "the count of 'w' is 3, more than the limit of 2"),
        (framed(tiny(b"\1w\0\0\0\1\2\x08\1w\0\0\0\1\2\x08", count=b"\2"), VALUES * 2), "tensor 'w' comes twice"),
        (framed(tiny(buffers=b"\1\1w\0\0\0\1\2\x08"), VALUES * 2), "tensor 'w' comes twice"),
        (framed(tiny(buffers=b"\1\1b\0\5\0\1\2\2\1\x08"), VALUES * 2), "buffer 'b' has positions coded as BITMAP"),
        (framed(tiny(b"\1w\x09\0\0\1\2\2"), b"\1\2"), "'w' is bool but holds the byte 2"),
    ],
)
def test_bad_payloads(data, message):
    with pytest.raises(PayloadError, match=message):
        decode(data)


def big(*dims):
    shape = b"".join(bytes([size & 0x7F | 0x80, size >> 7 & 0x7F | 0x80, size >> 14]) for size in dims)
    return framed(tiny(b"\1w\0\3\0" + bytes([len(dims)]) + shape + b"\0\0\0"))


@pytest.mark.parametrize(
    ("data", "limits", "message"),
    [
        (framed(tiny(), VALUES), Limits(max_bytes=30), "bytes, more than the limit of 30"),
        (framed(tiny(), VALUES), Limits(max_header_bytes=9), "the header declares 18 bytes, more than the limit of 9"),
        (framed(tiny(), VALUES), Limits(max_elements=1), "a dimension of 'w' is 2, more than the limit of 1"),
        (framed(tiny(), VALUES), Limits(max_tensors=0), "the number of parameters is 1, more than the limit of 0"),
        (framed(tiny(), VALUES), Limits(max_name_length=0), "the length of a parameter's name is 1, more than"),
        (framed(tiny(front=b"\0\1\5\0\0\0\1\0"), VALUES), Limits(max_examples=4), "num_examples is 5, more than"),
        (big(1000, 1000), Limits(max_elements=10**5), r"'w' declares shape \(1000, 1000\), more than 100000 elements"),
        (big(1000, 0, 1000), Limits(max_elements=10**5), r"'w' declares shape \(1000, 0, 1000\), more than 100000"),
        (big(*[2**20] * 32), Limits(), "'w' declares shape .*, more than 268435456 elements"),
        (
            framed(tiny(buffers=b"\1\1b\0\0\0\1\2\x08"), VALUES * 2),
            Limits(max_elements=3),
            "'b' brings .* 4 elements of 3",
        ),
    ],
)
def test_limits(data, limits, message):
    with pytest.raises(PayloadError, match=message):
        decode(data, limits=limits)


def test_header_that_expands_further_than_it_says():
    bomb = framed(bytes(10**6))
    magic, version, packed, _ = FRONT.unpack_from(bomb)
    data = FRONT.pack(magic, version, packed, 1000) + bomb[FRONT.size : -4]
    with pytest.raises(PayloadError, match="the header expands to more than the 1000 bytes"):
        decode(data + struct.pack("<I", zlib.crc32(data)))
    data = FRONT.pack(magic, version, packed, 2 * 10**6) + bomb[FRONT.size : -4]
    with pytest.raises(PayloadError, match="the header expands to 1000000 bytes but declares 2000000"):
        decode(data + struct.pack("<I", zlib.crc32(data)))


BOMB = deflate(bytes(10**7), match=True)  # 10 kB


@pytest.mark.parametrize(
    ("record", "sections", "what"),
    [
        (b"\1w\0\3\0\1\x08\2" + varint(1 + len(BOMB)) + b"\x08", (b"\0", BOMB, VALUES), "the positions of 'w'"),
        (b"\1w\0\4\0\1\x08\2" + varint(len(BOMB)) + b"\x08", (BOMB, VALUES), "the bitmap of 'w'"),
        (b"\1w\0\0\1\1\2" + varint(6 + len(BOMB)), (bytes(6), BOMB), "the exponents of 'w'"),
        (b"\1w\0\0\4\1\2" + varint(6 + len(BOMB)), (bytes(5), b"\1", BOMB), "the codes of 'w'"),
    ],
)
def test_sections_that_expand_further_than_they_may_are_not_expanded(record, sections, what):
    data = framed(tiny(record), *sections)
    tracemalloc.start()
    with pytest.raises(PayloadError, match=f"{what} expands to more than"):
        decode(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200_000


def test_limits_for_a_model_admit_its_updates_and_no_larger_model():
    update = random_update([100, 30], 0.5, buffers={"mean": torch.zeros(5)})
    dense = {name: torch.randn(mask.shape) for name, mask in update.masks.items()}
    limits = Limits.for_tensors({**dense, **update.buffers})
    for fits in (update, SparseUpdate(dense, dict.fromkeys(dense), buffers=update.buffers)):
        assert_same(decode(encode(fits), limits=limits), fits)
    with pytest.raises(PayloadError, match=r"a dimension of .* is 136, more than the limit of 135"):
        decode(encode(random_update([136], 0.5)), limits=limits)
