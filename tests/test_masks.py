import io
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_fedsparse.masks import (
    intersection_over_union,
    kept_counts,
    magnitude_masks,
    pack_mask,
    random_masks,
    sparsity_of,
    top_masks,
    unpack_mask,
)

LENET = {
    "conv1": (6, 1, 5, 5),
    "conv2": (16, 6, 5, 5),
    "fc1": (120, 400),
    "fc2": (84, 120),
    "fc3": (10, 84),
}


def bits(masks):
    return {name: mask.int().tolist() for name, mask in masks.items()}


def reference(values, zeros):
    """Kept flags by sorting (magnitude, index) in plain Python."""
    order = sorted(range(len(values)), key=lambda i: (abs(values[i]), i))
    dropped = set(order[:zeros])
    return [i not in dropped for i in range(len(values))]


# literals


def test_global_scope_ranks_all_layers_in_one_pool():
    tensors = {"a": torch.tensor([[0.1, -0.2], [0.3, -0.4]]), "b": torch.tensor([5.0, -6.0])}
    assert bits(magnitude_masks(tensors, 0.5)) == {"a": [[0, 0], [0, 1]], "b": [1, 1]}


def test_layer_scope_ranks_each_layer_alone():
    tensors = {"a": torch.tensor([[0.1, -0.2], [0.3, -0.4]]), "b": torch.tensor([5.0, -6.0])}
    assert bits(magnitude_masks(tensors, 0.5, scope="layer")) == {"a": [[0, 0], [1, 1]], "b": [0, 1]}


def test_one_sparsity_per_name():
    tensors = {"a": torch.tensor([1.0, 2.0, 3.0, 4.0]), "b": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    masks = magnitude_masks(tensors, {"b": 0.0, "a": 0.75}, scope="layer")
    assert bits(masks) == {"a": [0, 0, 0, 1], "b": [1, 1, 1, 1]}


def test_ties_lose_by_lower_index_across_layers():
    tensors = {"a": torch.tensor([1.0, -1.0]), "b": torch.tensor([1.0, 1.0, 2.0])}
    assert bits(magnitude_masks(tensors, 0.6)) == {"a": [0, 0], "b": [0, 1, 1]}


def test_zeros_of_either_sign_are_ties():
    assert bits(magnitude_masks({"w": torch.tensor([0.0, -0.0, 0.0, -0.0])}, 0.5)) == {"w": [0, 0, 1, 1]}


def test_infinities_are_the_largest():
    tensors = {"w": torch.tensor([math.inf, 1.0, -math.inf, math.inf])}
    assert bits(magnitude_masks(tensors, 0.5)) == {"w": [0, 0, 1, 1]}


@pytest.mark.parametrize(("size", "zeros"), [(1, 0), (3, 2), (5, 2), (7, 4)])
def test_half_rounds_to_even(size, zeros):
    mask = magnitude_masks({"w": torch.arange(float(size))}, 0.5)["w"]
    assert mask.tolist() == [i >= zeros for i in range(size)]


@pytest.mark.parametrize(
    ("sparsity", "zeros"), [(0.0, 0), (0.5, 30735), (0.8, 49176), (0.9, 55323), (0.95, 58396), (0.99, 60855)]
)
def test_zeros_of_lenet(sparsity, zeros):
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in LENET.items()}
    masks = magnitude_masks(tensors, sparsity)
    assert sum(int((~mask).sum()) for mask in masks.values()) == zeros
    assert sparsity_of(masks) == pytest.approx(zeros / 61470, abs=1e-15)


def test_kept_counts_truncate_but_forgive_rounding_errors():
    shapes = {"a": (150,), "b": (10,), "c": (10,), "d": (3,)}
    # 1 - 0.9 is 0.09999999999999998, so ten of it fall short of 1
    assert kept_counts(shapes, {"a": 0.0, "b": 0.9, "c": 0.31, "d": 0.7}) == {"a": 150, "b": 1, "c": 6, "d": 0}
    assert kept_counts({"fc": (4096, 4096)}, {"fc": 0.75}) == {"fc": 2**22}


def test_top_masks_keep_the_counts_asked_for():
    tensors = {"a": torch.tensor([[1.0, -4.0], [3.0, 2.0]]), "b": torch.tensor([1.0, 2.0]), "c": torch.tensor([1.0])}
    masks = top_masks(tensors, {"a": 2, "b": 0, "c": 1})
    assert bits(masks) == {"a": [[0, 1], [1, 0]], "b": [0, 0], "c": [1]}


