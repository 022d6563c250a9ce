"""What is measured between rounds: on whose data, with which generators, and what a limit or a NaN does to it."""

import math
import random

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import DataLoader, IterableDataset

from lightning_fedsparse import FederatedDataModule, FederatedLoop
from lightning_fedsparse.callbacks import fiarse
from lightning_fedsparse.capacities import CapacityMapping
from lightning_fedsparse.clients import Client
from lightning_fedsparse.evaluation import Evaluation, Evaluator, evaluate, evaluate_clients, recalibrate
from lightning_fedsparse.executors import LocalExecutor
from lightning_fedsparse.faults import FaultPolicy
from lightning_fedsparse.testing import Fault, FaultyExecutor
from tests.test_loop import Net, clients

NAN = math.nan


class Own(pl.LightningDataModule):
    """A client's data; its validation batches are the numbers themselves."""

    def __init__(self, *numbers):
        super().__init__()
        self.numbers = torch.tensor(numbers)

    def train_dataloader(self):
        return DataLoader(torch.zeros(1))

    def val_dataloader(self):
        return DataLoader(self.numbers)


class Says(pl.LightningModule):
    """Logs the mean of what it is given."""

    def validation_step(self, batch, batch_idx):
        self.log("said", batch.mean())
        self.log("one", 1.0)


def federated(numbers, capacities=None):
    own = {f"c{place}": Own(*values) for place, values in enumerate(numbers)}
    levels = None if capacities is None else CapacityMapping(dict(zip(own, capacities, strict=True)))
    return FederatedDataModule(own, capacities=levels)


def over_clients(numbers, trainer=None, capacities=None):
    return evaluate_clients(Says(), federated(numbers, capacities), trainer or {}, lambda capacity: None)


ONE = {"clients/one/mean": 1.0, "clients/one/min": 1.0}


@pytest.mark.parametrize("numbers", [([NAN], [2.0], [4.0]), ([2.0], [4.0], [NAN]), ([2.0], [math.inf], [4.0])])
def test_a_client_whose_metric_is_not_finite_is_left_out_of_that_metric(numbers):
    assert over_clients(numbers) == {"clients/said/mean": 3.0, "clients/said/min": 2.0, **ONE}


def test_a_metric_that_no_client_of_a_level_has_is_not_reported_for_that_level():
    found = over_clients([[NAN], [5.0]], capacities=[1.0, 0.5])
    assert {name: value for name, value in found.items() if "said" in name} == {
        "clients/said/mean": 5.0,
        "clients/said/min": 5.0,
        "clients/said/mean@0.5": 5.0,
        "clients/said/min@0.5": 5.0,
    }
    assert over_clients([[NAN], [NAN]]) == ONE


@pytest.mark.parametrize(("limit", "said"), [(2, 2.0), (0.5, 2.0), (0, 5.0), (1.0, 5.0)])
def test_the_clients_limits_cap_what_is_evaluated_but_for_one_of_0(limit, said):
    numbers = [1.0, 3.0, 8.0, 8.0]
    assert over_clients([numbers], {"limit_val_batches": limit})["clients/said/mean"] == said
    data = FederatedDataModule({"c0": Own(*numbers)}, evaluation=Own(*numbers))
    assert evaluate(Says(), data, "validation", {"limit_val_batches": limit})["said"] == said


class SaysSome(Says):
    """Has one more metric for whoever has a 9."""

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        if 9 in batch:
            self.log("nine", batch.max())


def test_all_clients_are_evaluated_by_one_trainer_which_keeps_nothing_of_the_client_before(monkeypatch):
    built = []
    original = pl.Trainer.__init__

    def count(self, *arguments, **keywords):
        built.append(self)
        original(self, *arguments, **keywords)

    monkeypatch.setattr(pl.Trainer, "__init__", count)
    data = federated([[1.0, 2.0, 3.0], [9.0], [1.0]])
    assert evaluate_clients(SaysSome(), data, {}, lambda capacity: None) == {
        "clients/said/mean": 4.0,
        "clients/said/min": 1.0,
        **ONE,
        "clients/nine/mean": 9.0,
        "clients/nine/min": 9.0,
    }
    assert len(built) == 1


class Stream(IterableDataset):
    def __iter__(self):
        return iter([1.0, 3.0])


class WithLoaders(pl.LightningDataModule):
    def __init__(self, loaders):
        super().__init__()
        self.loaders = loaders

    def val_dataloader(self):
        return self.loaders


def evaluator(loaders):
    data = FederatedDataModule({"c0": DataLoader(torch.zeros(1))}, evaluation=WithLoaders(loaders))
    return Evaluator(Says(), data, Evaluation(), {}, seed=0)


@pytest.mark.parametrize(
    "loaders",
    [DataLoader(Stream()), CombinedLoader(DataLoader(torch.tensor([1.0, 3.0])), "sequential")],
    ids=["without a length", "combined"],
)
def test_validation_loaders_need_no_length(loaders):
    evaluates = evaluator(loaders)
    assert evaluates.is_due(0, 1)
    assert evaluates.run(lambda capacity: None, 0) == {"said": 2.0, "one": 1.0}


