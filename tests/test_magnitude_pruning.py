"""When magnitude pruning moves its masks, and to which sparsity."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_fedsparse.callbacks import DynamicPruning, ErrorFeedback, MagnitudePruning
from lightning_fedsparse.callbacks.magnitude_pruning import scheduled_masks
from lightning_fedsparse.schedules import ConstantSchedule, CubicSchedule, ExponentialSchedule, LinearSchedule, Progress
from tests.effective_reference import WEIGHTS, Net, loader, quiet_trainer, seeded


def zeros_by_step(module: Net) -> list[int]:
    return [sum(int((weights[name] == 0).sum()) for name in WEIGHTS) for weights in module.seen["train"]]


def final_zeros(module: Net) -> int:
    return sum(int((module.get_parameter(name) == 0).sum()) for name in WEIGHTS)


def fit(*, feedback: bool = True, trainer: dict[str, Any] | None = None, **options: Any) -> Net:
    """10 steps over 72 prunable weights."""
    module: Net = seeded(Net)
    schedule = options.pop("schedule", LinearSchedule(0.25, 0.75))
    options.setdefault("end", 1.0)
    callbacks = [MagnitudePruning(schedule, **options), *([ErrorFeedback()] if feedback else [])]
    quiet_trainer(callbacks, **(trainer or {})).fit(module, loader())
    return module


# -- when --------------------------------------------------------------------------------------------------------------


def test_masks_move_every_so_many_steps_and_at_the_end() -> None:
    # 72 * (0.25 + 0.05 * step) at steps 0, 4 and 8, rounded half to even; 0.75 after the last
    module = fit(every=4)
    assert zeros_by_step(module) == [18] * 4 + [32] * 4 + [47] * 2
    assert final_zeros(module) == 54


def test_a_period_longer_than_the_run_still_ends_at_the_final_sparsity() -> None:
    module = fit(every=1000)
    assert zeros_by_step(module) == [18] * 10
    assert final_zeros(module) == 54


def test_nothing_is_pruned_before_start() -> None:
    # from step 4 on the schedule runs over the remaining 6 steps
    module = fit(every=2, start=0.4)
    assert zeros_by_step(module) == [0] * 4 + [18] * 2 + [30] * 2 + [42] * 2
    assert final_zeros(module) == 54


def test_the_schedules_end_is_reached_at_end_though_no_period_ends_there() -> None:
    module = fit(every=4, end=0.5)
    assert zeros_by_step(module) == [18] * 4 + [47] + [54] * 5
    assert final_zeros(module) == 54


def test_the_schedules_end_between_two_steps_is_reached_at_the_second() -> None:
    module = fit(every=100, end=0.55)
    assert zeros_by_step(module) == [18] * 6 + [54] * 4


def test_masks_stay_from_end_on() -> None:
    module = seeded(Net)
    callbacks = [MagnitudePruning(LinearSchedule(0.25, 0.75), every=2, end=0.5), ErrorFeedback()]
    quiet_trainer(callbacks).fit(module, loader())
    at_end, *later = [{name: weights[name] != 0 for name in WEIGHTS} for weights in module.seen["train"][5:]]
    assert all(torch.equal(masks[name], at_end[name]) for masks in later for name in WEIGHTS)


def test_under_accumulation_steps_count_not_batches() -> None:
    # 5 batches make 3 steps an epoch; 6 steps in all, masks at 0, 2, 4: 72 * (0.25 + 0.5 * step / 6)
    module = fit(every=2, trainer={"accumulate_grad_batches": 2})
    assert zeros_by_step(module) == [18] * 4 + [30] * 3 + [42] * 3
    assert final_zeros(module) == 54


def test_under_accumulation_masks_move_once_per_step() -> None:
    # the first mask is of another kind than the later ones: a second look at step 0 would replace it
    module = seeded(Net)
    callbacks = [DynamicPruning(ConstantSchedule(0.5), every=1), ErrorFeedback()]
    quiet_trainer(callbacks, accumulate_grad_batches=5, max_epochs=1).fit(module, loader())
    first, *later = module.seen["train"]
    assert all(torch.equal(weights[name] != 0, first[name] != 0) for weights in later for name in WEIGHTS)


@pytest.mark.parametrize(
    ("step", "due"), [(0, True), (1, False), (5, True), (9, False), (10, True), (13, True), (14, False), (20, False)]
)
def test_due_steps(step: int, due: bool) -> None:
    # 0.63 of 20 is between steps 12 and 13
    assert MagnitudePruning(ConstantSchedule(0.5), every=5, end=0.63).is_due(Progress(step, 20)) is due


@given(total=st.integers(1, 60), every=st.integers(1, 70), hundredths=st.integers(1, 99))
def test_some_due_step_reaches_an_early_end(total: int, every: int, hundredths: int) -> None:
    pruning = MagnitudePruning(LinearSchedule(0.1, 0.9), every=every, end=hundredths / 100)
    reached = [
        step
        for step in range(1, total)
        if pruning.is_due(Progress(step, total)) and pruning.target(Progress(step, total)) == 0.9
    ]
    first = -(-hundredths * total // 100)
    if first < total:
        assert reached[0] == first


# -- how much ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("feedback", [True, False])
def test_targets_are_absolute(feedback: bool) -> None:
    # 0.5 of 0.5 would be 0.75 after two prunings and 0.999 after ten
    module = fit(schedule=ConstantSchedule(0.5), every=1, feedback=feedback)
    assert zeros_by_step(module) == [36] * 10
    assert final_zeros(module) == 36


def test_without_feedback_pruned_weights_never_return() -> None:
    # momentum goes on moving the stored weights that are out
    module = fit(every=1, feedback=False)
    for name in WEIGHTS:
        history = [weights[name] != 0 for weights in module.seen["train"]]
        for before, after in itertools.pairwise(history):
            assert not bool((after & ~before).any())


def test_with_feedback_some_return() -> None:
    module = fit(schedule=ConstantSchedule(0.75), every=1)
    returned = 0
    for name in WEIGHTS:
        history = [weights[name] != 0 for weights in module.seen["train"]]
        returned += sum(int((b & ~a).sum()) for a, b in itertools.pairwise(history))
    assert returned > 0


@pytest.mark.parametrize(("distribution", "expected"), [("uniform", [24, 12]), ("erk", [31, 5])])
def test_per_layer_sparsity(distribution: Any, expected: list[int]) -> None:
    # ERK: raw 14/48 and 11/24, eps = 36 / (14 + 11), so densities 0.42 and 0.66 keep 20.16 of 48 and 15.84 of 24;
    # zeros are round(27.84) and round(8.16)
    expected = [28, 8] if distribution == "erk" else expected
    module = fit(schedule=ConstantSchedule(0.5), every=3, scope="layer", distribution=distribution)
    assert [int((module.get_parameter(name) == 0).sum()) for name in WEIGHTS] == expected


def test_scheduled_masks_of_four_weights() -> None:
    weights = {"a": torch.tensor([4.0, -1.0]), "b": torch.tensor([3.0, -2.0])}
    assert scheduled_masks(weights, 0.5, scope="global", distribution="uniform")["b"].tolist() == [True, False]
    weights["b"] *= 10
    assert scheduled_masks(weights, 0.5, scope="global", distribution="uniform")["b"].tolist() == [True, True]
    assert scheduled_masks(weights, 0.5, scope="layer", distribution="uniform")["b"].tolist() == [True, False]


def test_a_second_fit_starts_from_no_mask() -> None:
    pruning = MagnitudePruning(CubicSchedule(0.25, 0.75), every=4)
    first, second = seeded(Net), seeded(Net)
    quiet_trainer([pruning]).fit(first, loader())
    quiet_trainer([pruning]).fit(second, loader())
    assert zeros_by_step(first) == zeros_by_step(second)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": ConstantSchedule(1.0)}, r"expected a sparsity schedule with values in \[0, 1\), got 1.0"),
        ({"schedule": ConstantSchedule(-0.1)}, r"values in \[0, 1\), got -0.1"),
        ({"schedule": LinearSchedule(0.9, 0.5)}, "expected a sparsity schedule that does not decrease, got 0.9 to 0.5"),
        ({"every": 0}, "expected a period of at least 1, got every=0"),
        ({"start": 0.5, "end": 0.5}, "expected 0 <= start < end <= 1, got start=0.5 and end=0.5"),
        ({"start": -0.1}, "got start=-0.1 and end=0.75"),
        ({"end": 1.1}, "got start=0.0 and end=1.1"),
        ({"scope": "model"}, "expected scope 'global' or 'layer', got 'model'"),
        ({"distribution": "even"}, "expected distribution 'uniform' or 'erk', got 'even'"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    schedule = options.pop("schedule", ConstantSchedule(0.5))
    with pytest.raises(ValueError, match=message):
        MagnitudePruning(schedule, **options)


def test_a_schedule_that_counts_steps_is_refused() -> None:
    with pytest.raises(TypeError, match="ExponentialSchedule counts steps"):
        MagnitudePruning(ExponentialSchedule(0.5, 0.9))


def test_a_glob_that_matches_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="conv"):
        fit(include=["conv*"])
