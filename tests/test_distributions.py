import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_fedsparse.distributions import erk_sparsities, uniform_sparsities
from lightning_fedsparse.masks import kept_counts

LENET = {
    "conv1": (6, 1, 5, 5),
    "conv2": (16, 6, 5, 5),
    "fc1": (120, 400),
    "fc2": (84, 120),
    "fc3": (10, 84),
}
ALEXNET = {
    "conv1": (64, 3, 3, 3),
    "conv2": (192, 64, 3, 3),
    "conv3": (384, 192, 3, 3),
    "conv4": (256, 384, 3, 3),
    "conv5": (256, 256, 3, 3),
    "fc1": (4096, 1024),
    "fc2": (4096, 4096),
    "fc3": (10, 4096),
}
RESNET = {
    "conv1": (64, 3, 3, 3),
    "layer1.0.conv1": (64, 64, 3, 3),
    "layer1.0.conv2": (64, 64, 3, 3),
    "layer1.1.conv1": (64, 64, 3, 3),
    "layer1.1.conv2": (64, 64, 3, 3),
    "layer2.0.conv1": (128, 64, 3, 3),
    "layer2.0.conv2": (128, 128, 3, 3),
    "layer2.0.shortcut.0": (128, 64, 1, 1),
    "layer2.1.conv1": (128, 128, 3, 3),
    "layer2.1.conv2": (128, 128, 3, 3),
    "layer3.0.conv1": (256, 128, 3, 3),
    "layer3.0.conv2": (256, 256, 3, 3),
    "layer3.0.shortcut.0": (256, 128, 1, 1),
    "layer3.1.conv1": (256, 256, 3, 3),
    "layer3.1.conv2": (256, 256, 3, 3),
    "layer4.0.conv1": (512, 256, 3, 3),
    "layer4.0.conv2": (512, 512, 3, 3),
    "layer4.0.shortcut.0": (512, 256, 1, 1),
    "layer4.1.conv1": (512, 512, 3, 3),
    "layer4.1.conv2": (512, 512, 3, 3),
    "linear": (100, 512),
}
# FedDIP's released naming puts the scales of all 20 BatchNorm layers in the pool: one behind every convolution
RESNET_RELEASED = {
    **RESNET,
    **{
        name.replace("shortcut.0", "shortcut.1").replace("conv", "bn"): shape[:1]
        for name, shape in RESNET.items()
        if name != "linear"
    },
}


def densities(shapes, sparsity, power=1.0):
    return {name: 1 - s for name, s in erk_sparsities(shapes, sparsity, power).items()}


def ones(shapes, sparsity):
    return kept_counts(shapes, erk_sparsities(shapes, sparsity))


# known answers, to the printed digits


@pytest.mark.parametrize(
    ("sparsity", "eps", "expected", "kept"),
    [
        (0.50, 39.345238, (1.000000, 0.524603, 0.426240, 0.796273, 1.000000), (150, 1259, 20459, 8026, 840)),
        (0.80, 14.952381, (1.000000, 0.199365, 0.161984, 0.302608, 1.000000), (150, 478, 7775, 3050, 840)),
        (0.90, 7.089965, (0.803529, 0.094533, 0.076808, 0.143487, 0.793401), (120, 226, 3686, 1446, 666)),
        (0.95, 3.544983, (0.401765, 0.047266, 0.038404, 0.071744, 0.396700), (60, 113, 1843, 723, 333)),
        (0.98, 1.417993, (0.160706, 0.018907, 0.015362, 0.028697, 0.158680), (24, 45, 737, 289, 133)),
        (0.99, 0.708997, (0.080353, 0.009453, 0.007681, 0.014349, 0.079340), (12, 22, 368, 144, 66)),
    ],
)
def test_lenet(sparsity, eps, expected, kept):
    found = densities(LENET, sparsity)
    assert tuple(round(d, 6) for d in found.values()) == expected
    assert round(found["fc1"] / ((120 + 400) / (120 * 400)), 6) == eps
    assert tuple(ones(LENET, sparsity).values()) == kept


@pytest.mark.parametrize(
    ("sparsity", "eps", "expected", "kept"),
    [
        (0.50, 762.264311, (1, 1, 0.668580, 0.556576, 0.669442, 0.930498, 0.372199, 1), 11_631_453),
        (0.90, 149.060261, (1, 0.353134, 0.130740, 0.108838, 0.130909, 0.181958, 0.072783, 1), 2_326_288),
        (0.95, 73.136919, (1, 0.173266, 0.064148, 0.053402, 0.064231, 0.089278, 0.035711, 1), 1_163_142),
    ],
)
def test_alexnet(sparsity, eps, expected, kept):
    found = densities(ALEXNET, sparsity)
    assert tuple(round(d, 6) for d in found.values()) == expected
    assert round(found["fc2"] / (8192 / 4096**2), 6) == eps
    assert sum(ones(ALEXNET, sparsity).values()) == kept


