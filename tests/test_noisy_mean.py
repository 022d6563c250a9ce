"""The mean with noise: how large it is and where it falls, what one client can change, what repeats."""

import math

import pytest
import torch

from lightning_fedsparse.aggregation import MaskedMean
from lightning_fedsparse.callbacks import fiarse
from lightning_fedsparse.noisy_mean import NoisyMean
from lightning_fedsparse.update import SparseUpdate
from tests.failing_clients import assert_same, run, weights
from tests.test_loop import Net, clients, loaders
from tests.test_rank_sums import on_ranks

SIZE = 200_000


def sparse(value, held, size=SIZE, **arguments):
    mask = torch.arange(size) < held
    return SparseUpdate({"w": torch.full((held,), value)}, {"w": mask}, kind="delta", absent="unheld", **arguments)


def merge(rule, updates, template):
    rule.start(template)
    for update in updates:
        rule.add(update)
    return rule.result()


@pytest.mark.parametrize(("clients", "deviation"), [(1, 1.0), (2, 0.5), (5, 0.2), (10, 0.1)])
def test_noise_by_the_number_of_holders(clients, deviation):
    updates = [sparse(0.0, SIZE) for _ in range(clients)]
    new = merge(NoisyMean(1.0, 1.0, seed=0), updates, {"w": torch.zeros(SIZE)})["w"]
    assert new.std().item() == pytest.approx(deviation, rel=0.01)  # the estimate's own deviation is 0.0016 of it
    assert abs(new.mean().item()) < 5 * deviation / math.sqrt(SIZE)


