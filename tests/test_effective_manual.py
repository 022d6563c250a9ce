"""The swap engine under manual optimization: several optimizers, several steps per batch, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import LBFGS, SGD

from lightning_fedsparse.callbacks import ErrorFeedback, MagnitudePruning
from lightning_fedsparse.effective import EffectiveWeights
from lightning_fedsparse.schedules import ConstantSchedule, LinearSchedule
from tests.effective_reference import (
    Net,
    assert_engine_clean,
    loader,
    quiet_trainer,
    seeded,
    sgd,
    sorted_masks,
    weights_of,
)

PRUNED = ("generator.weight", "critic.weight")


class Adversarial(pl.LightningModule):
    """Two optimizers that step in turn; the critic's second loss reuses the generator's graph, as GANs do."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Linear(6, 5)
        self.critic = nn.Linear(5, 1)
        self.seen: list[dict[str, Tensor]] = []

    def critic_loss(self, fake: Tensor) -> Tensor:
        return F.softplus(self.critic(fake)).mean()

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        first, second = self.optimizers()
        fake = torch.tanh(self.generator(batch[0]))
        self.seen.append(weights_of(self))
        self.manual_backward(self.critic_loss(fake.detach()))
        first.step()
        first.zero_grad()
        self.seen.append(weights_of(self))
        self.manual_backward(-self.critic_loss(fake))
        second.step()
        second.zero_grad()
        first.zero_grad()
        self.seen.append(weights_of(self))

    def configure_optimizers(self) -> Any:
        return sgd(self.critic.parameters()), sgd(self.generator.parameters())


def prune_half(*, fold: bool = False) -> MagnitudePruning:
    return MagnitudePruning(ConstantSchedule(0.5), every=1, end=1.0, fold=fold)


def adversarial_reference(module: Adversarial, batches: Sequence[Sequence[Tensor]], *, feedback: bool) -> None:
    first, second = module.configure_optimizers()
    parameters = dict(module.named_parameters())
    masks = {name: torch.ones_like(parameters[name]) for name in PRUNED}

    def prune() -> None:
        ranked = {name: parameters[name] if feedback else parameters[name] * masks[name] for name in PRUNED}
        masks.update({name: mask.float() for name, mask in sorted_masks(ranked, 0.5).items()})

    def run(layer: str, x: Tensor) -> Tensor:
        weight = parameters[f"{layer}.weight"]
        kept = weight * masks[f"{layer}.weight"]
        effective = weight + (kept - weight).detach() if feedback else kept
        return functional_call(getattr(module, layer), {"weight": effective}, x)

    for x, _ in batches:
        prune()
        fake = torch.tanh(run("generator", x))
        F.softplus(run("critic", fake.detach())).mean().backward()
        first.step()
        first.zero_grad()
        (-F.softplus(run("critic", fake)).mean()).backward()
        second.step()
        second.zero_grad()
        first.zero_grad()


@pytest.mark.parametrize("feedback", [True, False])
def test_two_optimizers_equal_the_reference(feedback: bool) -> None:
    module, twin = seeded(Adversarial), seeded(Adversarial)
    quiet_trainer([prune_half(), *([ErrorFeedback()] if feedback else [])]).fit(module, loader())
    adversarial_reference(twin, [*loader(), *loader()], feedback=feedback)
    for name, expected in twin.named_parameters():
        weight = module.get_parameter(name).detach()
        if feedback or name not in PRUNED:
            torch.testing.assert_close(weight, expected.detach(), rtol=0, atol=1e-7)
    assert_engine_clean(module)


def test_every_forward_of_a_manual_step_runs_at_effective_weights() -> None:
    module = seeded(Adversarial)
    quiet_trainer([prune_half(), ErrorFeedback()]).fit(module, loader())
    assert len(module.seen) == 30
    for weights in module.seen:
        assert sum(int((weights[name] == 0).sum()) for name in PRUNED) == 18  # round(0.5 * 35), half to even


def test_a_graph_kept_across_the_step_of_its_own_optimizer_raises() -> None:
    class Stale(Adversarial):
        def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
            optimizer, _ = self.optimizers()
            loss = self.critic_loss(torch.tanh(self.generator(batch[0])))
            self.manual_backward(loss, retain_graph=True)
            optimizer.step()
            self.manual_backward(loss)

    module = seeded(Stale)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        quiet_trainer([prune_half(), ErrorFeedback()]).fit(module, loader())
    assert_engine_clean(module)


