"""The transforms of submodels on bare tensors: what is cut has no gradient and does not move, whatever the numbers are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_fedsparse.submodels import ImportanceTransform, SubmodelTransform, importance_factor
from lightning_fedsparse.transforms import keep_reaching_, reaching

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NAN, INF = float("nan"), float("inf")
HELD = torch.tensor([True, False, True, False])


def bits_of(tensor: Tensor) -> list[int]:
    return tensor.view(torch.uint8).tolist()


@pytest.mark.parametrize("dtype", DTYPES)
def test_held_weights_alone_are_in_and_learn(dtype: torch.dtype) -> None:
    transform = SubmodelTransform({"w": HELD, "whole": None})
    weights = {"w": torch.tensor([1.0, 2.0, -3.0, INF], dtype=dtype), "whole": torch.tensor([NAN, 1.0], dtype=dtype)}
    out = {name: torch.empty_like(weight) for name, weight in weights.items()}
    transform.apply(weights, out)
    assert out["w"].tolist() == [1, 0, -3, 0]
    assert bits_of(out["whole"]) == bits_of(weights["whole"])
    gradients = {"w": torch.tensor([5.0, NAN, -INF, INF], dtype=dtype), "whole": torch.tensor([1.0, 2.0], dtype=dtype)}
    transform.chain_(gradients, weights, out)
    assert gradients["w"].tolist() == [5, 0, -INF, 0]
    assert gradients["whole"].tolist() == [1, 2]


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_held_keeps_its_bits_even_from_an_optimizer_that_divides_by_zero(dtype: torch.dtype) -> None:
    transform = SubmodelTransform({"w": HELD})
    before = torch.tensor([1.0, -0.0, 0.1, 0.3], dtype=dtype)
    after = torch.tensor([0.5, NAN, -0.0, INF], dtype=dtype)
    transform.after_step_({"w": after}, {"w": before})
    assert bits_of(after) == bits_of(torch.tensor([0.5, -0.0, -0.0, 0.3], dtype=dtype))


def test_masks_of_the_same_names() -> None:
    transform = SubmodelTransform({"w": HELD, "v": None})
    transform.set_masks({"v": ~HELD, "w": None})
    with pytest.raises(ValueError, match=r"expected masks for \['v', 'w'\], got \['w'\]"):
        transform.set_masks({"w": HELD})


@pytest.mark.parametrize("corrects", [True, False])
def test_what_is_below_its_threshold_has_no_gradient(corrects: bool) -> None:
    transform = ImportanceTransform({"w": HELD, "v": None}, {"w": 0.5, "v": 0.0}, corrects=corrects)
    weights = {"w": torch.tensor([1.0, 2.0, -0.25, 0.0]), "v": torch.tensor([0.0])}
    out = {name: torch.empty_like(weight) for name, weight in weights.items()}
    transform.apply(weights, out)
    assert (out["w"].tolist(), out["v"].tolist()) == ([1, 0, 0, 0], [0])
    gradients = {"w": torch.tensor([9.0, 9.0, NAN, 9.0]), "v": torch.tensor([9.0])}
    transform.chain_(gradients, weights, out)
    assert gradients["w"].tolist() == [pytest.approx(9 * 1.444444) if corrects else 9, 0, 0, 0]
    assert gradients["v"].tolist() == [9]


@pytest.mark.parametrize("dtype", DTYPES)
@given(st.lists(st.floats(-4, 4, width=16), min_size=1, max_size=8), st.integers(0, 7))
def test_reaching_is_at_least(dtype: torch.dtype, values: list[float], which: int) -> None:
    weight = torch.tensor(values, dtype=dtype)
    threshold = float(weight.abs()[which % len(values)])
    kept = weight.abs() >= threshold
    assert torch.equal(reaching(weight, threshold), torch.where(kept, weight, 0))
    gradient = torch.full_like(weight, 2)
    keep_reaching_(gradient, weight, threshold)
    assert torch.equal(gradient, torch.where(kept, gradient, 0)) or threshold == 0


def test_factors_of_the_largest_numbers() -> None:
    assert importance_factor(torch.tensor([3e38, INF]), 3e38).tolist() == [1, 1]
