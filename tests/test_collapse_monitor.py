"""A model that dies of pruning: the signs, and that they are said once."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from lightning_fedsparse import FederatedLoop
from lightning_fedsparse.callbacks import CollapseMonitor, Powerpropagation, TopKAfterTraining
from lightning_fedsparse.callbacks.collapse_monitor import output_variation
from lightning_fedsparse.schedules import ConstantSchedule
from tests.effective_reference import Net as SmallNet
from tests.effective_reference import loader, quiet_trainer, seeded
from tests.test_loop import QUIET, Net, clients, loaders


def test_output_variation() -> None:
    # means (2, 0); deviations 1, 1 of a norm sqrt(1 + 9)
    assert output_variation(torch.tensor([[1.0, 0.0], [3.0, 0.0]])) == pytest.approx((2 / 10) ** 0.5)
    assert output_variation(torch.tensor([[4.0, -1.0], [4.0, -1.0]])) == 0.0
    assert output_variation(torch.zeros(3, 2)) == 0.0


class Lopsided(Net):
    """Its first layer has the smallest weights of all."""

    def __init__(self) -> None:
        super().__init__(lr=1e-3)
        with torch.no_grad():
            self.first.weight.mul_(1e-3)


class Faint(Net):
    """Nearly everything passes by the bias."""

    def __init__(self) -> None:
        super().__init__(lr=1e-3)
        self.norm = nn.Identity()
        with torch.no_grad():
            self.first.weight.mul_(1e-6)
            self.last.bias.fill_(1.0)


def federate(model: Net, **options: Any) -> FederatedLoop:
    callbacks = [TopKAfterTraining(ConstantSchedule(0.9), **options), Powerpropagation(), CollapseMonitor()]
    loop = FederatedLoop(4, 3, callbacks, evaluation=QUIET, console=False)
    loop.fit(model, loaders(clients()))
    return loop


def test_a_layer_without_weights_is_said_once() -> None:
    with pytest.warns(UserWarning, match="killed the model") as caught:
        federate(Lopsided())
    (message,) = [str(warning.message) for warning in caught if "killed the model" in str(warning.message)]
    assert message.startswith("no weight is left in first.weight after round 1: ")
    assert "ramp=0.5 in sparsyfed" in message


def test_an_output_that_does_not_depend_on_the_input_is_said_once() -> None:
    with pytest.warns(UserWarning, match="killed the model") as caught:
        loop = federate(Faint(), layer_floor=0.05)
    (message,) = [str(warning.message) for warning in caught if "killed the model" in str(warning.message)]
    assert message.startswith("the model's output hardly depends on its input any more after round 1: ")
    assert all(record.metrics["output_variation"] < 0.01 for record in loop.history[1:])


def test_a_model_that_lives_is_left_in_peace() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loop = federate(Net(), layer_floor=0.05)
    assert all(record.metrics["output_variation"] > 0.1 for record in loop.history[1:])


def test_a_layer_that_dies_at_the_end_of_fit_is_said() -> None:
    module = seeded(SmallNet)
    with torch.no_grad():
        module.second.weight.zero_()
    module.second.weight.requires_grad = False
    with pytest.warns(UserWarning, match="no weight is left in second.weight: pruning may have killed"):
        quiet_trainer([TopKAfterTraining(ConstantSchedule(0.5)), CollapseMonitor()]).fit(module, loader())


def test_a_layer_that_was_excluded_is_not_looked_at() -> None:
    module = seeded(SmallNet)
    with torch.no_grad():
        module.second.weight.zero_()
    quiet_trainer([CollapseMonitor(include=["first.weight"])]).fit(module, loader())


def test_outputs_that_are_no_batch_are_passed_over() -> None:
    monitor = CollapseMonitor()
    for output in ((torch.ones(3, 2), None), torch.ones(3), torch.ones(1, 2)):
        monitor._see(nn.Linear(1, 1), (), output)
        assert monitor._output is None
