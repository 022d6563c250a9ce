"""An upload held against the model that it is for."""

import math

import pytest
import torch

from lightning_fedsparse.payload import MaskSet, PayloadError, check_update
from lightning_fedsparse.rounds import UploadRule
from lightning_fedsparse.update import SparseUpdate


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
