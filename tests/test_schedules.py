import dataclasses
import math
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser

from lightning_fedsparse.schedules import (
    ConstantSchedule,
    CosineSchedule,
    CubicSchedule,
    DipSchedule,
    ExponentialSchedule,
    LinearSchedule,
    OffsetStaircaseSchedule,
    Progress,
    Schedule,
    StaircaseSchedule,
)

# known answers


@pytest.mark.parametrize(
    ("step", "p80", "p90", "p95", "p99", "rate"),
    [
        (0, 0.500000000, 0.500000000, 0.500000000, 0.500000000, 0.100000000),
        (5, 0.504477538, 0.505970050, 0.506716306, 0.507313311, 0.099003992),
        (50, 0.542787500, 0.557050000, 0.564181250, 0.569886250, 0.090474682),
        (100, 0.581300000, 0.608400000, 0.621950000, 0.632790000, 0.081856680),
        (250, 0.673437500, 0.731250000, 0.760156250, 0.783281250, 0.060622707),
        (500, 0.762500000, 0.850000000, 0.893750000, 0.928750000, 0.036751125),
        (750, 0.795312500, 0.893750000, 0.942968750, 0.982343750, 0.022279527),
        (900, 0.799700000, 0.899600000, 0.949550000, 0.989510000, 0.016500122),
        (995, 0.799999963, 0.899999950, 0.949999944, 0.989999939, 0.013642331),
    ],
)
def test_cubic_and_exponential_over_1000_rounds(step, p80, p90, p95, p99, rate):
    progress = Progress(step, 1000)
    for final, expected in [(0.8, p80), (0.9, p90), (0.95, p95), (0.99, p99)]:
        assert CubicSchedule(0.5, final)(progress) == pytest.approx(expected, abs=5.1e-10)
    assert ExponentialSchedule(0.1, 0.998)(progress) == pytest.approx(rate, abs=5.1e-10)


@pytest.mark.parametrize(
    ("step", "p90", "p95"), [(10, 0.85, 0.89375), (15, 0.89375, 0.942969), (19, 0.89995, 0.949944)]
)
def test_cubic_over_20_rounds(step, p90, p95):
    assert CubicSchedule(0.5, 0.9)(Progress(step, 20)) == pytest.approx(p90, abs=5.1e-7)
    assert CubicSchedule(0.5, 0.95)(Progress(step, 20)) == pytest.approx(p95, abs=5.1e-7)