class TwoSteps(Net):
    """One optimizer, two backward passes and two steps per batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        for _ in range(2):
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch, "train"))
            optimizer.step()


def test_two_steps_per_batch_equal_twice_the_batches() -> None:
    module, twin = seeded(TwoSteps), seeded(Net)
    pruning = MagnitudePruning(ConstantSchedule(0.5), every=1000, end=1.0, fold=False)
    quiet_trainer([pruning, ErrorFeedback()]).fit(module, loader())
    doubled = torch.utils.data.DataLoader([sample for batch in loader() for sample in (batch, batch)], batch_size=None)
    other = MagnitudePruning(ConstantSchedule(0.5), every=1000, end=1.0, fold=False)
    quiet_trainer([other, ErrorFeedback()]).fit(twin, doubled)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("options", [{"max_epochs": 2}, {"max_epochs": -1, "max_steps": 20}, {"max_steps": 7}])
@pytest.mark.parametrize("make", [Adversarial, TwoSteps])
def test_the_final_sparsity_is_reached_at_the_last_batch(
    make: type[pl.LightningModule], options: dict[str, Any]
) -> None:
    module = seeded(make)
    pruning = MagnitudePruning(LinearSchedule(0.0, 0.8), every=3, end=1.0)
    quiet_trainer([pruning, ErrorFeedback()], **options).fit(module, loader())
    kept = sum(int(mask.sum()) for mask in pruning.masks.values())
    total = sum(mask.numel() for mask in pruning.masks.values())
    assert kept == total - round(0.8 * total)


def test_a_step_that_went_round_lightning_is_refused() -> None:
    class Bypass(Net):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
            optimizer = self.optimizers(use_pl_optimizer=False)
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch, "train"))
            optimizer.step()

    module = seeded(Bypass)
    with pytest.raises(RuntimeError, match="use_pl_optimizer"):
        quiet_trainer([prune_half(), ErrorFeedback()]).fit(module, loader())
    assert_engine_clean(module)


def test_hooks_leave_the_optimizers_after_fit() -> None:
    module = seeded(Adversarial)
    trainer = quiet_trainer([prune_half(), ErrorFeedback()])
    trainer.fit(module, loader())
    assert all(not optimizer._optimizer_step_post_hooks for optimizer in trainer.optimizers)
    # an optimizer that lives on steps without the engine
    before = weights_of(module)
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert all(bool((weights_of(module)[name] != before[name]).any()) for name in before)


def test_lbfgs_is_refused() -> None:
    module = seeded(lambda: Net(lambda parameters: LBFGS(parameters)))
    with pytest.raises(ValueError, match="expected an optimizer that evaluates its closure once per step, got LBFGS"):
        quiet_trainer([prune_half()]).fit(module, loader())
    assert_engine_clean(module)


def test_weight_averaging_before_the_engine_is_refused_under_manual_optimization() -> None:
    module = seeded(Adversarial)
    with pytest.raises(ValueError, match="expected WeightAveraging after MagnitudePruning"):
        quiet_trainer([EMAWeightAveraging(), prune_half()]).fit(module, loader())
    assert_engine_clean(module)


def test_weight_averaging_after_the_engine_averages_stored_weights() -> None:
    class Recorder(EMAWeightAveraging):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
            averaged.append(weights_of(pl_module))
            super().on_train_batch_end(trainer, pl_module, *args)

    averaged: list[dict[str, Tensor]] = []
    module = seeded(Adversarial)
    quiet_trainer([prune_half(), ErrorFeedback(), Recorder(decay=0.5)]).fit(module, loader())
    assert all(bool((weights[name] != 0).all()) for weights in averaged for name in PRUNED)


def test_a_parameter_without_optimizer_is_swapped_too() -> None:
    class Frozen(Net):
        def configure_optimizers(self) -> Any:
            return SGD(self.second.parameters(), lr=0.1)

    module = seeded(Frozen)
    before = weights_of(module)
    quiet_trainer([prune_half(), ErrorFeedback()]).fit(module, loader())
    assert torch.equal(module.first.weight, before["first.weight"])
    assert all(int((weights["first.weight"] == 0).sum()) > 0 for weights in module.seen["train"])
    assert not EffectiveWeights.of(module)._stored
