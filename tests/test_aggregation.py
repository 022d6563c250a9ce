import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_fedsparse.aggregation import MaskedMean, WeightedMean
from lightning_fedsparse.update import MaskSet, SparseUpdate, gather


def bits(tensor):
    return tensor.contiguous().view(torch.int32)


def masked(value, mask, **kwargs):
    """A single-tensor update with the values that the mask keeps."""
    masks = {"w": None if mask is None else torch.tensor(mask)}
    return SparseUpdate({"w": torch.tensor(value)}, masks, **kwargs)


def merge(aggregator, template, *updates):
    aggregator.start(template)
    for update in updates:
        aggregator.add(update)
    return aggregator.result()


# literals


def test_weighted_mean_of_two_clients_with_10_and_30_examples():
    # FedDIP: w_G = .25 w_1 + .75 w_2
    template = {"w": torch.zeros(3)}
    first = masked([4.0, -8.0, 0.0], None, num_examples=10)
    second = masked([8.0, 8.0, 1.0], None, num_examples=30)
    assert merge(WeightedMean(), template, first, second)["w"].tolist() == [7.0, 4.0, 0.75]


@pytest.mark.parametrize(
    ("kind", "absent", "expected"),
    [
        # coordinates: held by both, by the first, by the second, by nobody; weights 1 and 3
        ("weights", "zero", [2.5, 0.5, 2.25, 0.0]),
        ("weights", "unchanged", [2.5, 8.0, 4.75, 10.0]),
        ("delta", "zero", [12.5, 10.5, 12.25, 10.0]),
        ("delta", "unchanged", [12.5, 10.5, 12.25, 10.0]),
    ],
)
def test_weighted_mean_counts_what_is_absent_as_declared(kind, absent, expected):
    template = {"w": torch.full((4,), 10.0)}
    first = masked([1.0, 2.0], [True, True, False, False], num_examples=1, kind=kind, absent=absent)
    second = masked([3.0, 3.0], [True, False, True, False], num_examples=3, kind=kind, absent=absent)
    assert merge(WeightedMean(), template, first, second)["w"].tolist() == expected


@pytest.mark.parametrize(
    ("weighting", "kind", "expected"),
    [
        ("uniform", "weights", [2.0, 2.0, 3.0, 10.0]),
        ("uniform", "delta", [12.0, 12.0, 13.0, 10.0]),
        ("examples", "weights", [2.5, 2.0, 3.0, 10.0]),
        ("examples", "delta", [12.5, 12.0, 13.0, 10.0]),
    ],
)
def test_masked_mean_is_over_holders(weighting, kind, expected):
    template = {"w": torch.full((4,), 10.0)}
    first = masked([1.0, 2.0], [True, True, False, False], num_examples=1, kind=kind, absent="unheld")
    second = masked([3.0, 3.0], [True, False, True, False], num_examples=3, kind=kind, absent="unheld")
    assert merge(MaskedMean(weighting), template, first, second)["w"].tolist() == expected


def test_masked_mean_counts_a_held_zero():
    template = {"w": torch.tensor([10.0, 10.0])}
    updates = [masked([0.0], [True, False]), masked([4.0, 0.0], [True, True])]
    assert merge(MaskedMean(), template, *updates)["w"].tolist() == [2.0, 0.0]


@pytest.mark.parametrize(("aggregator", "mean"), [(WeightedMean(), 3.25), (MaskedMean(), 2.5)])
def test_buffers_are_averaged_densely_and_integers_truncated(aggregator, mean):
    template = {
        "w": torch.zeros(1),
        "mean": torch.zeros(2),
        "steps": torch.tensor(0),
        "flag": torch.tensor([False, True]),
        "kept": torch.tensor([7.0]),
    }

    def update(value, examples):
        buffers = {
            "mean": torch.tensor([value, -value]),
            "steps": torch.tensor(-int(value)),
            "flag": torch.tensor([value > 2, True]),
        }
        return SparseUpdate({"w": torch.ones(1)}, {"w": None}, num_examples=examples, buffers=buffers)

    new = merge(aggregator, template, update(1.0, 1), update(4.0, 3))
    assert new["mean"].tolist() == [mean, -mean]
    assert new["steps"].dtype == torch.int64
    assert new["steps"].item() == -int(mean)  # towards zero, not down
    assert new["flag"].tolist() == [False, True]
    assert new["kept"].tolist() == [7.0]


