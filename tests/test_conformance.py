"""Every exported callback passes the conformance suite, and the suite finds what it looks for."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_fedsparse import callbacks as exported
from lightning_fedsparse.callbacks import (
    ActivationPruning,
    CollapseMonitor,
    CompressionMemory,
    DenseStatistics,
    DeviceMonitor,
    DynamicPruning,
    DynamicSparseTraining,
    ErrorFeedback,
    FixedMask,
    ForwardPruning,
    GradientPruning,
    ImportanceMasking,
    IncrementalRegularization,
    MagnitudePruning,
    MaskMonitor,
    Powerpropagation,
    ProximalTerm,
    RoundLearningRate,
    SparsityMonitor,
    TopKAfterTraining,
    WidthMasking,
    feddip,
    fiarse,
    sparsyfed,
    zerofl,
)
from lightning_fedsparse.schedules import (
    ConstantSchedule,
    CubicSchedule,
    ExponentialSchedule,
    LinearSchedule,
    StaircaseSchedule,
)
from lightning_fedsparse.testing import (
    CHECKS,
    Check,
    Factory,
    check_accumulates_gradients,
    check_copies_and_pickles,
    check_federates,
    check_fits_a_second_model,
    check_keeps_the_state_dict,
    check_leaves_no_trace,
    check_resumes,
    check_state_loads_with_weights_only,
    check_trains,
    check_two_instances,
)


def pruning(**options: Any) -> MagnitudePruning:
    return MagnitudePruning(LinearSchedule(0.2, 0.8), every=3, **options)


def dynamic(**options: Any) -> DynamicPruning:
    return DynamicPruning(CubicSchedule(0.2, 0.8), every=1, **options)


def moving(**options: Any) -> DynamicSparseTraining:
    return DynamicSparseTraining(0.5, every=1, end=1.0, **options)


# what each exported callback needs beside it; the interfaces have nothing to conform to by themselves
INTERFACES = {"CallbackList", "EffectiveWeightCallback", "SparsityCallback"}
BUILD: dict[str, Factory] = {
    "MagnitudePruning": lambda: [pruning()],
    "ErrorFeedback": lambda: [ErrorFeedback(), pruning()],
    "DynamicPruning": lambda: [dynamic(), ErrorFeedback()],
    "CompressionMemory": lambda: [dynamic(), ErrorFeedback(), CompressionMemory()],
    "IncrementalRegularization": lambda: [IncrementalRegularization(StaircaseSchedule(0.1, 4))],
    "DenseStatistics": lambda: [pruning(), ErrorFeedback(), DenseStatistics()],
    "DeviceMonitor": lambda: [pruning(), DeviceMonitor()],
    "RoundLearningRate": lambda: [RoundLearningRate(ExponentialSchedule(1.0, 0.5))],
    "SparsityMonitor": lambda: [pruning(), SparsityMonitor()],
    "feddip": lambda: feddip(sparsity=0.8, reconfigure_every=1),
    "ImportanceMasking": lambda: [ImportanceMasking(0.4, refresh_every=3)],
    "fiarse": lambda: fiarse(0.2),
    "Powerpropagation": lambda: [Powerpropagation()],
    "ActivationPruning": lambda: [ActivationPruning()],  # beside a callback that prunes: in its own tests
    "TopKAfterTraining": lambda: [TopKAfterTraining(ConstantSchedule(0.5))],
    "MaskMonitor": lambda: [pruning(), MaskMonitor()],
    "CollapseMonitor": lambda: [pruning(), CollapseMonitor()],
    "sparsyfed": lambda: sparsyfed(sparsity=0.5),
    "GradientPruning": lambda: [GradientPruning(LinearSchedule(0.2, 0.8), every=3)],
    "ProximalTerm": lambda: [ProximalTerm(0.5)],
    "FixedMask": lambda: [FixedMask(0.5, warmup=0.3)],
    "ForwardPruning": lambda: [ForwardPruning(0.5)],
    "zerofl": lambda: zerofl(sparsity=0.6, mask_ratio=0.2),
    "DynamicSparseTraining": lambda: [moving()],
    "WidthMasking": lambda: [WidthMasking(0.25, refresh_every=3)],
}
VARIANTS: dict[str, Factory] = {
    "MagnitudePruning per layer": lambda: [pruning(scope="layer", distribution="erk", start=0.2, end=0.7)],
    "DynamicPruning at random": lambda: [dynamic(erk_positions="random"), ErrorFeedback()],
    "feddip as released": lambda: feddip(
        sparsity=0.8,
        reconfigure_every=1,
        erk_positions="random_per_client",
        regrow="nested",
        upload="dense",
        lambda_mode="code",
        bn_mode="dense",
    ),
    "fiarse per tensor with a floor": lambda: fiarse(0.3, extraction="tensor", layer_floor=0.1, refresh_every=5),
    "sparsyfed with a spectral exponent and a ramp": lambda: sparsyfed(
        sparsity=0.5,
        exponent="spectral_layer",
        activation_threshold="first_batch",
        ramp=0.5,
        layer_floor=0.1,
        learning_rate_decay=0.9,
    ),
    "sparsyfed from a truncated normal": lambda: sparsyfed(sparsity=0.5, initialization="truncated_normal"),
    "Powerpropagation under masks": lambda: [pruning(), ErrorFeedback(), Powerpropagation(2.0)],
    "ProximalTerm beside powers and masks": lambda: [pruning(), ProximalTerm(0.5), Powerpropagation(2.0)],
    "FixedMask at random": lambda: [FixedMask(0.5, positions="random", distribution="erk")],
    "FixedMask by magnitude with feedback": lambda: [FixedMask(0.5, positions="magnitude"), ErrorFeedback()],
    "zerofl as re-implemented": lambda: zerofl(
        sparsity=0.5, threshold="first_batch", overwrite=True, learning_rate_decay=0.9
    ),
    "WidthMasking with a rolling window": lambda: [WidthMasking(0.25, "rolling", scale=True, refresh_every=3)],
    "WidthMasking of random units": lambda: [WidthMasking(0.5, "random", refresh_every=3)],
    "feddip with residuals": lambda: feddip(sparsity=0.8, reconfigure_every=2, residual="keep"),
    "feddip with a dense aggregate": lambda: feddip(sparsity=0.8, reconfigure_every=1, regrow="dense"),
}
# one threshold for a whole batch of activations is another one for a larger batch
PER_BATCH = {"zerofl", "zerofl as re-implemented"}
SELECTIVE: dict[str, tuple[Callable[..., pl.Callback], Factory]] = {
    "MagnitudePruning": (pruning, lambda: [ErrorFeedback()]),
    "DynamicPruning": (dynamic, lambda: [ErrorFeedback()]),
    "DynamicSparseTraining": (moving, list),
    "CompressionMemory": (CompressionMemory, list),
    "IncrementalRegularization": (lambda **o: IncrementalRegularization(StaircaseSchedule(0.1, 4), **o), list),
    "SparsityMonitor": (SparsityMonitor, lambda: [pruning()]),
    "Powerpropagation": (Powerpropagation, list),
    "ActivationPruning": (ActivationPruning, lambda: [pruning()]),
    "TopKAfterTraining": (lambda **o: TopKAfterTraining(ConstantSchedule(0.5), **o), list),
    "MaskMonitor": (MaskMonitor, list),
    "CollapseMonitor": (CollapseMonitor, list),
    "ImportanceMasking": (lambda **o: ImportanceMasking(0.4, refresh_every=3, **o), list),
    "FixedMask": (lambda **o: FixedMask(0.5, **o), list),
    "GradientPruning": (lambda **o: GradientPruning(LinearSchedule(0.2, 0.8), every=3, **o), list),
    "ForwardPruning": (lambda **o: ForwardPruning(0.5, **o), list),
}


def test_every_exported_callback_is_here() -> None:
    assert set(exported.__all__) == BUILD.keys() | INTERFACES


def test_every_callback_with_a_selection_is_here() -> None:
    selective = {
        name
        for name in BUILD
        if inspect.isclass(kind := getattr(exported, name)) and "include" in inspect.signature(kind).parameters
    }
    assert selective == SELECTIVE.keys()


@pytest.mark.parametrize(
    ("name", "check"),
    [
        pytest.param(name, check, id=f"{name}-{check.__name__}")
        for name in [*BUILD, *VARIANTS]
        for check in CHECKS
        if name not in PER_BATCH or check is not check_accumulates_gradients
    ],
)
def test_conformance(name: str, check: Check, tmp_path: Path) -> None:
    check({**BUILD, **VARIANTS}[name], tmp_path)


@pytest.mark.parametrize("name", SELECTIVE)
def test_two_instances(name: str) -> None:
    make, beside = SELECTIVE[name]
    check_two_instances(lambda names: make(include=names), beside)


# -- the suite finds what it looks for ---------------------------------------------------------------------------------


class Diverges(pl.Callback):
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        next(pl_module.parameters()).data.fill_(float("inf"))


class Freezes(pl.Callback):
    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        optimizer.zero_grad()


class Renames(pl.Callback):
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        layer = next(child for child in pl_module.modules() if hasattr(child, "weight"))
        nn.utils.prune.random_unstructured(layer, "weight", amount=1)


class Forgets(pl.Callback):
    """What it does depends on a count that no checkpoint holds."""

    def __init__(self) -> None:
        self.steps = 0

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        self.steps += 1
        optimizer.param_groups[0]["lr"] = 0.1 / self.steps


class HoldsAFunction(pl.Callback):
    def __init__(self) -> None:
        self.function = lambda: None


class ScalesEachBackward(pl.Callback):
    """Rescales what earlier backward passes have accumulated."""

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for parameter in pl_module.parameters():
            parameter.grad.mul_(0.5)


class SavesAnObject(pl.Callback):
    def state_dict(self) -> dict[str, Any]:
        return {"path": Path()}


class LeavesAHook(pl.Callback):
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pl_module.register_forward_hook(_nothing)


class DrawsUnseeded(pl.Callback):
    """As if from a generator that nobody seeded."""

    draws = 0

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        DrawsUnseeded.draws += 1
        next(pl_module.parameters()).data.fill_(DrawsUnseeded.draws)


def _nothing(*args: Any) -> None: ...


@pytest.mark.parametrize(
    ("broken", "check", "message"),
    [
        (Diverges, check_trains, "expected finite losses"),
        (Freezes, check_trains, "at least one parameter, got none changed"),
        (Renames, check_keeps_the_state_dict, "in training, got"),
        (Forgets, check_resumes, "the module after resuming"),
        (Forgets, check_copies_and_pickles, "trained with a copy"),
        (Forgets, check_fits_a_second_model, "a second model trained with used callbacks"),
        (ScalesEachBackward, check_accumulates_gradients, "larger batches"),
        (LeavesAHook, check_leaves_no_trace, "no hook on ConvNet"),
        (DrawsUnseeded, check_federates, "a second run of the same federation"),
    ],
)
def test_a_broken_callback_is_found(broken: type[pl.Callback], check: Check, message: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=message):
        check(lambda: [broken()], tmp_path)


def test_a_callback_that_cannot_be_pickled_is_found(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"[Pp]ickle"):
        check_copies_and_pickles(lambda: [HoldsAFunction()], tmp_path)


def test_a_state_that_needs_unpickling_is_found(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="Weights only load failed"):
        check_state_loads_with_weights_only(lambda: [SavesAnObject()], tmp_path)


@pytest.mark.parametrize(
    ("state", "other"),
    [
        ({"mode": "a"}, {"mode": "b"}),
        ({"names": ["a"]}, {"names": ["a", "b"]}),
        ({"n": None}, {"n": 1}),
        ({"n": 1}, {}),
    ],
)
def test_a_state_of_words_is_compared(state: dict[str, Any], other: dict[str, Any], tmp_path: Path) -> None:
    class Loads(pl.Callback):
        def __init__(self, loaded: dict[str, Any]) -> None:
            self.state, self.loaded = state, loaded

        def state_dict(self) -> dict[str, Any]:
            return self.state

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.state = self.loaded

    check_resumes(lambda: [Loads(state)], tmp_path)
    with pytest.raises(AssertionError, match="the state of Loads after resuming"):
        check_resumes(lambda: [Loads(other)], tmp_path)


def test_instances_that_clash_are_found() -> None:
    class Clashes(pl.Callback):
        def __init__(self, name: str) -> None:
            self.name = name

        def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            with torch.no_grad():
                for parameter in pl_module.parameters():
                    parameter.fill_(len(self.name))

    with pytest.raises(AssertionError, match="two instances in the other order"):
        check_two_instances(lambda names: Clashes(names[0]))
