"""Checkpoints beside the swap engine: stored weights in, stored weights out, and resume equals no interruption."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_fedsparse.callbacks import ErrorFeedback, IncrementalRegularization, MagnitudePruning, feddip
from lightning_fedsparse.schedules import ConstantSchedule, LinearSchedule, StaircaseSchedule
from tests.effective_reference import (
    WEIGHTS,
    EvaluatedNet,
    Net,
    adamw,
    assert_engine_clean,
    loader,
    quiet_trainer,
    reference_fit,
    seeded,
    sgd,
    weights_of,
)


def growing(*, fold: bool = True) -> list[pl.Callback]:
    return [
        MagnitudePruning(LinearSchedule(0.2, 0.8), every=3, end=1.0, fold=fold),
        ErrorFeedback(),
        IncrementalRegularization(StaircaseSchedule(0.1, 4)),
    ]


def hard() -> list[pl.Callback]:
    return [MagnitudePruning(LinearSchedule(0.2, 0.8), every=2, end=1.0)]


def composed() -> list[pl.Callback]:
    return feddip(sparsity=0.8, reconfigure_every=3)


class Saves(Net):
    """Saves from inside ``training_step``, while effective weights are in."""

    path: Path

    def training_step(self, batch: Sequence[torch.Tensor], batch_idx: int) -> Any:
        if self.trainer.global_step == 6:
            self.trainer.save_checkpoint(self.path)
            self.seen["at_save"] = [weights_of(self)]
        return super().training_step(batch, batch_idx)


def test_a_checkpoint_from_inside_a_step_holds_stored_weights(tmp_path: Path) -> None:
    module, twin = seeded(Saves), seeded(Net)
    module.path = tmp_path / "inside.ckpt"
    quiet_trainer([MagnitudePruning(ConstantSchedule(0.5), every=1000, end=1.0), ErrorFeedback()]).fit(module, loader())
    state = torch.load(module.path, weights_only=True)["state_dict"]
    batches = list(loader())
    reference_fit(
        twin,
        [*batches, batches[0]],
        sparsity_at=lambda step: 0.5 if step == 0 else None,
        feedback=True,
        epochs=1,
    )
    assert list(state) == list(twin.state_dict())
    assert all(torch.equal(state[name], expected) for name, expected in weights_of(twin).items())
    (seen,) = module.seen["at_save"]
    assert sum(int((seen[name] == 0).sum()) for name in WEIGHTS) == 36


def test_saving_changes_nothing(tmp_path: Path) -> None:
    module, twin = seeded(Saves), seeded(Net)
    module.path = tmp_path / "inside.ckpt"
    for each in (module, twin):
        quiet_trainer(growing()).fit(each, loader())
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), twin.parameters(), strict=True))


class SaveAt(pl.Callback):
    """Saves once, at the end of the batch (counted over all epochs) or of the epoch."""

    def __init__(self, path: Path, *, batch: int | None = None, epoch: int | None = None) -> None:
        self.path, self.batch, self.epoch = path, batch, epoch
        self.batches = 0

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.batches += 1
        if self.batches == self.batch:
            trainer.save_checkpoint(self.path)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == self.epoch:
            trainer.save_checkpoint(self.path)


def assert_resumes(
    make: Callable[[], list[pl.Callback]], saver: SaveAt, data: Any, build: Callable[[], Net] = Net, **options: Any
) -> None:
    straight, resumed = seeded(build), seeded(build)
    first, second = make(), make()
    quiet_trainer([*first, saver], max_epochs=4, **options).fit(straight, data)
    quiet_trainer(second, max_epochs=4, **options).fit(resumed, data, ckpt_path=saver.path)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("make", [growing, hard, composed])
@pytest.mark.parametrize("optimizer", [sgd, adamw])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_resume_equals_no_interruption(
    make: Callable[[], list[pl.Callback]], optimizer: Any, accumulate: int, tmp_path: Path
) -> None:
    saver = SaveAt(tmp_path / "middle.ckpt", epoch=1)
    assert_resumes(make, saver, loader(), lambda: Net(optimizer), accumulate_grad_batches=accumulate)


@pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended before the epoch ended.*")
@pytest.mark.parametrize("make", [growing, hard, composed])
@pytest.mark.parametrize("batch", [1, 6, 8])
def test_resume_in_the_middle_of_an_epoch(make: Callable[[], list[pl.Callback]], batch: int, tmp_path: Path) -> None:
    # Lightning starts the epoch's data again, so all batches are the same here
    same = torch.utils.data.DataLoader(list(loader(1)) * 5, batch_size=None)
    assert_resumes(make, SaveAt(tmp_path / "middle.ckpt", batch=batch), same)


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_evaluation_from_a_checkpoint_takes_its_masks(stage: str, tmp_path: Path) -> None:
    trained, fresh = seeded(EvaluatedNet), EvaluatedNet()
    saver = SaveAt(tmp_path / "last.ckpt", epoch=1)
    quiet_trainer([*growing(), saver], num_sanity_val_steps=0).fit(trained, loader(), loader(1))
    # as in a new process: new callbacks, a new model
    options = {} if stage == "predict" else {"verbose": False}
    getattr(quiet_trainer(growing()), stage)(fresh, loader(1), ckpt_path=tmp_path / "last.ckpt", **options)
    (seen,) = next(iter(fresh.seen.values()))
    for name in WEIGHTS:
        assert torch.equal(seen[name], trained.get_parameter(name))
        assert bool((fresh.get_parameter(name) != 0).all())
    assert_engine_clean(fresh)


def test_resume_under_manual_optimization_equals_no_interruption(tmp_path: Path) -> None:
    class Manual(Net):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Sequence[torch.Tensor], batch_idx: int) -> None:
            optimizer = self.optimizers()
            for _ in range(2):
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch, "train"))
                optimizer.step()

        def on_train_epoch_end(self) -> None:
            if self.current_epoch == 1:
                self.trainer.save_checkpoint(tmp_path / "middle.ckpt")

    straight, resumed = seeded(Manual), seeded(Manual)
    first, second = growing(), growing()
    quiet_trainer(first, max_epochs=4).fit(straight, loader())
    quiet_trainer(second, max_epochs=4).fit(resumed, loader(), ckpt_path=tmp_path / "middle.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))


def test_the_callbacks_state_loads_with_weights_only(tmp_path: Path) -> None:
    module = seeded(Saves)
    module.path = tmp_path / "inside.ckpt"
    quiet_trainer(growing()).fit(module, loader())
    states = torch.load(module.path, weights_only=True)["callbacks"]
    (pruning,) = (state for key, state in states.items() if key.startswith("MagnitudePruning"))
    # one bit per weight
    assert {name: entry["bits"].numel() for name, entry in pruning["masks"].items()} == {
        "first.weight": 6,
        "second.weight": 3,
    }
    assert pruning["last_step"] == 6
