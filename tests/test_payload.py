import math
import re
import struct
import tracemalloc
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lightning_fedsparse.bounded_reading import deflate, varint
from lightning_fedsparse.payload import Limits, MaskSet, PayloadError, check_update, decode, encode, payload_sizes
from lightning_fedsparse.rounds import UploadRule
from lightning_fedsparse.update import SparseUpdate, gather

CARRIERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
FRONT = struct.Struct("<4sBII")


def framed(plain, *sections, version=1):
    """A payload with this header and these sections, whatever they say."""
    packer = zlib.compressobj(wbits=-15)
    packed = packer.compress(plain) + packer.flush()
    data = FRONT.pack(b"\x89FSP", version, len(packed), len(plain)) + packed + b"".join(sections)
    return data + struct.pack("<I", zlib.crc32(data))


def header_of(data):
    """Header bytes and what follows them, without the checksum."""
    _, _, packed, _ = FRONT.unpack_from(data)
    return zlib.decompress(data[FRONT.size : FRONT.size + packed], -15), data[FRONT.size + packed : -4]


def assert_same(found, update):
    """Equal to the bit, with every dtype and shape."""
    assert (found.kind, found.absent, found.num_examples) == (update.kind, update.absent, update.num_examples)
    assert (found.mask_id, dict(found.metrics)) == (update.mask_id, dict(update.metrics))
    assert list(found.values) == list(update.masks)
    for name, mask in update.masks.items():
        assert (found.masks[name] is None) == (mask is None)
        assert mask is None or torch.equal(found.masks[name], mask)
        if mask is not None:
            assert torch.equal(found.masks.positions(name), mask.reshape(-1).nonzero().squeeze(1))
    for mine, theirs in ((found.values, update.values), (found.buffers, update.buffers)):
        assert mine.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert (mine[name].dtype, mine[name].shape) == (tensor.dtype, tensor.shape), name
            carrier = CARRIERS[tensor.element_size()]
            assert torch.equal(mine[name].view(carrier), tensor.view(carrier)), name


def random_update(sizes, density, seed=0, **kwargs):
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"layer{i}.weight": torch.randn(size, generator=generator) * 0.02 for i, size in enumerate(sizes)}
    masks = MaskSet.of({name: torch.rand(t.shape, generator=generator) < density for name, t in tensors.items()})
    return SparseUpdate(gather(tensors, masks), masks, **kwargs)


def check(masks, shape=(2, 3)):
    return MaskSet.of({name: torch.tensor(mask).reshape(shape) for name, mask in masks.items()})


# literals


def test_round_trip_by_eye():
    update = SparseUpdate(
        {"w": torch.tensor([1.5, -2.0]), "b": torch.tensor([0.5])},
        {"w": torch.tensor([[False, True], [True, False]]), "b": None},
        num_examples=42,
        kind="delta",
        absent="unheld",
        buffers={"steps": torch.tensor(7)},
        metrics={"loss": 0.25},
        mask_id="round-3",
    )
    found = decode(encode(update))
    assert_same(found, update)
    assert found.masks.id == MaskSet.of(update.masks).id


def test_the_example_of_the_specification():
    page = (Path(__file__).parents[1] / "docs" / "payload_format.md").read_text()
    listing = page.split("```")[1].strip().splitlines()
    found = decode(bytes.fromhex("".join(re.split(" {3,}", line)[0] for line in listing)))
    assert found.values["w"].tolist() == [1.0, 2.0, 3.0]
    assert found.masks["w"].tolist() == [True, False, False, True, True]
    assert (found.num_examples, found.metrics) == (42, {"a": 2.5})
    assert (found.kind, found.absent, found.mask_id) == ("weights", "unchanged", None)


def test_known_masks_are_not_sent_and_shared():
    update = random_update([1000, 1000], 0.1, mask_id="x")
    plain, leaning = encode(update), encode(update, reference=update.masks)
    sizes = payload_sizes(leaning)
    assert sizes.positions == 0
    assert sizes.total == len(leaning) < len(plain) - payload_sizes(plain).positions
    found = decode(leaning, reference=MaskSet.of(dict(update.masks)))
    assert_same(found, update)
    held = MaskSet(update.masks.id, update.masks)
    assert decode(leaning, reference=held).masks is held