def test_buffers_are_averaged_over_the_clients_that_send_them():
    template = {"w": torch.zeros(1), "mean": torch.zeros(1)}
    silent = SparseUpdate({"w": torch.ones(1)}, {"w": None}, num_examples=5)
    sent = SparseUpdate({"w": torch.ones(1)}, {"w": None}, num_examples=2, buffers={"mean": torch.tensor([3.0])})
    assert merge(WeightedMean(), template, silent, sent)["mean"].tolist() == [3.0]


# properties


@st.composite
def rounds(draw):
    """Shape, template, and clients as (values, mask or None, examples); some clients share a mask."""
    shape = draw(st.sampled_from([(), (1,), (7,), (3, 4), (2, 3, 2), (0,)]))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    clients = draw(st.integers(1, 5))
    masks = [generator.random(shape) < draw(st.sampled_from([0.0, 0.3, 0.8, 1.0])) for _ in range(2)]
    template = generator.normal(size=shape).astype(np.float32)
    picks = [draw(st.sampled_from([None, 0, 0, 1])) for _ in range(clients)]
    return template, [
        (
            generator.normal(size=shape).astype(np.float32),
            None if pick is None else np.asarray(masks[pick]),
            int(generator.integers(1, 100)),
        )
        for pick in picks
    ]


def updates_of(clients, kind, absent):
    for value, mask, examples in clients:
        masks = MaskSet.of({"w": None if mask is None else torch.from_numpy(mask.copy())})
        values = gather({"w": torch.from_numpy(value.copy())}, masks)
        yield SparseUpdate(values, masks, num_examples=examples, kind=kind, absent=absent)


def dense_weighted_mean(template, clients, kind, absent):
    total = sum(examples for *_, examples in clients)
    result = np.zeros(template.shape)
    for value, mask, examples in clients:
        missing = template.astype(float) if kind == "weights" and absent == "unchanged" else np.zeros(template.shape)
        full = value.astype(float) if mask is None else np.where(mask, value.astype(float), missing)
        result = result + full * examples / total
    return result + template if kind == "delta" else result


def dense_masked_mean(template, clients, kind, weighting):
    result = template.astype(float).copy()
    for index in np.ndindex(template.shape):
        held = [
            (float(value[index]), examples if weighting == "examples" else 1)
            for value, mask, examples in clients
            if mask is None or mask[index]
        ]
        if held:
            mean = sum(value * weight for value, weight in held) / sum(weight for _, weight in held)
            result[index] = mean + (result[index] if kind == "delta" else 0)
    return result


@settings(deadline=None, max_examples=150)
@given(rounds(), st.sampled_from(["weights", "delta"]), st.sampled_from(["zero", "unchanged"]))
def test_weighted_mean_equals_a_dense_reference(drawn, kind, absent):
    template, clients = drawn
    start = {"w": torch.from_numpy(np.array(template))}
    kept = start["w"].clone()
    new = merge(WeightedMean(), start, *updates_of(clients, kind, absent))["w"]
    np.testing.assert_allclose(new.numpy(), dense_weighted_mean(template, clients, kind, absent), rtol=1e-6, atol=1e-6)
    assert torch.equal(bits(start["w"]), bits(kept))
    held = np.zeros(template.shape, bool)
    for _, mask, _ in clients:
        held = held | (True if mask is None else mask)
    nobody = torch.from_numpy(np.array(~held))
    expected = torch.zeros_like(kept) if (kind, absent) == ("weights", "zero") else kept
    assert torch.equal(bits(new)[nobody], bits(expected)[nobody])


@settings(deadline=None, max_examples=150)
@given(rounds(), st.sampled_from(["weights", "delta"]), st.sampled_from(["uniform", "examples"]))
def test_masked_mean_equals_a_dense_reference(drawn, kind, weighting):
    template, clients = drawn
    start = {"w": torch.from_numpy(np.array(template))}
    new = merge(MaskedMean(weighting), start, *updates_of(clients, kind, "unheld"))["w"]
    expected = dense_masked_mean(template, clients, kind, weighting)
    np.testing.assert_allclose(new.numpy(), expected, rtol=1e-6, atol=1e-6)


@settings(deadline=None, max_examples=50)
@given(rounds(), st.randoms())
def test_order_of_clients_changes_no_more_than_the_last_bits(drawn, random):
    template, clients = drawn
    start = {"w": torch.from_numpy(np.array(template, np.float64))}
    updates = list(updates_of(clients, "weights", "unchanged"))
    shuffled = random.sample(updates, len(updates))
    one, other = (merge(WeightedMean(), start, *order)["w"] for order in (updates, shuffled))
    np.testing.assert_allclose(one.numpy(), other.numpy(), rtol=1e-13, atol=1e-13)
    assert torch.equal(one, merge(WeightedMean(), start, *updates)["w"])