@pytest.mark.parametrize("loaders", [None, []])
def test_without_validation_loaders_nothing_is_evaluated(loaders):
    with pytest.warns(UserWarning, match="the global model is not evaluated"):
        assert not evaluator(loaders).is_due(0, 1)


def draw():
    return torch.rand(()).item() + np.random.rand() + random.random()


def generators():
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


class Draws(Net):
    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.log("drawn", draw())


class Same(pl.LightningDataModule):
    """The same examples for training and validation."""

    def __init__(self, examples):
        super().__init__()
        self.examples = examples

    def train_dataloader(self):
        return DataLoader(self.examples, batch_size=8, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.examples, batch_size=8)


def fit(folder, rounds, *, model=Draws, ckpt_path=None, **arguments):
    torch.manual_seed(0)
    parts = clients()
    data = FederatedDataModule({name: Same(part) for name, part in parts.items()}, evaluation=Same(parts["c0"]), seed=3)
    arguments = {"evaluation": Evaluation(clients=True), "seed": 3, "default_root_dir": folder, **arguments}
    loop = FederatedLoop(rounds, 4, console=False, **arguments)
    module = model()
    loop.fit(module, data, ckpt_path)
    return loop, module


def test_what_an_evaluation_draws_is_the_same_after_a_resume(tmp_path):
    whole, _ = fit(tmp_path / "whole", 3)
    fit(tmp_path / "cut", 2)
    for _ in range(5):
        draw()
    before = generators()
    cut, _ = fit(tmp_path / "cut", 3, ckpt_path="last")
    metrics = [record.metrics for record in whole.history]
    assert [record.metrics for record in cut.history] == metrics
    assert len({row["drawn"] for row in metrics}) == len(metrics)
    assert generators()[1:] == before[1:]  # fit seeds torch's


class Noisy:
    """Batches that come out of NumPy's generator."""

    def __iter__(self):
        return (torch.from_numpy(np.random.randn(4, 2).astype(np.float32)) for _ in range(3))


class Normalizes(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(2)
        self.error = None

    def validation_step(self, batch, batch_idx):
        self.norm(batch)
        if self.error is not None:
            raise self.error


def test_statistics_follow_from_the_seed_whatever_generator_the_data_draw_from():
    model = Normalizes()
    found = []
    for seed in (1, 1, 2):
        recalibrate(model, [Client("a", 12, Noisy)], {}, seed=seed)
        found.append(model.norm.running_mean.tolist())
        draw()
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("limits", [{"limit_val_batches": 2}, {"limit_val_batches": 0.5}, {"overfit_batches": 1}])
def test_statistics_are_of_all_training_batches_whatever_the_clients_limits(limits):
    model = Normalizes()
    recalibrate(model, [Client("a", 12, Noisy), Client("b", 12, Noisy)], limits)
    assert model.norm.num_batches_tracked == 6


def test_statistics_that_cannot_be_measured_leave_momentum_and_generators_as_they_were():
    model = Normalizes()
    model.error = RuntimeError("sprung")
    before = generators()
    with pytest.raises(RuntimeError, match="sprung"):
        recalibrate(model, [Client("a", 12, Noisy)], {}, seed=1)
    assert model.norm.momentum == 0.1
    assert generators() == before


def measured(folder, rounds, ckpt_path=None):
    """A run whose submodels have statistics of their own, and whose third round is skipped."""
    faulty = FaultyExecutor(LocalExecutor(), lambda index, client_id: Fault.DROPPED if index == 2 else None)
    return fit(
        folder,
        rounds,
        model=Net,
        ckpt_path=ckpt_path,
        callbacks=fiarse(0.5),
        buffers="recalibrate",
        evaluation=Evaluation(capacities=[0.25]),
        executor=faulty,
        faults=FaultPolicy(when_fewer="skip"),
    )


def submodel(loop):
    model = Net()
    loop.load_submodel(model, 0.25)
    return model


def test_the_submodel_that_is_handed_out_is_the_one_that_was_evaluated(tmp_path):
    loop, whole = measured(tmp_path, 2)
    model = submodel(loop)
    data = FederatedDataModule({"c0": Same(clients()["c0"])}, evaluation=Same(clients()["c0"]))
    assert loop.validate(model, data)["val_loss"] == loop.history[-1].metrics["val_loss@0.25"]
    assert not torch.equal(model.norm.running_mean, whole.norm.running_mean)
    assert model.training


def test_a_resumed_run_measures_submodels_over_the_same_clients_as_an_uninterrupted_one(tmp_path):
    whole, _ = measured(tmp_path / "whole", 3)
    assert [record.skipped for record in whole.history] == [False, False, False, True]
    measured(tmp_path / "cut", 2)
    cut, _ = measured(tmp_path / "cut", 3, "last")
    assert [record.metrics for record in cut.history] == [record.metrics for record in whole.history]
    # a run that is over already, too
    again, _ = measured(tmp_path / "whole", 3, "last")
    assert torch.equal(submodel(again).norm.running_mean, submodel(whole).norm.running_mean)