@pytest.mark.parametrize(
    ("levels", "step", "expected"),
    [
        (20, 0, 0.0),
        (20, 49, 0.0),
        (20, 50, 5e-5),
        (20, 100, 1e-4),
        (20, 500, 5e-4),
        (20, 999, 9.5e-4),
        (10, 99, 0.0),
        (10, 100, 1e-4),
        (10, 500, 5e-4),
        (10, 999, 9e-4),
        (10, 1000, 1e-3),
        (10, 2000, 1e-3),
    ],
)
def test_staircase(levels, step, expected):
    assert StaircaseSchedule(1e-3, levels)(Progress(step, 1000)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [
        (0, 49, 0.0),
        (50, 99, 5e-4),
        (100, 149, 5.263158e-4),
        (500, 549, 7.368421e-4),
        (900, 949, 9.473684e-4),
        (950, 999, 9.736842e-4),
    ],
)
def test_offset_staircase(first, last, expected):
    schedule = OffsetStaircaseSchedule(1e-3)
    for step in (first, (first + last) // 2, last):
        assert schedule(Progress(step, 1000)) == pytest.approx(expected, abs=5.1e-11)


def test_offset_staircase_with_maximum_at_the_offset_is_one_stair():
    schedule = OffsetStaircaseSchedule(5e-4)
    assert [schedule(Progress(step, 1000)) for step in (0, 49, 50, 500, 999)] == [0.0, 0.0, 5e-4, 5e-4, 5e-4]


def test_offset_staircase_below_the_offset_falls():
    schedule = OffsetStaircaseSchedule(1e-4)
    values = [schedule(Progress(step, 1000)) for step in range(50, 1000, 50)]
    assert values == sorted(values, reverse=True)
    assert values[0] > values[-1] > 1e-4


def test_offset_staircase_top_level_takes_what_is_left_over():
    top = pytest.approx(9.736842e-4, abs=5.1e-11)
    assert all(OffsetStaircaseSchedule(1e-3)(Progress(step, 105)) == top for step in range(95, 105))
    assert OffsetStaircaseSchedule(1e-3)(Progress(94, 105)) < 9.6e-4
    assert all(OffsetStaircaseSchedule(1e-3)(Progress(step, 10)) == top for step in range(10))


def test_linear_cosine_constant():
    assert [LinearSchedule(0.0, 1.0)(p) for p in (0.0, 0.25, 0.5, 1.0)] == [0.0, 0.25, 0.5, 1.0]
    assert [CosineSchedule(0.0, 1.0)(p) for p in (0.0, 0.5, 1.0)] == [0.0, 0.5, 1.0]
    assert CosineSchedule(0.0, 1.0)(1 / 3) == pytest.approx(0.25)
    assert ConstantSchedule(0.7)(0.3) == ConstantSchedule(0.7)(Progress(3, math.inf)) == 0.7


def test_integer_arithmetic_of_the_staircase():
    # 0.29 * 100 is 28.999999999999996
    assert StaircaseSchedule(1.0, 100)(Progress(29, 100)) == 0.29
    assert StaircaseSchedule(1.0, 100)(0.29) == 0.29


def test_fraction_is_clamped():
    assert [Progress(step, 4).fraction for step in (0, 1, 4, 9)] == [0.0, 0.25, 1.0, 1.0]
    assert CubicSchedule(0.5, 0.9)(Progress(30, 20)) == 0.9


def test_exponential_needs_no_end():
    assert ExponentialSchedule(8.0, 0.5)(Progress(2, math.inf)) == 2.0


# properties

VALUES = st.floats(-1e6, 1e6)


@settings(deadline=None)
@given(initial=VALUES, final=VALUES, step=st.integers(0, 200))
def test_curves_start_and_end_exactly_and_stay_between(initial, final, step):
    for kind in (LinearSchedule, CubicSchedule, CosineSchedule):
        schedule = kind(initial, final)
        assert schedule(0.0) == schedule(Progress(0, 7)) == initial
        assert schedule(1.0) == schedule(Progress(7, 7)) == final
        slack = 1e-9 * (abs(initial) + abs(final))
        assert min(initial, final) - slack <= schedule(Progress(step, 200)) <= max(initial, final) + slack
        assert kind(initial, initial)(Progress(step, 200)) == initial


@settings(deadline=None)
@given(levels=st.integers(1, 60), total=st.integers(1, 2000), step=st.integers(0, 2500))
def test_staircase_agrees_between_progress_and_fraction(levels, total, step):
    schedule = StaircaseSchedule(1e-3, levels)
    progress = Progress(step, total)
    assert schedule(progress) == schedule(progress.fraction)


@settings(deadline=None)
@given(total=st.integers(1, 2000))
def test_staircase_never_falls(total):
    values = [StaircaseSchedule(1.0, 20)(Progress(step, total)) for step in range(total + 1)]
    assert values == sorted(values)
    assert values[0] == 0.0
    assert values[-1] == 1.0


def test_a_dip_is_another_schedule_but_for_a_while():
    schedule = DipSchedule(LinearSchedule(0.0, 1.0), start=0.25, end=0.5, value=0.25)
    expected = [0.0, 0.125, 0.25, 0.25, 0.5, 0.625, 0.75, 0.875, 1.0]
    assert [schedule(Progress(step, 8)) for step in range(9)] == expected
    assert [schedule(step / 8) for step in range(9)] == expected


def test_a_dip_in_a_schedule_that_counts_steps():
    schedule = DipSchedule(ExponentialSchedule(1.0, 0.5), start=0.5, end=1.0, value=7.0)
    assert [schedule(Progress(step, 4)) for step in range(5)] == [1.0, 0.5, 7.0, 7.0, 0.0625]


@pytest.mark.parametrize(("start", "end"), [(0.0, 0.5), (0.5, 0.5), (0.6, 0.5), (0.5, 1.5)])
def test_a_dip_lies_inside_the_run(start, end):
    with pytest.raises(
        ValueError, match=f"^expected 0 < start < end <= 1 for DipSchedule, got start={start} and end={end}$"
    ):
        DipSchedule(ConstantSchedule(0.9), start=start, end=end, value=0.5)


def test_a_dip_to_a_value_that_is_not_finite():
    with pytest.raises(ValueError, match="^expected a finite value for DipSchedule, got nan$"):
        DipSchedule(ConstantSchedule(0.9), start=0.5, end=0.6, value=math.nan)


# as values and in YAML

SCHEDULES = [
    ConstantSchedule(0.5),
    LinearSchedule(0.5, 0.9),
    CubicSchedule(0.5, 0.9),
    CosineSchedule(0.5, 0.9),
    StaircaseSchedule(1e-3, 20),
    OffsetStaircaseSchedule(1e-3, 10, offset=1e-4),
    ExponentialSchedule(0.1, 0.998),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: type(schedule).__name__)
def test_schedules_are_values(schedule):
    twin = pickle.loads(pickle.dumps(schedule))
    assert twin == schedule
    assert hash(twin) == hash(schedule)
    name = dataclasses.fields(schedule)[0].name
    assert dataclasses.replace(schedule, **{name: 0.25}) != schedule
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(schedule, name, 1.0)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: type(schedule).__name__)
def test_schedules_from_yaml(schedule):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--schedule", type=Schedule)
    arguments = "\n".join(f"    {key}: {value}" for key, value in dataclasses.asdict(schedule).items())
    path = f"lightning_fedsparse.schedules.{type(schedule).__name__}"
    config = parser.parse_string(f"schedule:\n  class_path: {path}\n  init_args:\n{arguments}\n")
    assert parser.instantiate_classes(config).schedule == schedule


