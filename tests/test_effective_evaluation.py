"""The swap engine in validation, test and prediction: effective weights for every batch, stored ones between them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_fedsparse.callbacks import ErrorFeedback, IncrementalRegularization, MagnitudePruning, SparsityMonitor
from lightning_fedsparse.schedules import ConstantSchedule
from tests.effective_reference import (
    WEIGHTS,
    EvaluatedNet,
    assert_engine_clean,
    loader,
    quiet_trainer,
    seeded,
    weights_of,
)

ZEROS = 36  # half of the 72 weights


def prune_half() -> MagnitudePruning:
    return MagnitudePruning(ConstantSchedule(0.5), every=1000, end=1.0, fold=False)


def zeros(weights: dict[str, Tensor]) -> int:
    return sum(int((weights[name] == 0).sum()) for name in WEIGHTS)


def assert_same(module: nn.Module, twin: nn.Module) -> None:
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), twin.parameters(), strict=True))


def test_validation_sees_effective_weights_and_gives_the_stored_ones_back() -> None:
    class Watched(EvaluatedNet):
        def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.seen.setdefault("after", []).append(weights_of(self))

    module = seeded(Watched)
    trainer = quiet_trainer([prune_half(), ErrorFeedback()], num_sanity_val_steps=0)
    trainer.fit(module, loader(), loader(2))
    assert [zeros(weights) for weights in module.seen["validation"]] == [ZEROS] * 4
    assert [zeros(weights) for weights in module.seen["after"]] == [0] * 4


@pytest.mark.parametrize("interval", [1, 2])
def test_validation_inside_an_accumulation_window_changes_nothing(interval: int) -> None:
    module, twin = seeded(EvaluatedNet), seeded(EvaluatedNet)
    options = {"accumulate_grad_batches": 3, "num_sanity_val_steps": 0}
    quiet_trainer([prune_half(), ErrorFeedback()], **options, val_check_interval=interval).fit(
        module, loader(), loader(1)
    )
    quiet_trainer([prune_half(), ErrorFeedback()], **options).fit(twin, loader(), loader(1))
    assert_same(module, twin)


def test_test_and_predict_after_fit_see_effective_weights() -> None:
    module = seeded(EvaluatedNet)
    trainer = quiet_trainer([prune_half(), ErrorFeedback()], num_sanity_val_steps=0)
    trainer.fit(module, loader(), loader(1))
    stored = weights_of(module)
    trainer.validate(module, loader(1), verbose=False)
    trainer.test(module, loader(1), verbose=False)
    trainer.predict(module, loader(1))
    for stage in ("validation", "test", "predict"):
        assert zeros(module.seen[stage][-1]) == ZEROS
    assert zeros(stored) == 0
    assert all(torch.equal(weights_of(module)[name], stored[name]) for name in stored)
    assert_engine_clean(module)


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_evaluation_before_any_fit_is_dense(stage: str) -> None:
    module = seeded(EvaluatedNet)
    callbacks = [prune_half(), ErrorFeedback(), IncrementalRegularization(ConstantSchedule(0.1)), SparsityMonitor()]
    getattr(quiet_trainer(callbacks), stage)(module, loader(1))
    (seen,) = next(iter(module.seen.values()))
    assert zeros(seen) == 0
    assert_engine_clean(module)


def test_an_error_in_validation_gives_the_stored_weights_back() -> None:
    class Fails(EvaluatedNet):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            raise RuntimeError("broken validation")

    module = seeded(Fails)
    with pytest.raises(RuntimeError, match="broken validation"):
        quiet_trainer([prune_half(), ErrorFeedback()], num_sanity_val_steps=0).fit(module, loader(), loader(1))
    assert zeros(weights_of(module)) == 0
    assert_engine_clean(module)


def test_evaluating_a_module_of_other_shapes_is_refused() -> None:
    class Wider(EvaluatedNet):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 9), nn.Linear(9, 3)

    trainer = quiet_trainer([prune_half()], num_sanity_val_steps=0)
    trainer.fit(seeded(EvaluatedNet), loader(), loader(1))
    with pytest.raises(
        ValueError, match=r"expected the module that MagnitudePruning pruned last, got Wider .* \(9, 6\)"
    ):
        trainer.validate(seeded(Wider), loader(1), verbose=False)
