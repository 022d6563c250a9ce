"""Robust means: the numbers of a hand-made attack, the dense rules of numpy, what a coordinate's holders can bear."""

from functools import partial

import numpy as np
import pytest
import torch

from lightning_fedsparse.aggregation import MaskedMean
from lightning_fedsparse.callbacks import fiarse, sparsyfed
from lightning_fedsparse.failures import TooFewClientsError
from lightning_fedsparse.faults import FaultPolicy
from lightning_fedsparse.robust import ClippedMean, Krum, TrimmedMean, krum_scores
from lightning_fedsparse.testing import Fault
from lightning_fedsparse.update import SparseUpdate
from tests.failing_clients import always, moving, run

# five clients hold the first 4, 4, 3, 2 and 1 of four coordinates; the last one that each of the last four holds is an attack
ATTACK = [[0.1, 0.2, 0.3, 0.4], [0.12, 0.18, 0.26, -9.0], [0.08, 0.22, 9.0], [0.11, -9.0], [9.0]]


def nested(rows, size=4, **arguments):
    for row in rows:
        mask = torch.arange(size) < len(row)
        values = torch.tensor(row, dtype=torch.float64)
        yield SparseUpdate({"w": values}, {"w": mask}, kind="delta", absent="unheld", **arguments)


def merge(rule, updates, template=None):
    rule.start(template or {"w": torch.zeros(4, dtype=torch.float64)})
    for update in updates:
        rule.add(update)
    return rule.result()


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (MaskedMean(), [1.882, -2.1, 3.186667, -4.3]),
        (TrimmedMean(0.0), [1.882, -2.1, 3.186667, -4.3]),
        (TrimmedMean(), [0.11, 0.19, 0.3, -4.3]),
        (TrimmedMean(0.25), [0.11, 0.19, 3.186667, -4.3]),
        (TrimmedMean(0.34), [0.11, 0.19, 0.3, -4.3]),
        (Krum(hostile=1), [0.1, 0.19, 0.3, -4.3]),  # the first client's where all hold, the median elsewhere
        (ClippedMean("l2"), [1.881981, -2.100043, 3.185822, -4.297161]),
    ],
)
def test_five_clients_of_whom_four_attack_a_coordinate(rule, expected):
    assert merge(rule, nested(ATTACK))["w"].tolist() == pytest.approx(expected, abs=1e-6)


def test_zeros_in_place_of_absent_clients_would_let_two_of_five_decide():
    filled = [
        SparseUpdate({"w": torch.tensor(row + [0.0] * (4 - len(row)), dtype=torch.float64)}, {"w": None}, kind="delta")
        for row in ATTACK
    ]
    assert merge(TrimmedMean(), filled)["w"].tolist() == pytest.approx([0.11, 0.18, 0.26, 0.0])


def test_krums_scores():
    scores = krum_scores({"w": torch.zeros(4)}, list(nested(ATTACK)), 1)
    assert scores.tolist() == pytest.approx([47.320867, 47.5542, 50.693867, 84.4563, 157.8865], abs=1e-6)


def test_lengths_per_weight_do_not_clip_who_holds_more():
    rows = [[1.0, 1.0, 1.0, 1.0], [1.0], [1.0]]  # l2 norms 2, 1, 1; per weight all 1
    assert merge(ClippedMean(), nested(rows))["w"].tolist() == [1.0, 1.0, 1.0, 1.0]
    assert merge(ClippedMean("l2"), nested(rows))["w"].tolist() == pytest.approx([5 / 6, 0.5, 0.5, 0.5])


@pytest.fixture
def dense():
    generator = torch.Generator().manual_seed(5)
    return torch.randn(7, 150_000, generator=generator, dtype=torch.float64)


def test_where_all_hold_everything_the_rules_are_the_dense_ones(dense):
    updates = [SparseUpdate({"w": row}, {"w": None}, kind="delta") for row in dense]
    template = {"w": torch.zeros(150_000, dtype=torch.float64)}
    numbers = dense.numpy()
    assert np.allclose(merge(TrimmedMean(), updates, template)["w"], np.median(numbers, 0), atol=1e-15)
    assert np.allclose(merge(TrimmedMean(0.3), updates, template)["w"], np.sort(numbers, 0)[2:5].mean(0), atol=1e-15)
    distances = ((numbers[:, None] - numbers[None]) ** 2).mean(2)
    scores = np.sort(distances, 1)[:, 1:5].sum(1)  # without oneself, the 7 - 1 - 2 smallest
    assert np.allclose(krum_scores(template, updates, 1), scores)
    closest = np.argsort(scores)[:3]
    assert np.allclose(merge(Krum(1, keep=3), updates, template)["w"], numbers[closest].mean(0), atol=1e-15)
    norms = np.linalg.norm(numbers, axis=1)
    clipped = numbers * np.minimum(1, np.median(norms) / norms)[:, None]
    assert np.allclose(merge(ClippedMean(), updates, template)["w"], clipped.mean(0), atol=1e-15)


