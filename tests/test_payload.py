"""The payload: what is decoded is what was encoded."""

import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_fedsparse.payload import MaskSet, decode, encode, payload_sizes
from lightning_fedsparse.update import SparseUpdate, gather
from tests.payload_examples import assert_same, header_of, random_update, updates

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