def test_noise_of_submodels_within_each_other():
    held = [SIZE, SIZE // 2, SIZE // 4]
    rule = NoisyMean(2.0, 1.5, holders="masks", seed=1)
    new = merge(rule, [sparse(0.0, count) for count in held], {"w": torch.zeros(SIZE)})["w"]
    quarters = new.view(4, -1)
    assert quarters[0].std().item() == pytest.approx(3.0 / 3, rel=0.02)
    assert quarters[1].std().item() == pytest.approx(3.0 / 2, rel=0.02)
    assert quarters[2:].std().item() == pytest.approx(3.0, rel=0.02)


@pytest.mark.parametrize(("size", "length"), [(174_443, 417.66374), (11_164_362, 3341.311419)])
def test_how_long_the_noise_is(size, length):
    new = merge(NoisyMean(1.0, 1.0, seed=2), [sparse(0.0, size, size)], {"w": torch.zeros(size)})["w"]
    assert math.sqrt(size) == pytest.approx(length, abs=1e-5)
    assert new.double().norm().item() == pytest.approx(length, rel=0.005)


def test_what_nobody_holds_keeps_its_bits():
    template = {"w": torch.full((6,), 0.1), "b": torch.full((2,), 0.3)}
    new = merge(NoisyMean(1.0, 1.0, holders="masks", seed=0), [sparse(0.5, 2, 6), sparse(0.5, 3, 6)], template)
    assert torch.equal(new["w"][3:], template["w"][3:])
    assert torch.equal(new["b"], template["b"])
    assert (new["w"][:3] != template["w"][:3]).all()


def test_changes_are_bounded_over_all_their_weights():
    template = {"w": torch.zeros(2), "b": torch.zeros(1)}
    far = SparseUpdate({"w": torch.tensor([3.0, 4.0]), "b": torch.tensor([12.0])}, {"w": None, "b": None}, kind="delta")
    near = SparseUpdate({"w": torch.tensor([0.3, 0.4]), "b": torch.tensor([1.2])}, {"w": None, "b": None}, kind="delta")
    new = merge(NoisyMean(2.6, 0.0), [far, near], template)
    assert new["w"].tolist() == pytest.approx([(0.6 + 0.3) / 2, (0.8 + 0.4) / 2])
    assert new["b"].tolist() == pytest.approx([(2.4 + 1.2) / 2])


def test_without_noise_and_far_bounds_it_is_the_masked_mean():
    updates = [sparse(0.5, 2, 6), sparse(-1.0, 3, 6)]
    template = {"w": torch.arange(6.0)}
    rule = NoisyMean(1e6, 0.0, holders="masks")
    assert torch.equal(merge(rule, updates, template)["w"], merge(MaskedMean(), updates, template)["w"])


@pytest.mark.parametrize(
    ("absent", "kind", "expected"),
    [
        ("zero", "weights", [3.0, -1.0]),  # pruned: from 1 to 0, and 5 - 2 = 3
        ("unchanged", "weights", [3.0, 0.0]),
        ("zero", "delta", [5.0, 0.0]),
        ("unheld", "delta", [5.0, 0.0]),
    ],
)
def test_who_chose_what_to_send_gives_nothing_away(absent, kind, expected):
    # neither of two clients sends the second weight, and both count there
    template = {"w": torch.tensor([2.0, 1.0])}
    mask = torch.tensor([True, False])
    updates = [SparseUpdate({"w": torch.tensor([5.0])}, {"w": mask}, kind=kind, absent=absent) for _ in range(2)]
    new = merge(NoisyMean(1e6, 0.0), updates, template)["w"]
    assert (new - template["w"]).tolist() == pytest.approx(expected)
    noisy = merge(NoisyMean(1e6, 1e-9, seed=0), updates, template)["w"]
    assert (noisy != new).all()


def test_the_same_seed_and_weights_repeat_and_nothing_else():
    template, other = {"w": torch.zeros(9)}, {"w": torch.ones(9)}
    updates = [sparse(0.0, 9, 9)]
    first = merge(NoisyMean(1.0, 1.0, seed=3), updates, template)["w"]
    assert torch.equal(merge(NoisyMean(1.0, 1.0, seed=3), updates, template)["w"], first)
    assert not torch.equal(merge(NoisyMean(1.0, 1.0, seed=4), updates, template)["w"], first)
    assert not torch.equal(merge(NoisyMean(1.0, 1.0, seed=3), updates, other)["w"] - 1, first)
    noises = []
    for bits in (5, 5 + 2**32, 5 + 2**100):  # a generator that took fewer bits of them could be guessed
        rule = NoisyMean(1.0, 1.0)
        rule.start(template)
        rule._drawn = bits
        rule.add(updates[0])
        noises.append(rule.result()["w"])
    assert not torch.equal(noises[0], noises[1])
    assert not torch.equal(noises[0], noises[2])
    unseeded = NoisyMean(1.0, 1.0)
    assert not torch.equal(merge(unseeded, updates, template)["w"], merge(unseeded, updates, template)["w"])


@pytest.mark.parametrize("seed", [None, 7])
def test_ranks_draw_the_same_noise_once(seed):
    template = {"w": torch.zeros(SIZE)}

    def mean(ranks):
        rule = NoisyMean(1.0, 1.0, seed=seed)
        rule.start(template)
        rule.add(sparse(0.0, SIZE))
        rule.reduce(ranks)
        return rule.result()["w"]

    first, second = on_ranks(2, mean)
    assert torch.equal(first, second)
    assert first.std().item() == pytest.approx(0.5, rel=0.01)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NoisyMean(0.0, 1.0), "expected bound above 0, got 0.0"),
        (lambda: NoisyMean(math.inf, 1.0), "expected bound above 0, got inf"),
        (lambda: NoisyMean(1.0, 1.0, holders="some"), "expected holders 'all' or 'masks', got 'some'"),
        (
            lambda: merge(NoisyMean(1.0, 1.0), [sparse(math.nan, 2, 2)], {"w": torch.zeros(2)}),
            "expected changes with a finite norm, got nan",
        ),
        (
            lambda: merge(NoisyMean(1.0, 1.0), [sparse(math.inf, 2, 2)], {"w": torch.zeros(2)}),
            "expected changes with a finite norm, got inf",
        ),
        (lambda: NoisyMean(1.0, -1.0), "expected noise of at least 0, got -1.0"),
        (
            lambda: merge(
                NoisyMean(1.0, 1.0),
                [sparse(0.0, 2, 2, buffers={"m": torch.zeros(1)})],
                {"w": torch.zeros(2), "m": torch.zeros(1)},
            ),
            r"expected updates without buffers, which noise does not cover, got 'm': take a network",
        ),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_federation_repeats_and_goes_on_to_the_same_noise(tmp_path):
    arguments = {"per_round": 6, "buffers": "local"}
    rule = NoisyMean(0.5, 0.1, holders="masks", seed=5)
    expected = run({}, fiarse(), aggregator=rule, **arguments)
    quiet = run({}, fiarse(), aggregator=NoisyMean(0.5, 0.0, holders="masks"), **arguments)
    assert not torch.equal(*(loop.state.weights["first.weight"] for loop in (expected, quiet)))
    run({}, fiarse(), rounds=2, aggregator=rule, default_root_dir=tmp_path, **arguments)
    resumed = run({}, fiarse(), fit=False, aggregator=rule, default_root_dir=tmp_path, **arguments)
    torch.manual_seed(0)
    resumed.fit(Net(), loaders(clients()), ckpt_path="last")
    assert_same(weights(resumed), weights(expected))
