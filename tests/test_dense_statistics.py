"""BatchNorm statistics that come from a second, dense forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_fedsparse.callbacks import DenseStatistics, ErrorFeedback, MagnitudePruning
from lightning_fedsparse.schedules import ConstantSchedule
from tests.effective_reference import Net, loader, quiet_trainer, seeded


class Normalized(Net):
    """Keeps the stored weights and the batch of every step, read after the step."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.steps: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.norm(self.first(x))))

    def on_train_batch_end(self, outputs: Any, batch: Sequence[Tensor], batch_idx: int) -> None:
        self.steps.append((batch[0], self.first.weight.detach().clone(), self.first.bias.detach().clone()))


def callbacks() -> list[Any]:
    return [MagnitudePruning(ConstantSchedule(0.5), every=1000, fold=False), ErrorFeedback(), DenseStatistics()]


@pytest.mark.parametrize("reverse", [True, False])
def test_the_statistics_are_those_of_the_stored_weights(reverse: bool) -> None:
    module = seeded(Normalized)
    quiet_trainer(callbacks()[:: -1 if reverse else 1]).fit(module, loader())
    mean, variance = torch.zeros(8), torch.ones(8)
    for x, weight, bias in module.steps:
        hidden = x @ weight.T + bias
        mean = 0.9 * mean + 0.1 * hidden.mean(0)
        variance = 0.9 * variance + 0.1 * hidden.var(0)
    torch.testing.assert_close(module.norm.running_mean, mean)
    torch.testing.assert_close(module.norm.running_var, variance)
    assert module.norm.num_batches_tracked == 10


def test_training_itself_is_the_same() -> None:
    module, twin = seeded(Normalized), seeded(Normalized)
    quiet_trainer(callbacks()).fit(module, loader())
    quiet_trainer(callbacks()[:2]).fit(twin, loader())
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), twin.parameters(), strict=True))
    assert not torch.equal(module.norm.running_mean, twin.norm.running_mean)


def test_the_second_pass_logs_nothing_and_takes_any_signature() -> None:
    class Logs(Normalized):
        calls = 0

        def training_step(self, batch: Sequence[Tensor]) -> Tensor:  # type: ignore[override]
            loss = self.loss(batch, "train")
            self.log("train_loss", loss)
            return loss

        def log(self, *args: Any, **kwargs: Any) -> None:
            self.calls += 1
            super().log(*args, **kwargs)

    module = seeded(Logs)
    quiet_trainer(callbacks()).fit(module, loader())
    assert module.calls == 10
    assert len(module.seen["train"]) == 20
    assert "log" not in vars(module)


def test_manual_optimization_is_refused() -> None:
    module = seeded(Normalized)
    module.automatic_optimization = False
    with pytest.raises(ValueError, match="expected automatic optimization beside DenseStatistics, got Normalized"):
        quiet_trainer(callbacks()).fit(module, loader())