def test_schedules_of_different_kinds_differ():
    assert LinearSchedule(0.5, 0.9) != CubicSchedule(0.5, 0.9)


# errors


def test_progress_that_cannot_be():
    with pytest.raises(ValueError, match="expected a progress step of at least 0, got -1"):
        Progress(-1, 10)
    for total in (0, -5, math.nan):
        with pytest.raises(ValueError, match=f"expected a positive total of progress steps, got {total}"):
            Progress(0, total)


@pytest.mark.parametrize(
    "schedule", [CubicSchedule(0.5, 0.9), StaircaseSchedule(1e-3, 20), OffsetStaircaseSchedule(1e-3)]
)
def test_a_run_without_an_end(schedule):
    with pytest.raises(
        ValueError, match=r"expected a run with an end .* got an infinite total at step 3: set max_steps"
    ):
        schedule(Progress(3, math.inf))


@pytest.mark.parametrize("schedule", [LinearSchedule(0, 1), StaircaseSchedule(1.0, 4)])
@pytest.mark.parametrize("progress", [-0.1, 1.1, math.nan])
def test_fraction_outside_its_range(schedule, progress):
    with pytest.raises(ValueError, match=rf"expected a progress in \[0, 1\], got {progress}"):
        schedule(progress)


@pytest.mark.parametrize("schedule", [ExponentialSchedule(0.1, 0.998), OffsetStaircaseSchedule(1e-3)])
def test_schedules_that_count_steps_need_a_progress(schedule):
    with pytest.raises(TypeError, match=f"because {type(schedule).__name__} counts steps, got 0.5"):
        schedule(0.5)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: type(schedule).__name__)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_arguments_that_are_not_finite(schedule, value):
    for field in dataclasses.fields(schedule):
        if field.name != "levels":
            message = f"expected a finite {field.name} for {type(schedule).__name__}, got {value}"
            with pytest.raises(ValueError, match=message):
                dataclasses.replace(schedule, **{field.name: value})


@pytest.mark.parametrize(("kind", "least"), [(StaircaseSchedule, 1), (OffsetStaircaseSchedule, 2)])
def test_too_few_levels(kind, least):
    with pytest.raises(ValueError, match=f"expected at least {least} levels for {kind.__name__}, got {least - 1}"):
        kind(1e-3, least - 1)
