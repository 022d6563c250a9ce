"""The layer-wise norm penalty: its gradient in closed form, and its strength over the run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_fedsparse.callbacks import ErrorFeedback, IncrementalRegularization, MagnitudePruning
from lightning_fedsparse.callbacks.incremental_regularization import add_norm_gradients_
from lightning_fedsparse.schedules import (
    ConstantSchedule,
    LinearSchedule,
    OffsetStaircaseSchedule,
    Schedule,
    StaircaseSchedule,
)
from tests.effective_reference import Net, assert_engine_clean, loader, quiet_trainer, seeded


def test_the_gradient_of_three_and_four() -> None:
    gradient = torch.tensor([1.0, 1.0])
    add_norm_gradients_([gradient], [torch.tensor([3.0, -4.0])], 0.5)
    assert gradient.tolist() == pytest.approx([1.3, 0.6])


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0])
def test_zero_weights_have_a_gradient_of_zero(p: float) -> None:
    gradient = torch.zeros(3)
    add_norm_gradients_([gradient], [torch.zeros(3)], 0.5, p)
    assert gradient.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0])
def test_pruned_coordinates_get_nothing(p: float) -> None:
    gradient = torch.zeros(3)
    add_norm_gradients_([gradient], [torch.tensor([0.0, 2.0, -0.0])], 0.5, p)
    assert gradient.tolist() == pytest.approx([0.0, 0.5, 0.0])


@given(
    weight=st.lists(st.floats(-10, 10, width=32).filter(lambda w: w == 0 or abs(w) > 1e-3), min_size=1, max_size=6),
    p=st.sampled_from([1.0, 1.5, 2.0, 2.5, 4.0]),
    strength=st.floats(0, 2),
)
def test_the_gradient_equals_that_of_autograd(weight: list[float], p: float, strength: float) -> None:
    leaf = torch.tensor(weight, dtype=torch.float64, requires_grad=True)
    if float(leaf.detach().abs().max()) == 0:
        return
    (strength * torch.linalg.vector_norm(leaf, p)).backward()
    gradient = torch.zeros_like(leaf)
    add_norm_gradients_([gradient], [leaf.detach()], strength, p)
    torch.testing.assert_close(gradient, leaf.grad.nan_to_num(), rtol=1e-9, atol=1e-12)


def test_tiny_norms_stay_finite() -> None:
    gradient = torch.zeros(2)
    add_norm_gradients_([gradient], [torch.tensor([1e-42, 0.0])], 1.0)
    assert bool(gradient.isfinite().all())


class Strengths(Net):
    """Writes down the length of the gradient that a loss of zero leaves: the strength itself, once per layer."""

    def __init__(self) -> None:
        super().__init__()
        self.lengths: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.loss(batch, "train") * 0

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.lengths.append(float(self.first.weight.grad.norm()))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (StaircaseSchedule(1.0, 5), [0, 0, 0.2, 0.2, 0.4, 0.4, 0.6, 0.6, 0.8, 0.8]),
        (LinearSchedule(0.0, 1.0), [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]),
        (OffsetStaircaseSchedule(1.0, 5, offset=0.2), [0, 0, 0.2, 0.2, 0.4, 0.4, 0.6, 0.6, 0.8, 0.8]),
    ],
)
@pytest.mark.parametrize("beside", [[], [MagnitudePruning(ConstantSchedule(0.5), every=1), ErrorFeedback()]])
def test_the_strength_follows_the_schedule(schedule: Schedule, expected: list[float], beside: list[Any]) -> None:
    module = seeded(Strengths)
    quiet_trainer([IncrementalRegularization(schedule), *beside]).fit(module, loader())
    assert module.lengths == pytest.approx(expected, abs=1e-6)


def test_the_logged_loss_is_without_the_penalty() -> None:
    class Logs(Net):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = self.loss(batch, "train")
            if batch_idx == 0 and self.current_epoch == 0:
                self.log("first_loss", loss)
            return loss

    values = []
    for callbacks in ([], [IncrementalRegularization(ConstantSchedule(10.0))]):
        trainer = quiet_trainer(callbacks, max_epochs=1, limit_train_batches=1)
        trainer.fit(seeded(Logs), loader())
        values.append(float(trainer.callback_metrics["first_loss"]))
    assert values[0] == values[1]


@pytest.mark.parametrize("p", [0.5, float("inf"), float("nan")])
def test_another_order_of_the_norm_is_refused(p: float) -> None:
    with pytest.raises(ValueError, match=r"expected the order p of a norm in \[1, inf\), got"):
        IncrementalRegularization(ConstantSchedule(0.1), p=p)


def test_a_negative_strength_is_refused_at_construction() -> None:
    with pytest.raises(ValueError, match="expected a regularization strength of at least 0, got -0.1"):
        IncrementalRegularization(ConstantSchedule(-0.1))


def test_a_model_without_such_weights_is_refused() -> None:
    module = seeded(Net)
    with pytest.raises(ValueError, match="expected a model with something to prune"):
        quiet_trainer([IncrementalRegularization(ConstantSchedule(0.1), exclude=["*"])]).fit(module, loader())
    assert_engine_clean(module)
