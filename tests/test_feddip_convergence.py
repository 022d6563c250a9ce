r"""FedDIP's convergence statement on quadratics, where every quantity in it is known, through the callbacks.

For an L-smooth ``f`` bounded below by ``f*``, a constant step ``eta`` and the update ``w <- w - eta * g(w~)`` of dense
weights by the gradient found at the pruned ones ``w~ = w * m``,

.. math:: \frac{1}{T} \sum_t \lVert \nabla f(\tilde w_t) \rVert^2 \le \frac{2 (f(w_0) - f^*)}{\eta T} + L \eta G^2
   + \frac{L^2}{T} \sum_t \lVert w_t - \tilde w_t \rVert^2

with :math:`G^2` a bound of the squared gradients. The last term is the pruning error; it does not vanish.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_fedsparse.callbacks import DynamicPruning, ErrorFeedback, MagnitudePruning
from lightning_fedsparse.effective import EffectiveWeights
from lightning_fedsparse.schedules import ConstantSchedule, CubicSchedule
from tests.effective_reference import quiet_trainer

STEPS = 200
SIZE = 20


class Quadratic(pl.LightningModule):
    """``f(w) = 1/2 (w - w*)' A (w - w*)`` over one linear weight, in float64; keeps the dense and the pruned iterates."""

    def __init__(self, eigenvalues: Tensor, eta: float, seed: int, scale: float) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        basis, _ = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64))
        self.matrix = basis @ torch.diag(eigenvalues) @ basis.T
        self.best = torch.randn(SIZE, generator=generator, dtype=torch.float64)
        self.layer = nn.Linear(SIZE, 1, bias=False, dtype=torch.float64)
        with torch.no_grad():
            self.layer.weight.copy_(scale * torch.randn(1, SIZE, generator=generator, dtype=torch.float64))
        self.eta = eta
        self.dense: list[Tensor] = []
        self.pruned: list[Tensor] = []

    def value(self, w: Tensor) -> Tensor:
        return (w - self.best) @ self.matrix @ (w - self.best) / 2

    def gradient(self, w: Tensor) -> Tensor:
        return self.matrix @ (w - self.best)

    def training_step(self, batch: Tensor) -> Tensor:
        self.pruned.append(self.layer.weight.detach().flatten().clone())
        with EffectiveWeights.of(self).stored():
            self.dense.append(self.layer.weight.detach().flatten().clone())
        return self.value(self.layer.weight.flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.eta)


@dataclass
class Run:
    """Both sides of the statement on a realised trajectory."""

    mean_gradient: float
    last_gradient: float
    start: float
    step: float
    pruning: float

    @property
    def bound(self) -> float:
        return self.start + self.step + self.pruning


def run(
    callbacks: list[pl.Callback],
    *,
    share: float,
    seed: int = 0,
    eigenvalues: Tensor | None = None,
    scale: float = 3.0,
) -> Run:
    """Train with ``eta = share / L`` from weights of the given scale."""
    eigenvalues = torch.logspace(-1, 1, SIZE, dtype=torch.float64) if eigenvalues is None else eigenvalues
    smoothness = float(eigenvalues.max())
    eta = share / smoothness
    module = Quadratic(eigenvalues, eta, seed, scale)
    quiet_trainer(callbacks, max_epochs=1).fit(module, DataLoader([torch.zeros(1)] * STEPS, batch_size=1))
    assert len(module.dense) == STEPS
    for before, pruned, after in zip(module.dense, module.pruned, module.dense[1:], strict=False):
        # the statement is about this update; it is the callbacks that make it
        torch.testing.assert_close(after, before - eta * module.gradient(pruned), rtol=0, atol=1e-12)
    squares = [float(module.gradient(pruned).square().sum()) for pruned in module.pruned]
    errors = [float((a - b).square().sum()) for a, b in zip(module.dense, module.pruned, strict=True)]
    return Run(
        mean_gradient=sum(squares) / STEPS,
        last_gradient=squares[-1],
        start=2 * float(module.value(module.dense[0])) / (eta * STEPS),
        step=smoothness * eta * max(squares),
        pruning=smoothness**2 * sum(errors) / STEPS,
    )


MASKS: dict[str, Callable[[], Any]] = {
    "none": lambda: MagnitudePruning(ConstantSchedule(0.0)),
    "constant": lambda: MagnitudePruning(ConstantSchedule(0.5), every=STEPS, end=1.0),
    "moving": lambda: MagnitudePruning(CubicSchedule(0.0, 0.8), every=5, end=1.0),
    "FedDIP's": lambda: DynamicPruning(CubicSchedule(0.5, 0.9), every=10),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("share", [1.0, 0.5, 0.1])
@pytest.mark.parametrize("masks", MASKS)
def test_the_mean_squared_gradient_is_within_the_bound(masks: str, share: float, seed: int) -> None:
    trajectory = run([MASKS[masks](), ErrorFeedback()], share=share, seed=seed)
    assert trajectory.mean_gradient <= trajectory.bound
    assert (trajectory.pruning == 0) == (masks == "none")


def test_without_pruning_gradients_vanish_and_with_it_they_do_not() -> None:
    eigenvalues = torch.linspace(1, 2, SIZE, dtype=torch.float64)
    dense = run([MASKS["none"](), ErrorFeedback()], share=0.5, eigenvalues=eigenvalues)
    pruned = run([MASKS["constant"](), ErrorFeedback()], share=0.5, eigenvalues=eigenvalues)
    assert dense.last_gradient < 1e-9
    assert pruned.last_gradient > 1


def test_the_bound_needs_its_pruning_error() -> None:
    # near the origin, so that the terms of the dense statement are small; the weights that are cut would be needed
    eigenvalues = torch.ones(SIZE, dtype=torch.float64)
    pruning = MagnitudePruning(ConstantSchedule(0.9), every=STEPS, end=1.0)
    trajectory = run([pruning, ErrorFeedback()], share=0.05, eigenvalues=eigenvalues, scale=0.1)
    assert trajectory.start + trajectory.step < trajectory.mean_gradient <= trajectory.bound


def test_hard_masks_take_another_step_than_the_statement_is_about() -> None:
    with pytest.raises(AssertionError, match="not close"):
        run([MASKS["constant"]()], share=0.5)