@pytest.mark.parametrize("aggregator", [WeightedMean(), MaskedMean(), MaskedMean("examples")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mean_of_equal_clients_is_those_clients_to_the_bit(aggregator, dtype):
    weights = {"w": torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)}
    weights["w"][:2] = torch.tensor([-0.0, 1e-7])
    masks = MaskSet.of({"w": torch.rand(1000, generator=torch.Generator().manual_seed(1)) < 0.3})
    for examples in ([4], [2, 2], [1, 2, 4, 8], [3, 5, 7]):
        updates = [SparseUpdate(gather(weights, masks), masks, num_examples=count) for count in examples]
        new = merge(aggregator, weights, *updates)["w"]
        assert torch.equal(new.view(torch.int16), weights["w"].view(torch.int16))


@pytest.mark.parametrize("aggregator", [WeightedMean(), MaskedMean("examples")])
def test_all_ones_masks_give_the_bits_of_dense_updates(aggregator):
    generator = torch.Generator().manual_seed(0)
    template = {"w": torch.randn(5, 7, generator=generator)}
    values = [torch.randn(5, 7, generator=generator) for _ in range(4)]
    ones = {"w": torch.ones(5, 7, dtype=torch.bool)}
    dense = [SparseUpdate({"w": v}, {"w": None}, num_examples=n + 1) for n, v in enumerate(values)]
    sparse = [SparseUpdate({"w": v.flatten()}, ones, num_examples=n + 1) for n, v in enumerate(values)]
    expected = merge(aggregator, template, *dense)["w"]
    assert torch.equal(bits(merge(aggregator, template, *sparse)["w"]), bits(expected))


def test_supports_that_part_late_change_nothing_of_what_was_summed():
    generator = torch.Generator().manual_seed(0)
    template = {"w": torch.randn(100, generator=generator)}
    masks = [MaskSet.of({"w": torch.rand(100, generator=generator) < 0.5}) for _ in range(2)]
    updates = [SparseUpdate(gather({"w": torch.randn(100, generator=generator)}, m), m) for m in (*masks, *masks)]
    orders = [
        merge(MaskedMean(), template, *(updates[i] for i in order))["w"] for order in ((0, 2, 1, 3), (0, 1, 2, 3))
    ]
    both = masks[0]["w"] & masks[1]["w"]
    assert torch.equal(orders[0][~both], orders[1][~both])  # the same terms in the same order


def test_result_keeps_layout_and_is_new():
    template = {"w": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last), "untouched": torch.ones(2)}
    mask = torch.rand(2, 3, 4, 4) < 0.5
    update = SparseUpdate(gather({"w": template["w"] + 1}, {"w": mask}), {"w": mask})
    new = merge(WeightedMean(), template, update)
    assert new["w"].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(new["w"], torch.where(mask, template["w"] + 1, template["w"]))
    new["untouched"].zero_()
    assert template["untouched"].tolist() == [1.0, 1.0]


def test_update_may_be_overwritten_once_added():
    values = {"w": torch.tensor([1.0, 2.0], dtype=torch.float64), "v": torch.ones(2)}
    template = {name: torch.zeros_like(value) for name, value in values.items()}
    mean = WeightedMean()
    mean.start(template)
    for _ in range(2):
        mean.add(SparseUpdate(values, {"w": None, "v": None}, num_examples=3))
    for value in values.values():
        value.fill_(float("nan"))
    new = mean.result()
    assert new["w"].tolist() == [1.0, 2.0]
    assert new["v"].tolist() == [1.0, 1.0]


def test_updates_are_not_kept():
    template = {"w": torch.zeros(6), "mean": torch.zeros(1)}
    mean = MaskedMean()
    mean.start(template)
    values = []
    for mask in ([True] * 6, [True] * 6, [True, False] * 3):
        update = masked([1.0] * sum(mask), mask, buffers={"mean": torch.ones(1)})
        values += [weakref.ref(tensor) for tensor in (update.values["w"], update.buffers["mean"])]
        mean.add(update)
        del update
    assert [value() for value in values] == [None] * 6


def test_start_begins_anew():
    mean = WeightedMean()
    merge(mean, {"w": torch.zeros(1)}, masked([1.0], None, kind="delta"))
    assert merge(mean, {"v": torch.zeros(1)}, SparseUpdate({"v": torch.ones(1)}, {"v": None}))["v"].item() == 1.0


