"""The swap engine and everything that can happen around a batch: skips, errors, late-built layers."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lightning_fedsparse.callbacks import ErrorFeedback, IncrementalRegularization, MagnitudePruning, SparsityMonitor
from lightning_fedsparse.effective import EffectiveWeights
from lightning_fedsparse.schedules import ConstantSchedule
from tests.effective_reference import (
    WEIGHTS,
    Net,
    assert_engine_clean,
    loader,
    quiet_trainer,
    reference_fit,
    seeded,
    weights_of,
)

ZEROS = 36  # half of the 72 weights


def prune_half(*, fold: bool = False) -> MagnitudePruning:
    return MagnitudePruning(ConstantSchedule(0.5), every=1000, end=1.0, fold=fold)


def zeros(weights: dict[str, Tensor]) -> int:
    return sum(int((weights[name] == 0).sum()) for name in WEIGHTS)


def assert_same(module: nn.Module, twin: nn.Module) -> None:
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), twin.parameters(), strict=True))


# -- batches that do not train -----------------------------------------------------------------------------------------


class Skips(Net):
    """``training_step`` returns None for some batches of an epoch."""

    none_at: tuple[int, ...] = (1,)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Any:
        loss = self.loss(batch, "train")
        return None if batch_idx in self.none_at else loss


class Zeroed(Skips):
    """The same gradients without None."""

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Any:
        loss = self.loss(batch, "train")
        return loss * 0 if batch_idx in self.none_at else loss


@pytest.mark.filterwarnings("ignore:.*returned `None`.*")
@pytest.mark.parametrize(("none_at", "kept"), [((1,), [0, 2, 3, 4]), ((0, 4), [1, 2, 3])])
def test_a_training_step_that_returns_none(none_at: tuple[int, ...], kept: list[int]) -> None:
    module, twin = seeded(Skips), seeded(Net)
    module.none_at = none_at
    quiet_trainer([prune_half(), ErrorFeedback()], max_epochs=1).fit(module, loader())
    batches = [list(loader())[index] for index in kept]
    reference_fit(twin, batches, sparsity_at=lambda step: 0.5 if step == 0 else None, feedback=True, epochs=1)
    assert [zeros(weights) for weights in module.seen["train"]] == [ZEROS] * 5
    assert_same(module, twin)
    assert_engine_clean(module)


@pytest.mark.filterwarnings("ignore:.*returned `None`.*")
@pytest.mark.parametrize("none_at", [(0,), (1,), (0, 3)])
def test_a_training_step_that_returns_none_while_gradients_accumulate(none_at: tuple[int, ...]) -> None:
    module, twin = seeded(Skips), seeded(Zeroed)
    module.none_at = twin.none_at = none_at
    for each in (module, twin):
        quiet_trainer([prune_half(), ErrorFeedback()], accumulate_grad_batches=2).fit(each, loader())
    assert [zeros(weights) for weights in module.seen["train"]] == [ZEROS] * 10
    assert_same(module, twin)


class EndsEpoch(Net):
    """``on_train_batch_start`` returns -1 at the fourth batch: Lightning skips the rest of the epoch."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx == 3 else None

    def on_train_epoch_end(self) -> None:
        self.seen.setdefault("epoch_end", []).append(weights_of(self))