@pytest.mark.parametrize("rule", [TrimmedMean(), Krum(1), Krum(1, keep=2), ClippedMean()])
def test_uploads_of_weights_are_changes_of_what_the_server_holds(rule):
    generator = torch.Generator().manual_seed(6)
    template = {"w": torch.randn(3, 4, generator=generator), "b": torch.randn(2, generator=generator)}
    changed, weights = [], []
    for index in range(5):
        values = {name: old + torch.randn(old.shape, generator=generator) for name, old in template.items()}
        mask = torch.rand(3, 4, generator=generator) < 0.7
        masks = {"w": mask, "b": None}
        kept = {"w": values["w"][mask], "b": values["b"]}
        weights.append(SparseUpdate(kept, masks, absent="unchanged", num_examples=index + 1))
        deltas = {
            "w": kept["w"].double() - template["w"][mask].double(),
            "b": kept["b"].double() - template["b"].double(),
        }
        changed.append(SparseUpdate(deltas, masks, kind="delta", absent="unchanged"))
    one, other = merge(rule, weights, template), merge(rule, changed, template)
    for name, old in template.items():
        assert torch.equal(one[name], other[name])
        assert one[name].dtype == old.dtype
        assert not torch.equal(one[name], old)


def test_what_is_not_sent_but_known_counts():
    one, other = torch.tensor([True, False]), torch.tensor([False, True])
    updates = [SparseUpdate({"w": torch.tensor([1.0])}, {"w": one}, kind="delta") for _ in range(9)]
    updates.append(SparseUpdate({"w": torch.tensor([1e9])}, {"w": other}, kind="delta"))
    assert merge(TrimmedMean(), updates, {"w": torch.zeros(2)})["w"].tolist() == [1.0, 0.0]


def test_krum_follows_nobody_where_few_could_compare():
    generator = torch.Generator().manual_seed(0)
    rows = [(torch.randn(100, generator=generator).double() + 0.3).tolist() for _ in range(9)]
    for row in rows[:3]:
        row += [0.5] * 50  # the larger clients
    traitor = [0.3] * 100 + [1e6] * 50  # in the middle of what all see
    updates = list(nested([*rows, traitor], size=150))
    assert int(krum_scores({"w": torch.zeros(150)}, updates, 2).argmin()) == 9
    new = merge(Krum(2), updates, {"w": torch.zeros(150)})["w"]
    assert new[:100].tolist() == pytest.approx([0.3] * 100)
    assert new[100:].tolist() == [0.5] * 50
    # and so does a client that is right about one weight, and sends no other
    one = list(nested([*[[1.0] * 4] * 6, [1.0]]))
    assert merge(Krum(2), one)["w"].tolist() == [1.0] * 4


def test_clients_that_share_nothing_are_infinitely_apart():
    masks = [torch.arange(3) == index for index in range(3)]
    updates = [SparseUpdate({"w": torch.tensor([9.0])}, {"w": mask}, kind="delta", absent="unheld") for mask in masks]
    assert krum_scores({"w": torch.zeros(3)}, updates, 0).tolist() == [float("inf")] * 3


def test_shares_of_many_holders_are_not_rounded_away():
    # 0.42 * 150 is 62.99... in floating point; without 63 on either side 24 are left
    values = [0.0] * 62 + [-200.0] + [1.0] * 24 + [200.0] + [2e3] * 62
    updates = [SparseUpdate({"w": torch.tensor([value])}, {"w": None}, kind="delta") for value in values]
    values[:63] = sorted(values[:63])
    assert merge(TrimmedMean(0.42), updates, {"w": torch.zeros(1)})["w"].item() == pytest.approx(1.0)


def test_what_a_client_prunes_counts_as_zero():
    mask = torch.tensor([False, True])
    pruned = [SparseUpdate({"w": torch.tensor([3.0])}, {"w": mask}, absent="zero") for _ in range(3)]
    assert merge(TrimmedMean(), pruned, {"w": torch.tensor([7.0, 1.0])})["w"].tolist() == [0.0, 3.0]


@pytest.mark.parametrize("rule", [TrimmedMean(), Krum(0), ClippedMean()])
def test_what_nobody_holds_keeps_its_bits(rule):
    template = {"w": torch.tensor([0.1, 0.2, 0.3, float("nan")])}
    new = merge(rule, nested([[1.0], [1.0, 1.0], [2.0, 1.0]]), template)["w"]
    assert torch.equal(new[2:].view(torch.int32), template["w"][2:].view(torch.int32))
    assert new[0] > 1