# errors


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (masked([1.0], [True, False], kind="delta"), "expected updates of kind 'weights' with absent 'unchanged'"),
        (masked([1.0], [True, False], absent="zero"), "got 'weights' with 'zero'"),
        (SparseUpdate({}, {}), r"values of the same tensors in all updates of a round, got a difference \['w'\]"),
        (masked([1.0, 2.0, 3.0], None), r"expected 'w' of shape \(2,\), got \(3,\)"),
        (masked([1.0, 2.0], [True, False]), "expected the 1 values that the mask of 'w' keeps, got 2"),
        (masked([1.0, 2.0], None, num_examples=-1), "expected num_examples of at least 0, got -1"),
        (masked([1.0, 2.0], None, buffers={"x": torch.ones(1)}), "expected names of the template, got 'x'"),
        (masked([1.0, 2.0], None, absent="unheld"), "with 'unheld'"),
    ],
)
def test_update_that_does_not_fit_is_refused_and_leaves_no_trace(second, message):
    mean = WeightedMean()
    mean.start({"w": torch.zeros(2)})
    mean.add(masked([1.0, 2.0], None, num_examples=2))
    with pytest.raises(ValueError, match=message):
        mean.add(second)
    assert mean.result()["w"].tolist() == [1.0, 2.0]


def test_weighted_mean_points_to_masked_mean_for_unheld_updates():
    mean = WeightedMean()
    mean.start({"w": torch.zeros(2)})
    with pytest.raises(ValueError, match="got 'unheld': MaskedMean averages over holders"):
        mean.add(masked([1.0, 2.0], None, absent="unheld"))


@pytest.mark.parametrize("aggregator", [WeightedMean(), MaskedMean()])
def test_calls_out_of_order(aggregator):
    with pytest.raises(ValueError, match="start"):
        aggregator.add(masked([1.0], None))
    aggregator.start({"w": torch.zeros(1)})
    with pytest.raises(ValueError, match="expected at least one update"):
        aggregator.result()


@pytest.mark.parametrize("aggregator", [WeightedMean(), MaskedMean("examples")])
def test_total_weight_of_zero(aggregator):
    with pytest.raises(ValueError, match="got a total weight of 0"):
        merge(aggregator, {"w": torch.zeros(1)}, masked([1.0], None, num_examples=0))


def test_unknown_weighting():
    with pytest.raises(ValueError, match="expected weighting 'uniform' or 'examples', got 'examplse'"):
        MaskedMean("examplse")


# who holds what


def counted_by_hand(updates, size):
    """Sums and holders' weights in float64, entry by entry."""
    sums, held = np.zeros(size), np.zeros(size)
    for update in updates:
        mask = np.ones(size, bool) if update.masks["w"] is None else update.masks["w"].numpy()
        full = np.zeros(size)
        full[mask] = update.values["w"].numpy()
        sums += update.num_examples * full
        held += update.num_examples * mask
    return sums, held


@settings(deadline=None, max_examples=80)
@given(st.data())
def test_nested_and_many_supports_are_counted_right(data):
    size = 200
    importance = np.random.default_rng(data.draw(st.integers(0, 2**32))).random(size)
    masks = [None if level == 10 else torch.from_numpy(importance < level / 10) for level in range(11)]
    picks = data.draw(st.lists(st.integers(0, 10), min_size=1, max_size=30))
    generator = torch.Generator().manual_seed(len(picks))
    updates = []
    for number, pick in enumerate(picks):
        # half of the masks are equal and not the same object
        mask = masks[pick] if masks[pick] is None or number % 2 else masks[pick].clone()
        value = torch.randn(size if mask is None else int(mask.sum()), generator=generator)
        examples = data.draw(st.sampled_from([0, 1, 7, 2**31 - 5]))
        updates.append(SparseUpdate({"w": value}, {"w": mask}, num_examples=examples, absent="unheld"))
    sums, held = counted_by_hand(updates, size)
    template = {"w": torch.randn(size, generator=generator, dtype=torch.float64)}
    if sum(update.num_examples for update in updates) == 0:
        return
    new = merge(MaskedMean("examples"), template, *updates)["w"].numpy()
    expected = np.where(held > 0, sums / np.maximum(held, 1), template["w"].numpy())
    np.testing.assert_allclose(new, expected, rtol=1e-9, atol=1e-9)
    assert np.array_equal(new[held == 0], template["w"].numpy()[held == 0])