def test_an_epoch_cut_short_by_minus_one() -> None:
    module, twin = seeded(EndsEpoch), seeded(Net)
    quiet_trainer([prune_half(), ErrorFeedback()]).fit(module, loader())
    reference_fit(twin, list(loader())[:3], sparsity_at=lambda step: 0.5 if step == 0 else None, feedback=True)
    assert_same(module, twin)
    assert [zeros(weights) for weights in module.seen["epoch_end"]] == [0, 0]


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def _sigint() -> Iterator[None]:
    """Lightning ignores further Ctrl-C once it has seen one."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


class Raises(Net):
    error: BaseException = RuntimeError("broken")
    where = "training_step"

    def fail_at(self, where: str, batch_idx: int) -> None:
        if where == self.where and batch_idx == 2:
            raise self.error

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.fail_at("training_step", batch_idx)
        return loss

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.fail_at("on_train_batch_start", batch_idx)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.fail_at("on_before_optimizer_step", len(self.seen["train"]) - 1)


@pytest.mark.usefixtures("_sigint")
@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["training_step", "on_train_batch_start", "on_before_optimizer_step"])
def test_after_an_error_the_stored_weights_are_back(where: str, error: BaseException) -> None:
    module, twin = seeded(Raises), seeded(Net)
    module.error, module.where = error, where
    trainer = quiet_trainer([prune_half(fold=True), ErrorFeedback()])
    # Lightning turns Ctrl-C into an exit
    with pytest.raises(RuntimeError if isinstance(error, RuntimeError) else SystemExit):
        trainer.fit(module, loader())
    reference_fit(
        twin, list(loader())[:2], sparsity_at=lambda step: 0.5 if step == 0 else None, feedback=True, epochs=1
    )
    assert_same(module, twin)
    assert_engine_clean(module)
    assert all(not optimizer._optimizer_step_post_hooks for optimizer in trainer.optimizers)


def test_a_fit_after_a_failed_one_starts_clean() -> None:
    module, twin = seeded(Raises), seeded(Raises)
    callbacks: list[pl.Callback] = [prune_half(), ErrorFeedback()]
    with pytest.raises(RuntimeError, match="broken"):
        quiet_trainer(callbacks).fit(module, loader())
    twin.load_state_dict(module.state_dict())
    module.where = twin.where = "nowhere"
    quiet_trainer(callbacks).fit(module, loader())
    quiet_trainer([prune_half(), ErrorFeedback()]).fit(twin, loader())
    assert_same(module, twin)


# -- modules that are built late ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("hook", ["setup", "configure_model"])
def test_layers_that_a_hook_builds_are_pruned(hook: str) -> None:
    class Late(Net):
        def __init__(self) -> None:
            super().__init__()
            self.first = self.second = None  # type: ignore[assignment]

        def build(self) -> None:
            if self.first is None:
                self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)

        def setup(self, stage: str) -> None:
            if hook == "setup":
                self.build()

        def configure_model(self) -> None:
            if hook == "configure_model":
                self.build()

    module = Late()
    callbacks = [prune_half(fold=True), ErrorFeedback(), IncrementalRegularization(ConstantSchedule(0.1))]
    quiet_trainer([*callbacks, SparsityMonitor()]).fit(module, loader())
    assert zeros(weights_of(module)) == ZEROS


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_a_model_with_nothing_to_prune_is_refused() -> None:
    module = seeded(Net)
    pruning = MagnitudePruning(ConstantSchedule(0.5), exclude=["*"])
    with pytest.raises(ValueError, match="expected a model with something to prune, got Net"):
        quiet_trainer([pruning]).fit(module, loader())
    assert_engine_clean(module)


def test_error_feedback_without_masks_is_refused() -> None:
    module = seeded(Net)
    with pytest.raises(ValueError, match="expected a callback that prunes beside ErrorFeedback"):
        quiet_trainer([ErrorFeedback(), IncrementalRegularization(ConstantSchedule(0.1))]).fit(module, loader())
    assert_engine_clean(module)


@pytest.mark.parametrize("manual", [True, False])
def test_a_run_without_an_end_is_refused(manual: bool) -> None:
    module = seeded(Net)
    module.automatic_optimization = not manual
    with pytest.raises(ValueError, match="expected a run with an end"):
        quiet_trainer([prune_half()], max_epochs=-1).fit(module, loader())
    assert_engine_clean(module)


def test_a_loader_without_length_needs_max_steps() -> None:
    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(loader())

    stream = torch.utils.data.DataLoader(Stream(), batch_size=None)
    with pytest.raises(ValueError, match="expected a run with an end"):
        quiet_trainer([prune_half()]).fit(seeded(Net), stream)
    module = seeded(Net)
    quiet_trainer([prune_half(fold=True)], max_steps=7).fit(module, stream)
    assert zeros(weights_of(module)) == ZEROS
    assert not EffectiveWeights.of(module)._stored


def test_a_step_that_goes_round_lightning_is_refused() -> None:
    class Bypass(Net):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            optimizer.optimizer.step(optimizer_closure)

    module = seeded(Bypass)
    with pytest.raises(RuntimeError, match="expected every step to go through Lightning's optimizers"):
        quiet_trainer([prune_half(), ErrorFeedback()]).fit(module, loader())
    assert_engine_clean(module)