def test_a_plain_mapping_equal_to_the_reference_is_recognized():
    update = random_update([1000, 1000], 0.1)
    plain = SparseUpdate(update.values, {name: mask.clone() for name, mask in update.masks.items()})
    data = encode(plain, reference=update.masks)
    assert payload_sizes(data).positions == 0
    assert decode(data, reference=update.masks).masks is update.masks


def test_masks_with_dense_tensors_lean_as_well():
    masks = MaskSet.of({"b": None, "w": torch.rand(100) < 0.5, "c": None})
    update = SparseUpdate(gather({"b": torch.ones(3), "w": torch.ones(100), "c": torch.ones(())}, masks), masks)
    data = encode(update, reference=masks)
    assert decode(data, reference=masks).masks is masks
    assert b"w" not in header_of(data)[0].replace(masks.id.encode(), b"")  # names come with the reference


def test_a_mask_that_moved_travels_as_changes():
    before = random_update([20_000, 500], 0.2).masks
    moved = {name: mask.clone() for name, mask in before.items()}
    moved["layer0.weight"].view(-1)[before.positions("layer0.weight")[::25]] = False
    moved["layer0.weight"][:9] = True
    after = MaskSet.of(moved)
    update = SparseUpdate(
        gather({"layer0.weight": torch.randn(20_000), "layer1.weight": torch.randn(500)}, after), after
    )
    data = encode(update, reference=before)
    assert payload_sizes(data).positions < 0.3 * payload_sizes(encode(update)).positions
    found = decode(data, reference=before)
    assert_same(found, update)
    assert found.masks.id == after.id
    assert found.masks["layer1.weight"] is before["layer1.weight"]


def test_reference_that_does_not_help_is_not_leant_on():
    update = random_update([300], 0.5)
    for reference in (
        random_update([300], 0.5, seed=1).masks,
        random_update([299], 0.5).masks,
        MaskSet.of({"x": None}),
    ):
        assert_same(decode(encode(update, reference=reference)), update)


def test_sizes_add_up():
    update = random_update([5000], 0.1, buffers={"mean": torch.zeros(10)})
    data = encode(update)
    sizes = payload_sizes(data)
    assert sizes.total == len(data) == sizes.positions + sizes.values + sizes.header
    assert sizes.values < 4 * (update.num_values + 10)
    assert sizes.header < 150


# properties


DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


