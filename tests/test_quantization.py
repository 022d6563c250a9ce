import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_fedsparse.payload import MaskSet, PayloadError, decode, encode, payload_sizes
from lightning_fedsparse.quantization import dequantize, quantize, round_to_dtype
from lightning_fedsparse.update import SparseUpdate

LOSSY = ["bfloat16", "float16", "int8", "int4"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def sent(values, value_type, *, seed=0, block=256):
    """What a receiver reads of one dense tensor."""
    update = SparseUpdate({"w": values}, {"w": None})
    return decode(encode(update, values=value_type, seed=seed, block=block)).values["w"]


# literals


def test_integers_by_eye():
    codes, scales = quantize(torch.tensor([0.0, 7.0, -2.0, 0.5, -0.25]), bits=4, block=3, generator=generator())
    assert codes[:3].tolist() == [0, 7, -2]
    assert scales.tolist() == pytest.approx([1.0, 0.5 / 7])
    assert codes[3] == 7
    assert codes[4] in (-3, -4)
    assert dequantize(torch.tensor([7, -3, 1]), torch.tensor([0.5, 2.0]), block=2).tolist() == [3.5, -1.5, 2.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_floats_by_eye(dtype):
    # 1 + 1/4096 lies between 1 and the next number: 1 + 1/128 in bfloat16, 1 + 1/1024 in float16
    step = torch.finfo(dtype).eps
    rounded = round_to_dtype(torch.full((4000,), 1 + 2.0**-12), dtype, generator=generator()).float()
    assert set(rounded.tolist()) == {1.0, 1.0 + step}
    assert (rounded > 1).float().mean() == pytest.approx(2.0**-12 / step, rel=0.3)


# properties


@pytest.mark.parametrize("value_type", LOSSY)
@pytest.mark.parametrize("block", [None, 64])
def test_rounding_is_unbiased_over_500_draws(value_type, block):
    values = torch.randn(300, generator=generator(1)) * 0.02
    values[:4] = torch.tensor([0.0, 1e-6, -3e-5, 0.1])
    draws = torch.stack([sent(values, value_type, seed=seed, block=block) for seed in range(500)]).double()
    if value_type in ("int8", "int4"):
        largest = torch.cat([part.abs().max().expand_as(part) for part in values.split(block or 300)])
        step = largest / (127 if value_type == "int8" else 7)
    else:
        limits = torch.finfo(getattr(torch, value_type))
        step = 2.0 ** values.abs().clamp(min=limits.smallest_normal).log2().floor() * limits.eps
    errors = (draws.mean(0) - values) / step
    # a draw is one of two neighbours, so its deviation is half a step at most; float32 itself errs by 1e-6 of a step
    assert errors.abs().max() <= 5 * 0.5 / math.sqrt(500) + 1e-5
    assert errors.mean().abs() <= 5 * 0.5 / math.sqrt(500 * 300) + 1e-5
    assert draws[:, 0].eq(0).all()
    assert (draws.std(0) > 0).float().mean() > 0.9


@settings(deadline=None, max_examples=100)
@given(st.sampled_from(LOSSY), st.integers(0, 300), st.sampled_from([None, 1, 7, 256]), st.integers(0, 2**32))
def test_what_is_read_is_a_neighbour_of_what_was_sent(value_type, size, block, seed):
    bits = torch.randint(-(2**31), 2**31 - 1, (size,), generator=generator(seed)).int()
    values = bits.view(torch.float32)
    values = torch.where(values.isfinite(), values, torch.tensor(-0.0))
    found = sent(values, value_type, seed=seed, block=block)
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    if value_type in ("int8", "int4"):
        levels = 127 if value_type == "int8" else 7
        parts = values.split(block or max(1, size)) if size else ()
        largest = torch.cat([values[:0], *(part.abs().max().expand_as(part) for part in parts)])
        # one level; the division alone rounds where magnitudes are subnormal
        assert ((found - values).abs().double() <= largest.double() / levels * (1 + 1e-6) + 1.5e-45).all()
    else:
        dtype = getattr(torch, value_type)
        limit = torch.finfo(dtype)
        clipped = values.double().clamp(limit.min, limit.max)
        spacing = torch.maximum(clipped.abs() * limit.eps, torch.tensor(limit.smallest_normal * limit.eps).double())
        assert ((found.double() - clipped).abs() <= spacing).all()
        assert torch.equal(found.to(dtype).float(), found)


@pytest.mark.parametrize("value_type", LOSSY)
def test_numbers_of_the_type_are_not_changed_and_seeds_decide(value_type):
    grid = torch.arange(-127, 128).float() if value_type == "int8" else torch.arange(-7, 8).float()
    assert torch.equal(sent(grid, value_type, block=None), grid)
    values = torch.randn(200, generator=generator())
    assert torch.equal(sent(values, value_type, seed=3), sent(values, value_type, seed=3))
    assert not torch.equal(sent(values, value_type, seed=3), sent(values, value_type, seed=4))


@pytest.mark.parametrize(
    ("value_type", "most"), [("bfloat16", 0.36), ("float16", 0.46), ("int8", 0.25), ("int4", 0.125)]
)
def test_sizes_of_gaussian_values(value_type, most):
    values = torch.randn(100_000, generator=generator()) * 0.02
    data = encode(SparseUpdate({"w": values}, {"w": None}), values=value_type, seed=0)
    assert payload_sizes(data).values < most * 400_000


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64])
@pytest.mark.parametrize("value_type", LOSSY)
def test_dtypes_come_back_and_no_type_makes_values_longer(dtype, value_type):
    values = (torch.randn(1000, generator=generator()) * 10).to(dtype)
    found = sent(values, value_type)
    assert found.dtype == dtype
    exact = not dtype.is_floating_point or (dtype.itemsize == 2 and value_type in ("bfloat16", "float16"))
    assert torch.equal(found, values) == exact


def test_masks_and_buffers():
    masks = MaskSet.of({"w": torch.arange(200) % 2 == 0, "b": None})
    values = {"w": torch.randn(100, generator=generator()), "b": torch.randn(3, generator=generator())}
    buffers = {"mean": torch.randn(70, generator=generator()), "steps": torch.tensor(2**40)}
    update = SparseUpdate(values, masks, buffers=buffers)
    found = decode(encode(update, reference=masks, values="int8", seed=1), reference=masks)
    assert found.masks is masks
    assert (found.values["w"] - values["w"]).abs().max() < 0.04
    assert all(torch.equal(found.buffers[name], buffer) for name, buffer in buffers.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_tensors_travel_in_planes(dtype):
    values = (torch.randn(10_000, generator=generator()) * 0.02).to(dtype)
    data = encode(SparseUpdate({"w": values}, {"w": None}))
    assert payload_sizes(data).values < 0.93 * 20_000
    assert torch.equal(decode(data).values["w"].view(torch.int16), values.view(torch.int16))


# errors


@pytest.mark.parametrize("value_type", LOSSY)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused_by_the_receiver(value_type, value):
    values = torch.ones(100)
    values[7] = value
    data = encode(SparseUpdate({"w": values}, {"w": None}), values=value_type, seed=0)
    with pytest.raises(PayloadError, match="'w' holds values that are not finite"):
        decode(data)


def test_a_seed_is_needed_where_values_are_rounded():
    with pytest.raises(ValueError, match="expected a seed for the stochastic rounding to 'int8', got None"):
        encode(SparseUpdate({}, {}), values="int8")


def test_a_block_is_not_empty():
    with pytest.raises(ValueError, match="expected block to be at least 1, got 0"):
        encode(SparseUpdate({}, {}), values="int8", seed=0, block=0)