def test_sparsity_counts_weights_not_layers():
    masks = {"a": torch.tensor([True]), "b": torch.tensor([False, False, True]), "bias": None}
    assert sparsity_of(masks) == 0.5
    assert sparsity_of({"bias": None}) == sparsity_of({}) == 0.0


def test_intersection_over_union():
    a = {"x": torch.tensor([True, True, False]), "y": torch.tensor([True])}
    b = {"x": torch.tensor([False, True, True]), "y": torch.tensor([True])}
    nothing = {"x": torch.zeros(3, dtype=torch.bool), "y": torch.zeros(1, dtype=torch.bool)}
    assert intersection_over_union(a, b) == 0.5  # 2 of 4
    assert intersection_over_union(a, a) == 1.0
    assert intersection_over_union(a, nothing) == 0.0
    assert intersection_over_union(nothing, nothing) == 1.0


def test_packing_puts_the_first_entry_in_the_highest_bit():
    mask = torch.tensor([[True, False, False, False, True], [False, False, False, True, False]])
    packed = pack_mask(mask)
    assert packed["bits"].dtype == torch.uint8
    assert packed["bits"].tolist() == [0b10001000, 0b10000000]
    assert packed["shape"] == [2, 5]
    assert torch.equal(unpack_mask(packed), mask)


# properties

WEIGHTS = st.lists(st.sampled_from([0.0, 0.5, -0.5, 1.0, -1.0, 2.0, 3.0, -7.0]), min_size=1, max_size=40)