@pytest.mark.parametrize("aggregator", [WeightedMean(dtype="float32"), MaskedMean("examples", dtype="float32")])
def test_sums_in_float32(aggregator):
    generator = torch.Generator().manual_seed(0)
    template = {"w": torch.randn(3_000_000, generator=generator), "steps": torch.tensor(0)}
    kept = template["w"].clone()
    updates = []
    for examples in (3, 5, 9):
        masks = MaskSet.of({"w": torch.rand(3_000_000, generator=generator) < 0.1})
        values = gather({"w": torch.randn(3_000_000, generator=generator)}, masks)
        # more steps than float32 can count
        buffers = {"steps": torch.tensor(2**30 + 1)}
        updates.append(SparseUpdate(values, masks, num_examples=examples, absent="unchanged", buffers=buffers))
    new = merge(aggregator, template, *updates)
    exact = merge(type(aggregator)(**({"weighting": "examples"} if isinstance(aggregator, MaskedMean) else {})),
                  template, *updates)  # fmt: skip
    assert new["w"].dtype == torch.float32
    assert (new["w"] - exact["w"]).abs().max() < 1e-5
    assert new["steps"].item() == 2**30 + 1
    assert torch.equal(template["w"], kept)
    nobody = ~(updates[0].masks["w"] | updates[1].masks["w"] | updates[2].masks["w"])
    if isinstance(aggregator, MaskedMean):
        assert torch.equal(bits(new["w"])[nobody], bits(kept)[nobody])


def test_negative_zeros_that_nobody_holds_keep_their_sign():
    template = {"w": torch.tensor([-0.0, -0.0, 1.0])}
    updates = [masked([1.0], [False, False, True], kind="delta"), masked([1.0], [False, True, False], kind="delta")]
    for aggregator in (WeightedMean(), WeightedMean(dtype="float32"), MaskedMean()):
        assert merge(aggregator, template, *updates)["w"][:1].signbit().all()


def test_a_result_ends_the_round():
    mean = WeightedMean()
    merge(mean, {"w": torch.zeros(1)}, masked([1.0], None))
    with pytest.raises(ValueError, match=r"expected start\(template\) before"):
        mean.result()


def test_unknown_type_of_sums():
    with pytest.raises(ValueError, match=r"expected dtype to be one of \('float32', 'float64'\), got 'float16'"):
        WeightedMean(dtype="float16")


@pytest.mark.parametrize("count", [3, 40])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_memory_is_that_of_the_model_whatever_the_cohort(count, dtype):
    """What is allocated at any time, from torch's own count of it, against sums, counts and one update."""
    size, kept = 1_000_000, 50_000
    generator = torch.Generator().manual_seed(0)
    template = {"w": torch.zeros(size)}
    mean = MaskedMean("examples", dtype=dtype)

    def update(number):
        where = torch.randperm(size, generator=generator)[:kept]
        mask = torch.zeros(size, dtype=torch.bool)
        mask[where] = True
        masks = MaskSet(str(number), {"w": mask})
        masks.positions("w")
        return SparseUpdate({"w": torch.ones(kept)}, masks, num_examples=number + 1, absent="unheld", kind="delta")

    def whole_round():
        mean.start(template)
        for number in range(count):
            mean.add(update(number))
        mean.result()

    element = 4 if dtype == "float32" else 8
    # a model in the sums' own type, counts of four bytes, and an update: mask, positions, values
    allowed = 1.2 * ((element + 4) * size + size + (8 + element) * kept)
    # and what making the update by randperm takes here
    assert peak_of(whole_round) < allowed + peak_of(lambda: update(0))


def peak_of(function):
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def test_changes_count_among_deltas_alone():
    mean = MaskedMean(count="changed")
    mean.start({"w": torch.ones(2)})
    with pytest.raises(ValueError, match="expected deltas where changes count, got an update of kind 'weights'"):
        mean.add(SparseUpdate({"w": torch.ones(2)}, {"w": None}))
    mean.add(SparseUpdate({"w": torch.tensor([0.0, 1.0])}, {"w": None}, kind="delta", absent="unheld"))
    mean.add(
        SparseUpdate({"w": torch.tensor([4.0])}, {"w": torch.tensor([True, False])}, kind="delta", absent="unheld")
    )
    assert mean.result()["w"].tolist() == [5, 2]
    with pytest.raises(ValueError, match="expected count 'held' or 'changed', got 'nonzero'"):
        MaskedMean(count="nonzero")