@pytest.mark.parametrize("rule", [TrimmedMean(), Krum(0), Krum(0, keep=3), ClippedMean()])
def test_buffers_by_their_median(rule):
    template = {"w": torch.zeros(4), "mean": torch.zeros(2), "count": torch.tensor(5)}
    # the first, whose change is in the middle, lies
    sent = [(1.0, 900.0, 99), (0.9, 2.0, 6), (1.1, 3.0, 7)]
    updates = [
        SparseUpdate(
            {"w": torch.full((4,), change)},
            {"w": None},
            kind="delta",
            buffers={"mean": torch.tensor([1.0, value]), "count": torch.tensor(count)},
        )
        for change, value, count in sent
    ]
    new = merge(rule, updates, template)
    assert new["mean"].tolist() == [1.0, 3.0]
    assert new["count"].tolist() == 7
    assert new["count"].dtype == torch.int64


@pytest.mark.parametrize("infinity", [float("inf"), -float("inf"), float("nan")])
def test_what_is_not_finite_in_a_buffer_counts_as_not_sent(infinity):
    buffers = [torch.tensor([value]) for value in (1.0, 2.0, infinity, infinity)]
    updates = [SparseUpdate({}, {}, buffers={"mean": buffer}) for buffer in buffers]
    assert merge(TrimmedMean(), updates, {"mean": torch.zeros(1)})["mean"].tolist() == [1.5]


def test_the_order_of_uploads_does_not_matter():
    updates = list(nested(ATTACK))
    for rule in (TrimmedMean(0.3), Krum(1)):
        assert torch.equal(merge(rule, updates)["w"], merge(rule, updates[::-1])["w"])


def test_channels_last_stays():
    old = torch.zeros(2, 3, 2, 2).to(memory_format=torch.channels_last)
    update = SparseUpdate({"w": torch.arange(24.0).view(2, 3, 2, 2)}, {"w": None}, kind="delta")
    for rule in (TrimmedMean(), ClippedMean()):
        new = merge(rule, [update], {"w": old})["w"]
        assert new.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(new, update.values["w"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrimmedMean(0.6), r"expected trim in \[0, 0.5\], got 0.6"),
        (lambda: Krum(-1), "expected hostile of at least 0 and keep of at least 1, got -1 and 1"),
        (lambda: Krum(1, keep=0), "expected hostile of at least 0 and keep of at least 1, got 1 and 0"),
        (lambda: ClippedMean("max"), "expected norm 'rms' or 'l2', got 'max'"),
        (
            lambda: merge(Krum(1), nested(ATTACK[:4])),
            r"expected at least 5 updates for Krum\(hostile=1, keep=1\), got 4",
        ),
        (
            lambda: run({}, fit=False, per_round=6, aggregator=Krum(0, keep=7)),
            r"expected at least 7 clients per round for Krum\(hostile=0, keep=7\), got 6",
        ),
        (
            lambda: krum_scores({"w": torch.zeros(4)}, list(nested(ATTACK[:3])), 1),
            "expected at least 4 updates where 1 may be hostile, got 3",
        ),
        (lambda: merge(TrimmedMean(), nested([[1.0], [float("nan")]])), "expected finite values, got others in 'w'"),
        (
            lambda: merge(ClippedMean(), [*nested([[1.0]]), SparseUpdate({}, {}, kind="delta")]),
            r"expected values of the same tensors in all updates of a round, got a difference \['w'\]",
        ),
        (lambda: merge(TrimmedMean(), []), "expected at least one update"),
        (lambda: TrimmedMean().result(), r"expected start\(template\) before"),
        (lambda: merge(TrimmedMean(), nested([[1.0]], 3)), r"expected 'w' of shape \(4,\), got \(3,\)"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("method", [list, moving, partial(sparsyfed, sparsity=0.5), fiarse])
@pytest.mark.parametrize("rule", [TrimmedMean(), TrimmedMean(0.2), Krum(1, keep=3), ClippedMean()])
def test_one_client_that_explodes_does_not_carry_a_federation_away(method, rule):
    def largest(plan, **arguments):
        loop = run(plan, method(), per_round=6, **arguments)
        assert not any(record.failures for record in loop.history[1:])
        return max(float(weight.abs().max()) for weight in loop.state.weights.values())

    plan = always("c1", Fault.EXPLODES)
    assert largest(plan, aggregator=rule) < 2 * largest({}) < largest(plan) / 10


def test_a_round_of_too_few_for_krum_is_one_that_the_policy_decides():
    plan = {**always("c1", Fault.DROPPED), **always("c2", Fault.DROPPED)}
    arguments = {"per_round": 6, "aggregator": Krum(1)}
    with pytest.raises(TooFewClientsError, match="at least 5"):
        run(plan, **arguments)
    plan = {key: fault for key, fault in plan.items() if key[0] == 1}
    loop = run(plan, faults=FaultPolicy(when_fewer="skip"), **arguments)
    assert [record.skipped for record in loop.history[1:]] == [False, True, False]


def test_clipping_makes_what_clients_pruned_dense_and_the_other_rules_do_not():
    def sparsity(rule):
        return run({}, sparsyfed(0.5), per_round=6, aggregator=rule).history[-1].sparsity

    assert sparsity(ClippedMean()) < 0.1
    for rule in (None, TrimmedMean(), Krum(1)):
        assert sparsity(rule) > 0.4
