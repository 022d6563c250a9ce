"""An update on another device."""

import torch

from lightning_fedsparse.update import MaskSet, SparseUpdate


def test_an_update_moves_with_its_masks_and_their_name():
    masks = MaskSet.of({"w": torch.tensor([True, False, True]), "b": None})
    update = SparseUpdate({"w": torch.ones(2), "b": torch.ones(1)}, masks, num_examples=3, buffers={"n": torch.ones(1)})
    update.positions("w")
    there = update.to(torch.device("meta"))
    assert there.masks.id == masks.id
    tensors = [*there.values.values(), *there.buffers.values(), there.masks["w"], there.positions("w")]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert there.masks["b"] is None
    assert there.num_examples == 3


def test_an_update_that_is_there_shares_its_tensors():
    masks = {"w": torch.tensor([True, False, True]), "b": None}
    update = SparseUpdate({"w": torch.ones(2), "b": torch.ones(1)}, MaskSet.of(masks))
    same = update.to(torch.device("cpu"))
    assert same.masks is update.masks
    assert same.values["w"] is update.values["w"]
    plain = SparseUpdate(update.values, masks).to(torch.device("cpu"))
    assert plain.masks["w"] is masks["w"]
