"""Arguments, models and data that a federation refuses, in one sentence each."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_fedsparse import FederatedLoop
from lightning_fedsparse.callbacks import MagnitudePruning
from lightning_fedsparse.evaluation import Evaluation
from lightning_fedsparse.schedules import ConstantSchedule
from tests.test_loop import QUIET, Net, clients, loaders
from tests.test_rounds import Evaluated, run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rounds": 0}, "expected rounds to be at least 1, got 0"),
        ({"clients_per_round": 0}, "expected clients_per_round to be at least 1, got 0"),
        (
            {"trainer": {"max_epoch": 3}},
            "expected an argument of lightning.pytorch.Trainer, got 'max_epoch'; did you mean",
        ),
        ({"buffers": "frozen"}, "expected buffers to be 'average', 'local' or 'recalibrate', got 'frozen'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        FederatedLoop(**{"rounds": 1, "clients_per_round": 1, **arguments})


def test_bad_models_and_data():
    loop = FederatedLoop(1, 7, evaluation=QUIET, console=False)
    with pytest.raises(ValueError, match="expected at most 6 clients per round, as many as there are, got 7"):
        loop.fit(Net(), loaders(clients()))
    with pytest.raises(TypeError, match=r"expected a FederatedDataModule, got Evaluated: wrap it"):
        loop.fit(Net(), Evaluated())
    with pytest.raises(TypeError, match="expected the model to be a lightning.pytorch LightningModule, got Linear"):
        loop.fit(nn.Linear(2, 2), loaders(clients()))

    class Foreign:
        pass

    Foreign.__module__ = "pytorch_lightning.core"
    with pytest.raises(TypeError, match="built on pytorch_lightning: import lightning.pytorch instead"):
        loop.fit(Foreign(), loaders(clients()))
    with pytest.raises(TypeError, match="expected a callback built on lightning.pytorch"):
        FederatedLoop(1, 1, [Foreign()])


def test_a_fit_without_a_step_and_a_loss_that_is_nan():
    with pytest.raises(
        RuntimeError, match=r"expected at least one optimizer step, got none from client 'c\d' in round 1"
    ):
        run(1, trainer={"max_epochs": 0})
    with pytest.raises(RuntimeError, match=r"expected a finite training loss, got nan from client 'c\d' in round 1"):
        run(1, model=Net(lr=1e30), trainer={"max_epochs": 5})


def test_nothing_to_prune_and_globs_that_match_nothing():
    class Bare(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3))

    with pytest.raises(ValueError, match="expected a model with something to prune, got Bare"):
        run(1, [MagnitudePruning(ConstantSchedule(0.5))], model=Bare())
    with pytest.raises(ValueError, match="nothing.*"):
        run(1, [MagnitudePruning(ConstantSchedule(0.5), include=["nothing.*"])])


def test_default_evaluation_without_validation_data_is_said_once():
    with pytest.warns(UserWarning, match="the global model is not evaluated: .* there is no validation data"):
        loop, _ = run(2, evaluation=Evaluation())
    assert loop.history[-1].metrics == {}
