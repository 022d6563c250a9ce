"""A learning-rate factor per epoch (per round in a federation), beside no scheduler and beside the user's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CyclicLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    OneCycleLR,
    StepLR,
)

from lightning_fedsparse.callbacks import RoundLearningRate
from lightning_fedsparse.rounds import ClientRound
from lightning_fedsparse.schedules import ConstantSchedule, ExponentialSchedule, LinearSchedule
from lightning_fedsparse.update import MaskSet
from tests.effective_reference import Net, loader, quiet_trainer, seeded

MakeScheduler = Callable[[Optimizer], LRScheduler]


class Rates(Net):
    """Writes down the learning rate of every step; its scheduler, if any, steps once per epoch."""

    def __init__(self, scheduler: MakeScheduler | None = None) -> None:
        super().__init__()
        self.make_scheduler = scheduler
        self.rates: list[float] = []

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])

    def configure_optimizers(self) -> Any:
        optimizer = SGD(self.parameters(), lr=0.1)
        return optimizer if self.make_scheduler is None else ([optimizer], [self.make_scheduler(optimizer)])


def rates_per_epoch(module: Rates, *, epochs: int = 4) -> list[float]:
    steps = len(module.rates) // epochs
    assert all(len(set(module.rates[start : start + steps])) == 1 for start in range(0, len(module.rates), steps))
    return module.rates[::steps]


def test_the_released_codes_decay() -> None:
    module = Rates()
    quiet_trainer([RoundLearningRate()], max_epochs=4).fit(module, loader())
    assert rates_per_epoch(module) == pytest.approx([0.1, 0.0998, 0.0996004, 0.0994011992])


def test_the_rate_stays_where_the_factor_is_one() -> None:
    module = Rates()
    quiet_trainer([RoundLearningRate(ConstantSchedule(1.0))], max_epochs=4).fit(module, loader())
    assert rates_per_epoch(module) == [0.1] * 4


def test_without_an_end_a_decay_per_epoch_still_works() -> None:
    module = Rates()
    quiet_trainer([RoundLearningRate(ExponentialSchedule(1.0, 0.5))], max_epochs=-1, max_steps=20).fit(module, loader())
    assert rates_per_epoch(module) == pytest.approx([0.1, 0.05, 0.025, 0.0125])


@pytest.mark.parametrize(
    ("scheduler", "alone"),
    [
        (lambda optimizer: StepLR(optimizer, 2, gamma=0.1), [0.1, 0.1, 0.01, 0.01]),
        (lambda optimizer: MultiStepLR(optimizer, [1, 3], gamma=0.5), [0.1, 0.05, 0.05, 0.025]),
        (lambda optimizer: CosineAnnealingLR(optimizer, 4), [0.1, 0.0853553391, 0.05, 0.0146446609]),
        (lambda optimizer: LambdaLR(optimizer, lambda epoch: 1 / (1 + epoch)), [0.1, 0.05, 0.1 / 3, 0.025]),
        (lambda optimizer: LinearLR(optimizer, 0.25, total_iters=3), [0.025, 0.05, 0.075, 0.1]),
    ],
    ids=["StepLR", "MultiStepLR", "CosineAnnealingLR", "LambdaLR", "LinearLR"],
)
def test_a_scheduler_goes_on_and_is_multiplied(scheduler: MakeScheduler, alone: list[float]) -> None:
    plain, module = Rates(scheduler), Rates(scheduler)
    quiet_trainer([], max_epochs=4).fit(plain, loader())
    assert rates_per_epoch(plain) == pytest.approx(alone)
    quiet_trainer([RoundLearningRate(ExponentialSchedule(1.0, 0.5))], max_epochs=4).fit(module, loader())
    assert rates_per_epoch(module) == pytest.approx([rate * 0.5**epoch for epoch, rate in enumerate(alone)])


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda optimizer: OneCycleLR(optimizer, 0.4, total_steps=20),
        lambda optimizer: CyclicLR(optimizer, 0.1, 0.4, step_size_up=3, cycle_momentum=False),
    ],
    ids=["OneCycleLR", "CyclicLR"],
)
def test_a_scheduler_of_steps_is_multiplied_too(scheduler: MakeScheduler) -> None:
    class PerStep(Rates):
        def configure_optimizers(self) -> Any:
            optimizer = SGD(self.parameters(), lr=0.1)
            return [optimizer], [{"scheduler": scheduler(optimizer), "interval": "step"}]

    plain, module = PerStep(), PerStep()
    quiet_trainer([], max_epochs=4).fit(plain, loader())
    quiet_trainer([RoundLearningRate(ExponentialSchedule(1.0, 0.5))], max_epochs=4).fit(module, loader())
    assert module.rates == pytest.approx([rate * 0.5 ** (step // 5) for step, rate in enumerate(plain.rates)])


@pytest.mark.parametrize("scheduler", [None, lambda o: StepLR(o, 2, gamma=0.1), lambda o: CosineAnnealingLR(o, 4)])
def test_resume_equals_no_interruption(scheduler: MakeScheduler | None, tmp_path: Path) -> None:
    class Saves(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    def make() -> list[pl.Callback]:
        return [RoundLearningRate(ExponentialSchedule(1.0, 0.5))]

    straight, resumed = seeded(lambda: Rates(scheduler)), seeded(lambda: Rates(scheduler))
    quiet_trainer([*make(), Saves()], max_epochs=4).fit(straight, loader())
    quiet_trainer(make(), max_epochs=4).fit(resumed, loader(), ckpt_path=tmp_path / "1.ckpt")
    assert resumed.rates == straight.rates[10:]
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))


def test_a_second_fit_starts_again() -> None:
    callback = RoundLearningRate(ExponentialSchedule(1.0, 0.5))
    modules = [Rates(), Rates()]
    for module in modules:
        quiet_trainer([callback], max_epochs=4).fit(module, loader())
    assert modules[0].rates == modules[1].rates


def test_in_a_client_round_the_round_counts() -> None:
    callback = RoundLearningRate(ExponentialSchedule(1.0, 0.5))
    callback.client_round = ClientRound(index=3, total=10, client_id="a", seed=0, masks=MaskSet.of({}))
    module = Rates()
    quiet_trainer([callback], max_epochs=2).fit(module, loader())
    assert rates_per_epoch(module, epochs=2) == pytest.approx([0.0125, 0.0125])


def test_a_factor_that_is_not_positive_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a positive learning rate factor, got 0.0"):
        quiet_trainer([RoundLearningRate(LinearSchedule(0.0, 1.0))]).fit(Rates(), loader())
