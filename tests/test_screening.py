"""Screening: sizes and directions by hand and against dense tensors, and what a federation makes of them."""

import math
from functools import partial

import pytest
import torch
from torch.utils.data import TensorDataset

from lightning_fedsparse.callbacks import fiarse, sparsyfed
from lightning_fedsparse.failures import FailureReason
from lightning_fedsparse.faults import FaultPolicy
from lightning_fedsparse.screening import Screen, Screening, alignment, change_of, size_of, too_large
from lightning_fedsparse.testing import Fault
from lightning_fedsparse.update import SparseUpdate, reconstruct
from tests.failing_clients import always, assert_same, moving, reasons, run, weights
from tests.test_loop import loaders

MASK = torch.tensor([True, False, True, False])
WEIGHTS = {"w": torch.tensor([1.0, 2.0, 3.0, 4.0])}


def update(values, mask=MASK, **fields):
    return SparseUpdate({"w": torch.tensor(values)}, {"w": mask}, **fields)


@pytest.mark.parametrize(
    ("one", "change", "where"),
    [
        (update([2.0, 5.0], absent="unchanged"), [1.0, 2.0], [0, 2]),
        (update([2.0, 5.0], absent="zero"), [1.0, -2.0, 2.0, -4.0], None),
        (update([2.0, 5.0], kind="delta", absent="unheld"), [2.0, 5.0], [0, 2]),
        (update([2.0, 5.0], kind="delta", absent="zero"), [2.0, 5.0], [0, 2]),
        (update([2.0, 2.0, 2.0, 2.0], None), [1.0, 0.0, -1.0, -2.0], None),
        (update([2.0, 2.0, 2.0, 2.0], None, kind="delta"), [2.0, 2.0, 2.0, 2.0], None),
    ],
)
def test_a_change_is_what_the_server_would_see(one, change, where):
    found, positions = change_of(WEIGHTS, one)["w"]
    assert found.tolist() == change
    assert (None if positions is None else positions.tolist()) == where
    dense = torch.zeros(4, dtype=torch.float64)
    dense[slice(None) if positions is None else positions] = found
    assert torch.equal(dense.float(), reconstruct(WEIGHTS, one)["w"] - WEIGHTS["w"])


def test_sizes_of_clients_of_different_size_compare():
    change = change_of(WEIGHTS, update([4.0, 7.0]))  # 3 and 4 at two weights
    assert size_of(change) == pytest.approx(math.sqrt(25 / 2))
    assert size_of(change_of(WEIGHTS, update([], torch.zeros(4, dtype=torch.bool)))) == 0.0
    everywhere = change_of(WEIGHTS, update([1.0, 1.0, 1.0, 1.0], None, kind="delta"))
    small = change_of(WEIGHTS, update([1.0, 1.0], kind="delta"))
    assert size_of(everywhere) == size_of(small) == 1.0


def test_the_median_is_not_moved_by_what_is_too_large():
    assert too_large([1.0, 1e9, 1.1, 0.9, 1e12], multiple=3.0) == [False, True, False, False, True]
    assert too_large([0.0, 0.0, 0.0], multiple=3.0) == [False, False, False]


def test_alignment_is_the_cosine_to_the_sum_of_the_others_directions():
    generator = torch.Generator().manual_seed(0)
    changes = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    units = changes / changes.norm(dim=1, keepdim=True)
    for number, change in enumerate(changes):
        others = units.sum(0) - units[number]
        expected = float(torch.nn.functional.cosine_similarity(change, others, dim=0))
        assert alignment({"w": (change, None)}, {"w": units.sum(0)}) == pytest.approx(expected)
        held = torch.tensor([0, 2])
        part = change[held]
        rest = units.sum(0)[held] - part / part.norm()
        expected = float(torch.nn.functional.cosine_similarity(part, rest, dim=0))
        assert alignment({"w": (part, held)}, {"w": units.sum(0)}) == pytest.approx(expected)
    nothing = torch.zeros(4, dtype=torch.float64)
    assert alignment({"w": (nothing, None)}, {"w": units.sum(0)}) == 0.0


def screened(screen, *values):
    uploads = {f"c{number}": update(value, None, kind="delta") for number, value in enumerate(values)}
    screening = Screening(screen, WEIGHTS)
    for client_id, one in uploads.items():
        screening.see(client_id, one)
    return screening.refused(uploads.items())


def test_who_is_refused_and_why():
    ones, far, back = [1.0, 1.0, 1.0, 1.0], [9.0, 9.0, 9.0, 9.0], [-1.0, -1.0, -1.0, -1.0]
    assert screened(Screen(norm=5.0), ones, ones, far) == {
        "c2": "expected a change per weight of at most 5 times the cohort's median 1, got 9"
    }
    assert screened(Screen(norm=10.0), ones, ones, far) == {}
    assert screened(Screen(cosine=0.0), ones, ones, far, back) == {
        "c3": "expected a cosine of at least 0 to the others' direction, got -1"
    }
    assert list(screened(Screen(norm=5.0, cosine=0.0), ones, back, ones, ones, far)) == ["c4", "c1"]
    assert screened(Screen(norm=2.0, cosine=0.9), ones, far) == {}  # nobody can say which of two is wrong


@pytest.mark.parametrize("method", [list, moving, partial(sparsyfed, sparsity=0.5), fiarse])
def test_what_is_screened_out_is_as_if_it_had_not_come(method):
    plan = {**always("c1", Fault.EXPLODES), **always("c4", Fault.EXPLODES)}
    loop = run(plan, method(), per_round=6, screen=Screen(norm=20.0))
    assert reasons(loop) == [dict.fromkeys(("c1", "c4"), FailureReason.SCREENED)] * 3
    lost = run(dict.fromkeys(plan, Fault.STRAGGLES), method(), per_round=6, faults=FaultPolicy(deadline=1000))
    assert_same(weights(loop), weights(lost))


def test_a_change_in_the_other_direction_is_screened_out():
    def similar():
        generator = torch.Generator().manual_seed(1)
        parts = {}
        for number in range(6):
            x = torch.randn(40, 8, generator=generator)
            parts[f"c{number}"] = TensorDataset(x, x[:, :3].argmax(1))
        return loaders(parts)

    plan = always("c2", Fault.REVERSED)
    loop = run(plan, data=similar(), per_round=6, screen=Screen(cosine=0.0))
    assert reasons(loop) == [{"c2": FailureReason.SCREENED}] * 3
    assert "expected a cosine of at least 0 to the others' direction, got -" in loop.history[1].failures["c2"].sentence
    unscreened = run(plan, data=similar(), per_round=6)
    assert not any(reasons(unscreened))


def test_a_screen_that_refuses_nobody_changes_nothing():
    expected = run({}, moving(), per_round=6)
    loop = run({}, moving(), per_round=6, screen=Screen(norm=1e6, cosine=-1.0))
    assert_same(weights(loop), weights(expected))


def test_two_uploads_are_not_screened():
    loop = run(always("c1", Fault.EXPLODES), per_round=2, rounds=6, screen=Screen(norm=2.0, cosine=0.9))
    assert not any(reasons(loop))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "expected a screen with a bound, norm or cosine, got none"),
        ({"norm": 1.0}, "expected norm above 1, in multiples of the cohort's median, got 1.0"),
        ({"cosine": 1.0}, r"expected cosine in \[-1, 1\), got 1.0"),
    ],
)
def test_bad_screens(arguments, message):
    with pytest.raises(ValueError, match=message):
        Screen(**arguments)