def printed(name, table):
    """Density that the table lists for a layer or for the 3x3 convolutions of its stage, else dense."""
    if ".conv" in name:
        return table.get(name, table.get(name.split(".")[0], 1))
    return table.get(name, 1)


@pytest.mark.parametrize(
    ("shapes", "sparsity", "eps", "table", "kept", "size"),
    [
        (
            RESNET_RELEASED,
            0.50,
            815.686969,
            {"layer3": 0.716359, "layer3.0.conv1": 1, "layer4": 0.356105, "layer4.0.conv1": 0.535195},
            5_607_611,
            11_215_232,
        ),
        (
            RESNET,
            0.50,
            816.129937,
            {"layer3": 0.716748, "layer3.0.conv1": 1, "layer4": 0.356299, "layer4.0.conv1": 0.535486},
            5_605_212,
            11_210_432,
        ),
        (
            RESNET,
            0.90,
            126.840603,
            {
                "layer1": 0.461063,
                "layer2": 0.225371,
                "layer2.0.conv1": 0.340636,
                "layer3": 0.111395,
                "layer3.0.conv1": 0.167738,
                "layer4": 0.055375,
                "layer4.0.conv1": 0.083224,
                "layer4.0.shortcut.0": 0.745142,
            },
            1_121_034,
            11_210_432,
        ),
    ],
)
def test_resnet18(shapes, sparsity, eps, table, kept, size):
    found = densities(shapes, sparsity)
    assert sum(math.prod(shape) for shape in shapes.values()) == size
    assert {name: round(d, 6) for name, d in found.items()} == {name: printed(name, table) for name in shapes}
    assert round(found["layer4.1.conv2"] / ((512 + 512 + 3 + 3) / (512 * 512 * 9)), 6) == eps
    assert sum(ones(shapes, sparsity).values()) == kept


def test_uniform():
    assert uniform_sparsities(LENET, 0.9) == dict.fromkeys(LENET, 0.9)


def test_power_0_is_uniform():
    assert erk_sparsities(LENET, 0.75, power=0.0) == pytest.approx(dict.fromkeys(LENET, 0.75))


def test_large_power_does_not_underflow():
    # conv1 has by far the highest ratio; the budget it leaves goes down the ranking until it is used up
    found = densities(LENET, 0.5, power=1000.0)
    assert sum(found[name] * math.prod(shape) for name, shape in LENET.items()) == pytest.approx(0.5 * 61470)


@pytest.mark.parametrize("sparsity", [0.0, 1e-18])
def test_every_layer_dense(sparsity):
    assert erk_sparsities(LENET, sparsity) == dict.fromkeys(LENET, 0.0)
    assert erk_sparsities({"only": (3, 4)}, sparsity) == {"only": 0.0}


# properties

SHAPES = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=3),
    st.lists(st.integers(1, 40), min_size=1, max_size=4).map(tuple),
    min_size=1,
    max_size=8,
)


@settings(deadline=None)
@given(shapes=SHAPES, sparsity=st.floats(0, 0.999), power=st.floats(0, 3))
def test_kept_weights_add_up(shapes, sparsity, power):
    found = erk_sparsities(shapes, sparsity, power)
    assert list(found) == list(shapes)
    assert all(0 <= s <= 1 for s in found.values())
    size = sum(math.prod(shape) for shape in shapes.values())
    kept = sum((1 - found[name]) * math.prod(shape) for name, shape in shapes.items())
    assert kept == pytest.approx((1 - sparsity) * size, rel=1e-9, abs=1e-9)


@settings(deadline=None)
@given(shapes=SHAPES, sparsity=st.floats(0.01, 0.99))
def test_counts_fall_short_by_less_than_one_weight_a_layer(shapes, sparsity):
    size = sum(math.prod(shape) for shape in shapes.values())
    short = (1 - sparsity) * size - sum(ones(shapes, sparsity).values())
    assert -1e-6 <= short < len(shapes)


# errors


@pytest.mark.parametrize("sparsity", [1.0, -0.5, math.nan])
def test_sparsity_outside_its_range(sparsity):
    for distribute in (erk_sparsities, uniform_sparsities):
        with pytest.raises(ValueError, match=rf"expected a sparsity in \[0, 1\) to distribute .* got {sparsity}"):
            distribute(LENET, sparsity)


@pytest.mark.parametrize("power", [-1.0, math.inf, math.nan])
def test_power_outside_its_range(power):
    with pytest.raises(ValueError, match=f"expected a finite ERK power of at least 0, got {power}"):
        erk_sparsities(LENET, 0.5, power)


@pytest.mark.parametrize("shape", [(), (3, 0)])
def test_shape_without_entries(shape):
    for distribute in (erk_sparsities, uniform_sparsities):
        with pytest.raises(ValueError, match=r"expected a shape of one or more positive dimensions, got .* for 'w'"):
            distribute({"w": shape}, 0.5)
