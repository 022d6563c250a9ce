"""What is measured between rounds: on whose data, with which generators, and what a limit or a NaN does to it."""

import math

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_fedsparse import FederatedDataModule
from lightning_fedsparse.capacities import CapacityMapping
from lightning_fedsparse.evaluation import evaluate_clients

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
