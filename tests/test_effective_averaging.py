"""The swap engine beside Lightning's weight averaging, before and after it in the list of callbacks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor

from lightning_fedsparse.callbacks import ErrorFeedback, MagnitudePruning, Powerpropagation
from lightning_fedsparse.folding import load_folded
from lightning_fedsparse.schedules import ConstantSchedule
from tests.effective_reference import (
    WEIGHTS,
    EvaluatedNet,
    Net,
    loader,
    quiet_trainer,
    reference_fit,
    seeded,
    sorted_masks,
    weights_of,
)

DECAY = 0.5


def callbacks_with(averaging: pl.Callback, *, first: bool, fold: bool = False, every: int = 1000) -> list[pl.Callback]:
    ours: list[pl.Callback] = [
        MagnitudePruning(ConstantSchedule(0.5), every=every, end=1.0, fold=fold),
        ErrorFeedback(),
    ]
    return [averaging, *ours] if first else [*ours, averaging]


def reference_average(epochs: int = 2, accumulate: int = 1) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """EMA of the stored weights, from the first step on, and the mask that the first step found."""
    twin = seeded(Net)
    masks = sorted_masks({name: twin.get_parameter(name).detach() for name in WEIGHTS}, 0.5)
    history: list[dict[str, Tensor]] = []
    reference_fit(
        twin,
        list(loader()),
        sparsity_at=lambda step: 0.5 if step == 0 else None,
        feedback=True,
        epochs=epochs,
        accumulate=accumulate,
        after_step=lambda: history.append(weights_of(twin)),
    )
    average = history[0]
    for weights in history[1:]:
        average = {name: DECAY * average[name] + (1 - DECAY) * weights[name] for name in average}
    return average, masks


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("first", [True, False])
def test_stored_weights_are_averaged(first: bool, accumulate: int) -> None:
    module = seeded(Net)
    quiet_trainer(callbacks_with(EMAWeightAveraging(decay=DECAY), first=first), accumulate_grad_batches=accumulate).fit(
        module, loader()
    )
    average, _ = reference_average(accumulate=accumulate)
    for name, expected in average.items():
        torch.testing.assert_close(module.get_parameter(name).detach(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("first", [True, False])
def test_folding_masks_the_average(first: bool) -> None:
    module = seeded(Net)
    callbacks = callbacks_with(EMAWeightAveraging(decay=DECAY), first=first, fold=True)
    quiet_trainer(callbacks).fit(module, loader())
    average, _ = reference_average()
    (pruning,) = (callback for callback in callbacks if isinstance(callback, MagnitudePruning))
    for name in WEIGHTS:
        expected = average[name] * pruning.masks[name]
        torch.testing.assert_close(module.get_parameter(name).detach(), expected, rtol=0, atol=1e-6)
    assert sum(int((module.get_parameter(name) == 0).sum()) for name in WEIGHTS) == 36


@pytest.mark.parametrize("first", [True, False])
def test_validation_uses_the_effective_average(first: bool) -> None:
    module = seeded(EvaluatedNet)
    trainer = quiet_trainer(
        callbacks_with(EMAWeightAveraging(decay=DECAY), first=first), num_sanity_val_steps=0, max_epochs=3
    )
    trainer.fit(module, loader(), loader(1))
    # the masks move at the last step only, so the second epoch's validation still has the first step's
    average, masks = reference_average(epochs=2)
    seen = module.seen["validation"][1]
    for name in WEIGHTS:
        torch.testing.assert_close(seen[name], average[name] * masks[name], rtol=0, atol=1e-6)


class EndsEpoch(Net):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx == 3 else None


class PerEpoch(EMAWeightAveraging):
    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return epoch_idx is not None


def test_an_epoch_cut_short_averages_stored_weights() -> None:
    module = seeded(EndsEpoch)
    quiet_trainer(callbacks_with(PerEpoch(decay=DECAY), first=False), max_epochs=1).fit(module, loader())
    assert all(bool((module.get_parameter(name) != 0).all()) for name in WEIGHTS)


def test_averaging_first_is_refused_where_an_epoch_may_be_cut_short() -> None:
    with pytest.raises(ValueError, match="beside a module's own on_train_batch_start, got it before"):
        quiet_trainer(callbacks_with(PerEpoch(decay=DECAY), first=True)).fit(seeded(EndsEpoch), loader())


@pytest.mark.parametrize("first", [True, False])
def test_a_checkpoint_from_inside_a_step_holds_stored_weights(first: bool, tmp_path: Path) -> None:
    class Saves(Net):
        def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Any:
            if self.trainer.global_step == 6:
                self.trainer.save_checkpoint(tmp_path / "inside.ckpt")
                self.seen["at_save"] = [weights_of(self)]
            return super().training_step(batch, batch_idx)

    module, twin = seeded(Saves), seeded(Net)
    quiet_trainer(callbacks_with(EMAWeightAveraging(decay=DECAY), first=first)).fit(module, loader())
    content = torch.load(tmp_path / "inside.ckpt", weights_only=True)
    batches = list(loader())
    reference_fit(
        twin,
        [*batches, batches[0]],
        sparsity_at=lambda step: 0.5 if step == 0 else None,
        feedback=True,
        epochs=1,
    )
    for name, expected in weights_of(twin).items():
        assert torch.equal(content["current_model_state"][name], expected)
        assert bool((content["state_dict"][name] != 0).all())
    assert sum(int((module.seen["at_save"][0][name] == 0).sum()) for name in WEIGHTS) == 36


@pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended before.*")
@pytest.mark.parametrize("first", [True, False])
def test_resume_with_averaging_equals_no_interruption(first: bool, tmp_path: Path) -> None:
    def make() -> list[pl.Callback]:
        return callbacks_with(EMAWeightAveraging(decay=DECAY), first=first, every=2)

    class Saves(Net):
        def on_train_epoch_end(self) -> None:
            if self.current_epoch == 1:
                self.trainer.save_checkpoint(tmp_path / "middle.ckpt")

    module, resumed = seeded(Saves), seeded(Net)
    quiet_trainer(make(), max_epochs=4).fit(module, loader())
    quiet_trainer(make(), max_epochs=4).fit(resumed, loader(), ckpt_path=tmp_path / "middle.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), resumed.parameters(), strict=True))


def test_a_folded_checkpoint_is_the_masked_average(tmp_path: Path) -> None:
    class Saves(Net):
        def on_train_epoch_end(self) -> None:
            self.trainer.save_checkpoint(tmp_path / "end.ckpt")

    module, served = seeded(Saves), seeded(Net)
    quiet_trainer(callbacks_with(EMAWeightAveraging(decay=DECAY), first=True, fold=True)).fit(module, loader())
    load_folded(tmp_path / "end.ckpt", served)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), served.parameters(), strict=True))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("power", [True, False])
def test_a_checkpoint_after_fit_is_what_the_module_holds(power: bool, first: bool, tmp_path: Path) -> None:
    averaging = EMAWeightAveraging(decay=DECAY)
    method = Powerpropagation(2.0) if power else MagnitudePruning(ConstantSchedule(0.5))
    module = seeded(Net)
    trainer = quiet_trainer([averaging, method] if first else [method, averaging])
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    served = load_folded(tmp_path / "after.ckpt", seeded(Net))
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), served.parameters(), strict=True))
