"""The swap engine under torch.compile and in mixed precision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F

from lightning_fedsparse.callbacks import ErrorFeedback, IncrementalRegularization, MagnitudePruning
from lightning_fedsparse.schedules import ConstantSchedule, LinearSchedule
from tests.effective_reference import WEIGHTS, Net, assert_engine_clean, loader, quiet_trainer, seeded, weights_of


class Quiet(Net):
    """Writes nothing down: what is compiled should be the model only."""

    def training_step(self, batch: Sequence[torch.Tensor], batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0]), batch[1])


def growing(*, fold: bool = True) -> list[pl.Callback]:
    pruning = MagnitudePruning(LinearSchedule(0.2, 0.75), every=3, end=1.0, fold=fold)
    return [pruning, ErrorFeedback(), IncrementalRegularization(ConstantSchedule(0.05))]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch.compile warns about its own internals
def test_a_compiled_module_trains_as_the_eager_one() -> None:
    eager, compiled = seeded(Quiet), seeded(Quiet)
    quiet_trainer(growing()).fit(eager, loader())
    # graph capture and ahead-of-time autograd are what could clash with the swap; generating code takes ten times longer
    quiet_trainer(growing()).fit(torch.compile(compiled, backend="aot_eager"), loader())
    for name, expected in weights_of(eager).items():
        torch.testing.assert_close(compiled.get_parameter(name).detach(), expected, rtol=0, atol=1e-5)
    assert sum(int((compiled.get_parameter(name) == 0).sum()) for name in WEIGHTS) == 54
    assert_engine_clean(compiled)


def test_mixed_precision_keeps_stored_weights_in_float32() -> None:
    module, twin = seeded(Net), seeded(Net)
    quiet_trainer(growing(fold=False), precision="bf16-mixed").fit(module, loader())
    quiet_trainer(growing(fold=False)).fit(twin, loader())
    for name, expected in weights_of(twin).items():
        assert module.get_parameter(name).dtype == torch.float32
        # bfloat16 has 8 bits of precision; lost updates or dense forwards would be off by far more
        torch.testing.assert_close(module.get_parameter(name).detach(), expected, rtol=0, atol=0.05)
    assert all(bool((module.get_parameter(name) != 0).all()) for name in WEIGHTS)
    pruned_in_forward = [sum(int((seen[name] == 0).sum()) for name in WEIGHTS) for seen in module.seen["train"]]
    # masks move at steps 0, 3, 6 and 9 of 10: round(72 * (0.2 + 0.055 * step))
    assert pruned_in_forward == [14] * 3 + [26] * 3 + [38] * 3 + [50]


@pytest.mark.parametrize("feedback", [True, False])
def test_true_bfloat16(feedback: bool) -> None:
    module = seeded(Net)
    pruning = MagnitudePruning(ConstantSchedule(0.5), every=3, end=1.0)
    quiet_trainer([pruning, *([ErrorFeedback()] if feedback else [])], precision="bf16-true").fit(module, loader())
    assert module.first.weight.dtype == torch.bfloat16
    assert sum(int((module.get_parameter(name) == 0).sum()) for name in WEIGHTS) == 36
