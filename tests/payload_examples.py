"""Updates and payloads, random and by hand, and the edits that damage them."""

import struct
import zlib

import torch
from hypothesis import strategies as st

from lightning_fedsparse.payload import MaskSet, encode
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