@settings(deadline=None)
@given(
    values=WEIGHTS,
    cut=st.integers(0, 40),
    sparsity=st.floats(0, 0.999),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_global_mask_is_the_sorted_reference(values, cut, sparsity, dtype):
    cut = min(cut, len(values))  # an empty tensor on one side is allowed
    tensor = torch.tensor(values, dtype=dtype)
    masks = magnitude_masks({"a": tensor[:cut], "b": tensor[cut:]}, sparsity)
    kept = masks["a"].tolist() + masks["b"].tolist()
    assert kept == reference(values, round(sparsity * len(values)))


@settings(deadline=None)
@given(values=WEIGHTS, sparsity=st.floats(0, 0.999))
def test_layer_mask_is_the_sorted_reference(values, sparsity):
    masks = magnitude_masks({"a": torch.tensor(values), "b": -torch.tensor(values[::-1])}, sparsity, scope="layer")
    zeros = round(sparsity * len(values))
    assert masks["a"].tolist() == reference(values, zeros)
    assert masks["b"].tolist() == reference(values[::-1], zeros)


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_strides_do_not_matter(scope):
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(-3, 4, (4, 3, 5, 5), generator=generator).float()
    matrix = torch.randint(-3, 4, (6, 7), generator=generator).float()
    plain = magnitude_masks({"image": image, "matrix": matrix}, 0.6, scope=scope)
    strided = magnitude_masks(
        {"image": image.to(memory_format=torch.channels_last), "matrix": matrix.t().contiguous().t()}, 0.6, scope=scope
    )
    for name, mask in plain.items():
        assert mask.dtype == torch.bool
        assert mask.shape == strided[name].shape
        assert strided[name].is_contiguous()
        assert torch.equal(mask, strided[name])


def test_parameters_are_ranked_without_a_graph_and_left_alone():
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    mask = magnitude_masks({"w": weight}, 0.5)["w"]
    assert not mask.requires_grad
    assert weight.tolist() == [1.0, -2.0]


def test_a_mask_does_not_drag_the_pool_along():
    tensors = {"large": torch.randn(100_000, generator=torch.Generator().manual_seed(0)), "small": torch.ones(2)}
    assert len(pickle.dumps(magnitude_masks(tensors, 0.5)["small"])) < 5000


def test_random_masks_have_exact_counts_and_follow_the_generator():
    kept = kept_counts(LENET, dict.fromkeys(LENET, 0.9))
    first = random_masks(LENET, kept, generator=torch.Generator().manual_seed(1))
    again = random_masks(LENET, kept, generator=torch.Generator().manual_seed(1))
    other = random_masks(LENET, kept, generator=torch.Generator().manual_seed(2))
    for name, mask in first.items():
        assert mask.dtype == torch.bool
        assert tuple(mask.shape) == LENET[name]
        assert int(mask.sum()) == kept[name]
        assert torch.equal(mask, again[name])
    assert intersection_over_union(first, other) < 0.1  # about D / (2 - D) = 0.053 by chance


def test_random_positions_are_uniform():
    generator = torch.Generator().manual_seed(0)
    hits = sum(random_masks({"w": (2, 5)}, {"w": 3}, generator=generator)["w"].double() for _ in range(2000))
    # 600 expected at each position, standard deviation sqrt(2000 * .3 * .7) = 20.5
    assert (hits - 600).abs().max() < 5 * 20.5


def test_random_masks_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    random_masks({"w": (10,)}, {"w": 3}, generator=torch.Generator().manual_seed(0))
    assert torch.equal(before, torch.get_rng_state())


@settings(deadline=None)
@given(shape=st.lists(st.integers(0, 5), min_size=0, max_size=4), seed=st.integers(0, 1000))
def test_pack_then_unpack_is_the_identity(shape, seed):
    mask = torch.from_numpy(np.random.default_rng(seed).random(tuple(shape)) < 0.3 if shape else np.array(True))
    packed = pack_mask(mask)
    assert packed["bits"].shape == ((mask.numel() + 7) // 8,)
    assert torch.equal(unpack_mask(packed), mask)


def test_packed_masks_load_as_plain_weights():
    file = io.BytesIO()
    torch.save({"w": pack_mask(torch.tensor([True, False, True]))}, file)
    file.seek(0)
    assert unpack_mask(torch.load(file, weights_only=True)["w"]).tolist() == [True, False, True]


# errors


@pytest.mark.parametrize("sparsity", [1.0, -0.1, 1.5, math.nan, math.inf])
def test_sparsity_outside_its_range(sparsity):
    tensors = {"w": torch.ones(4)}
    message = rf"expected a sparsity in \[0, 1\), got {sparsity} for 'w'"
    for given_sparsity, scope in [(sparsity, "global"), (sparsity, "layer"), ({"w": sparsity}, "layer")]:
        with pytest.raises(ValueError, match=message):
            magnitude_masks(tensors, given_sparsity, scope=scope)
    with pytest.raises(ValueError, match=message):
        kept_counts({"w": (4,)}, {"w": sparsity})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_nan_names_its_tensor(dtype):
    tensors = {"fine": torch.ones(3, dtype=dtype), "broken": torch.tensor([1.0, math.nan, 2.0], dtype=dtype)}
    for scope in ("global", "layer"):
        with pytest.raises(ValueError, match="got NaN in 'broken'"):
            magnitude_masks(tensors, 0.5, scope=scope)


def test_scope_and_names_must_fit():
    tensors = {"a": torch.ones(2), "b": torch.ones(2)}
    with pytest.raises(
        ValueError, match="expected scope='layer' with one sparsity per tensor name, got scope='global'"
    ):
        magnitude_masks(tensors, {"a": 0.5, "b": 0.5})
    with pytest.raises(ValueError, match=r"expected one sparsity per name, got none for \['b'\]"):
        magnitude_masks(tensors, {"a": 0.5}, scope="layer")
    with pytest.raises(ValueError, match=r"expected one sparsity per name, got unknown names \['c'\]"):
        magnitude_masks(tensors, {"a": 0.5, "b": 0.5, "c": 0.5}, scope="layer")
    with pytest.raises(ValueError, match="expected scope 'global' or 'layer', got 'model'"):
        magnitude_masks(tensors, 0.5, scope="model")
    with pytest.raises(ValueError, match="expected at least one tensor to make magnitude masks for, got none"):
        magnitude_masks({}, 0.5)


@pytest.mark.parametrize("count", [-1, 5])
def test_counts_outside_their_range(count):
    message = f"expected between 0 and 4 weights to keep in 'w', got {count}"
    with pytest.raises(ValueError, match=message):
        top_masks({"w": torch.ones(4)}, {"w": count})
    with pytest.raises(ValueError, match=message):
        random_masks({"w": (4,)}, {"w": count}, generator=torch.Generator())


def test_masks_that_do_not_match():
    with pytest.raises(ValueError, match=r"expected one second mask per name, got none for \['w'\]"):
        intersection_over_union({"w": torch.tensor([True])}, {})
    with pytest.raises(ValueError, match=r"expected masks of one shape for 'w', got \(1,\) and \(2,\)"):
        intersection_over_union({"w": torch.tensor([True])}, {"w": torch.tensor([True, True])})


@pytest.mark.parametrize("bits", [torch.zeros(1, dtype=torch.uint8), torch.zeros(2), torch.zeros(2, 1).byte()])
def test_packed_mask_that_does_not_fit(bits):
    with pytest.raises(ValueError, match=r"expected a packed mask of 2 uint8 entries for shape \(3, 3\), got"):
        unpack_mask({"bits": bits, "shape": [3, 3]})