@st.composite
def tensors(draw, dtypes=DTYPES):
    dtype = draw(st.sampled_from(dtypes))
    shape = draw(st.sampled_from([(), (0,), (1,), (3, 0), (70,), (9, 8, 3), (2, 2, 2, 2)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    raw = torch.randint(-(2**63), 2**63 - 1, shape, generator=generator)
    if dtype.is_floating_point:  # random bits: denormals, negative zeros, huge values; what is not finite becomes -0.0
        values = raw.to(CARRIERS[dtype.itemsize]).view(dtype)
        return torch.where(values.isfinite(), values, torch.tensor(-0.0, dtype=dtype))
    return (raw > 0) if dtype == torch.bool else raw.to(dtype)


@st.composite
def updates(draw):
    names = draw(st.lists(st.text(max_size=5).filter(lambda name: max(name, default="a") < "\ud800"), unique=True))
    parameters = {name: draw(tensors()) for name in names}
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    masks = {}
    for name, tensor in parameters.items():
        density = draw(st.sampled_from([None, 0.0, 0.1, 0.5, 1.0]))
        masks[name] = None if density is None else torch.rand(tensor.shape, generator=generator) < density
    as_set = draw(st.booleans())
    return SparseUpdate(
        values=gather(parameters, masks),
        masks=MaskSet.of(masks) if as_set else masks,
        num_examples=draw(st.integers(0, 10**12)),
        kind=draw(st.sampled_from(["weights", "delta"])),
        absent=draw(st.sampled_from(["zero", "unchanged", "unheld"])),
        buffers={f"buffer {i}": draw(tensors()) for i in range(draw(st.integers(0, 2)))},
        metrics=draw(st.dictionaries(st.text("abc", max_size=3), st.floats(allow_nan=False), max_size=2)),
        mask_id=draw(st.sampled_from([None, "", "abc"])),
    )


@settings(deadline=None, max_examples=150)
@given(updates(), st.sampled_from(["none", "own", "other"]))
def test_decoding_undoes_encoding(update, leaning):
    reference = None
    if leaning == "own":
        reference = MaskSet.of(update.masks)
    elif leaning == "other":
        generator = torch.Generator().manual_seed(0)
        reference = MaskSet.of(
            {
                n: None if m is None else m & (torch.rand(m.shape, generator=generator) < 0.9)
                for n, m in update.masks.items()
            }
        )
    data = encode(update, reference=reference)
    assert_same(decode(data, reference=reference), update)
    assert payload_sizes(data).total == len(data)


def test_special_floats_survive():
    tiny = torch.tensor(
        [-0.0, 0.0, 1e-45, -1e-45, torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny] * 20
    )
    update = SparseUpdate({"w": tiny}, {"w": None}, buffers={"mask": torch.tensor([-math.inf, 0.0])})
    assert_same(decode(encode(update)), update)


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "strided"])
def test_any_memory_layout(layout):
    dense = torch.randn(4, 6, 6, 4)
    weight = {
        "channels_last": dense.to(memory_format=torch.channels_last),
        "transposed": dense.transpose(0, 3),
        "strided": dense[::2, :, ::3],
    }[layout]
    mask = (torch.rand(weight.shape) < 0.5).to(memory_format=torch.channels_last)
    masks = {"w": mask, "v": None}
    update = SparseUpdate(gather({"w": weight, "v": weight}, masks), masks)
    update.values["v"] = weight
    found = decode(encode(update))
    assert torch.equal(found.values["v"], weight)
    assert found.values["v"].is_contiguous()
    assert torch.equal(found.masks["w"], mask)


def test_three_million_elements_near_the_bound():
    update = random_update([3_000_000], 0.05)
    data = encode(update)
    density = update.num_values / 3_000_000
    entropy = -(density * math.log2(density) + (1 - density) * math.log2(1 - density))
    assert len(data) < 0.87 * (3_000_000 * entropy / 8 + 4 * update.num_values)
    assert_same(decode(data), update)


def test_decoded_tensors_are_writable_and_own_their_memory():
    data = encode(random_update([100], 0.5))
    before = bytes(data)
    decode(data).values["layer0.weight"].zero_()
    assert data == before


# errors when encoding


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


# errors when decoding


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


# fuzzing: whatever arrives is an update or a PayloadError


def seed_updates():
    """Tensors and buffers of a model, masks that a receiver may hold, and updates on them and on others."""
    shapes = {"a": (40, 50), "b": (7,), "c": ()}
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tensors["b"] = tensors["b"].bfloat16()
    masks = MaskSet.of({"a": torch.rand(40, 50, generator=generator) < 0.1, "b": torch.arange(7) < 3, "c": None})
    moved = masks["a"].clone()
    moved.view(-1)[masks.positions("a")[::10]] = False
    moved[0, :3] = True
    after = MaskSet.of({**masks, "a": moved})
    wide = MaskSet.of({**masks, "a": torch.rand(40, 50, generator=generator) < 0.35})
    blocks = MaskSet.of({**masks, "a": (torch.arange(2000) // 64 % 4 == 0).view(40, 50)})
    buffers = {"mean": torch.randn(5, generator=generator), "steps": torch.tensor(3), "on": torch.tensor([True])}
    seeds = [
        SparseUpdate(gather(tensors, held), held, 5, buffers=buffers, metrics={"loss": 1.0}, mask_id=held.id)
        for held in (masks, after, wide, blocks)
    ]
    return tensors, buffers, masks, seeds


def _seeds():
    _, _, masks, seeds = seed_updates()
    for update in seeds:
        for reference in (None, masks):
            yield encode(update, reference=reference), masks


SEEDS = list(_seeds())
EDITS = st.lists(
    st.tuples(st.sampled_from(["flip", "set", "cut", "insert", "repeat"]), st.floats(0, 1), st.integers(0, 255)),
    min_size=1,
    max_size=4,
)


def edited(data, edits):
    data = bytearray(data)
    for what, where, byte in edits:
        at = min(int(where * len(data)), max(len(data) - 1, 0))
        if what == "flip" and data:
            data[at] ^= 1 << byte % 8
        elif what == "set" and data:
            data[at] = byte
        elif what == "cut":
            del data[at : at + byte % 8 + 1]
        elif what == "insert":
            data[at:at] = bytes([byte] * (byte % 8 + 1))
        elif what == "repeat":
            data[at:at] = data[at : at + byte]
    return bytes(data)


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


# an upload against the model


def model():
    parameters = {"w": torch.zeros(2, 2), "b": torch.zeros(2)}
    buffers = {"mean": torch.zeros(2), "mask": torch.tensor([0.0, -math.inf])}
    return parameters, buffers


def upload(**changes):
    parts = {"values": {}, "masks": {}, "buffers": {}, "num_examples": 1, **changes}
    values = {"w": torch.ones(2), "b": torch.ones(2), **parts["values"]}
    masks = {"w": torch.tensor([[True, False], [True, False]]), "b": None, **parts["masks"]}
    return SparseUpdate(values, masks, parts["num_examples"], buffers=parts["buffers"])


SUPPORT = MaskSet.of({"w": torch.tensor([[True, False], [False, True]]), "b": None})


def test_uploads_that_fit():
    parameters, buffers = model()
    update = upload(buffers=buffers)
    check_update(update, parameters, buffers=buffers, support=None)
    check_update(update, parameters, buffers=buffers, support=SUPPORT, rule=UploadRule(extra_values=1))
    check_update(upload(), parameters, buffers=buffers, support=MaskSet.of(upload().masks))
    dense = upload(values={"w": torch.ones(2, 2)}, masks={"w": None})
    check_update(dense, parameters, buffers=buffers, support=SUPPORT, rule=UploadRule(extra_values=2))
    inside = upload(values={"w": torch.ones(1)}, masks={"w": torch.tensor([[True, False], [False, False]])})
    check_update(inside, parameters, buffers=buffers, support=SUPPORT)


@pytest.mark.parametrize(
    ("update", "message"),
    [
        (upload(num_examples=0), "expected at least 1 example behind the update, got 0"),
        (SparseUpdate({"w": torch.ones(2, 2)}, {"w": None}), r"got none for \['b'\] and unknown ones \[\]"),
        (
            upload(values={"x": torch.ones(1)}, masks={"x": None}),
            r"expected the parameters of the model, got none for \[\] and unknown ones \['x'\]",
        ),
        (
            upload(values={"b": torch.ones(3)}),
            r"expected parameter 'b' of shape \(2,\), got \(3,\)",
        ),
        (
            upload(masks={"w": torch.tensor([True, False, True, False])}),
            r"expected parameter 'w' of shape \(2, 2\), got \(4,\)",
        ),
        (
            upload(values={"b": torch.ones(2, dtype=torch.float64)}),
            "expected parameter 'b' of dtype torch.float32, got torch.float64",
        ),
        (upload(), "'w' brings the values outside the support to 1, 0 are allowed"),
        (
            upload(values={"w": torch.ones(2, 2)}, masks={"w": None}),
            "'w' brings the values outside the support to 2, 0 are allowed",
        ),
        (upload(buffers={"mean": torch.zeros(2)}), r"expected the buffers of the model, got none for \['mask'\]"),
        (
            upload(buffers={**model()[1], "mean": torch.zeros(2, dtype=torch.int64)}),
            "expected buffer 'mean' of dtype torch.float32, got torch.int64",
        ),
        (upload(buffers={**model()[1], "mean": torch.zeros(1)}), r"expected buffer 'mean' of shape \(2,\), got \(1,\)"),
        (
            upload(buffers={**model()[1], "mean": torch.tensor([math.inf, 0])}),
            "buffer 'mean' is infinite where the model's is not",
        ),
    ],
)
def test_uploads_that_do_not_fit(update, message):
    parameters, buffers = model()
    extra = 0 if "outside" in message else 1
    with pytest.raises(PayloadError, match=message):
        check_update(update, parameters, buffers=buffers, support=SUPPORT, rule=UploadRule(extra_values=extra))
