"""Data that change in the middle of a run: which split holds when, and that the loop tells the data."""

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedsparse import FederatedDataModule, FederatedLoop
from lightning_fedsparse.callbacks import DynamicPruning, ErrorFeedback
from lightning_fedsparse.capacities import CapacityList
from lightning_fedsparse.datasets import OptdigitsDataModule
from lightning_fedsparse.drift import DriftingDataModule
from lightning_fedsparse.evaluation import Evaluation
from lightning_fedsparse.models import DigitsCNN, ImageClassifier
from lightning_fedsparse.partition import IidPartition
from lightning_fedsparse.schedules import ConstantSchedule, DipSchedule, Progress


class Constant(LightningDataModule):
    """Eight inputs of one value."""

    def __init__(self, value):
        super().__init__()
        self.value = value
        self.prepared = 0

    def prepare_data(self):
        self.prepared += 1

    def train_dataloader(self):
        inputs = torch.full((8, 1), float(self.value))
        return DataLoader(TensorDataset(inputs, torch.zeros(8, dtype=torch.int64)), batch_size=4)

    def test_dataloader(self):
        return self.train_dataloader()


def split(value, clients=2):
    return FederatedDataModule(Constant(value), IidPartition(clients))


def seen(data, client_id="0"):
    return next(iter(data.client(client_id).train_loader()))[0].unique().tolist()


@pytest.mark.parametrize(
    ("start", "values"), [(0.5, [1, 1, 2, 2]), (0.4, [1, 1, 2, 2]), (0.75, [1, 1, 1, 2]), (0.01, [1, 2, 2, 2])]
)
def test_the_data_change_once_so_much_of_the_run_is_done(start, values):
    data = DriftingDataModule(split(1), split(2), start=start)
    assert seen(data) == [1]
    for step, value in enumerate(values):
        data.start_round(Progress(step, 4))
        assert seen(data) == [value]
    data.start_round(Progress(0, 4))
    assert seen(data) == [1]


def test_both_are_prepared_and_evaluated():
    data = DriftingDataModule(split(1), split(2))
    data.prepare_data()
    data.setup("test")
    assert [next(iter(loader))[0][0].item() for loader in data.test_dataloader()] == [1, 2]
    assert data.val_dataloader() == []
    assert (data.client_ids, data.num_examples("0")) == (["0", "1"], 4)


def test_the_clients_must_be_the_same():
    data = DriftingDataModule(split(1), split(2, clients=4))
    with pytest.raises(ValueError, match="^expected the same clients before and after, got 2 and 4, which differ$"):
        data.client_ids  # noqa: B018


def test_capacities_hold_for_the_whole_run():
    def unequal(*levels):
        return FederatedDataModule(Constant(1), IidPartition(2), capacities=CapacityList(list(levels)))

    data = DriftingDataModule(unequal(1.0, 0.5), unequal(1.0, 0.5))
    assert data.client_ids == ["0", "1"]
    assert data.capacities == {"0": 1.0, "1": 0.5}
    with pytest.raises(ValueError, match="expected the same capacities before and after"):
        _ = DriftingDataModule(unequal(1.0, 0.5), unequal(0.5, 0.25)).client_ids


@pytest.mark.parametrize("start", [0.0, 1.0, -0.5])
def test_start_lies_inside_the_run(start):
    with pytest.raises(ValueError, match=r"^expected start in \(0, 1\), a share of the rounds, got "):
        DriftingDataModule(split(1), split(2), start=start)


class Recorder(ImageClassifier):
    """Keeps the first pixel row sums of what it trains on."""

    def training_step(self, batch):
        self.seen.append(batch[0].mean((0, 1)))
        return super().training_step(batch)


def test_a_federation_trains_on_what_holds_and_tests_on_both():
    before, after = (
        FederatedDataModule(OptdigitsDataModule(batch_size=256, quarter_turns=turns), IidPartition(4))
        for turns in (0, 1)
    )
    model = Recorder(DigitsCNN())
    model.seen = []
    loop = FederatedLoop(4, 1, evaluation=Evaluation("test"), console=False)
    history = loop.fit(model, DriftingDataModule(before, after, start=0.5))
    assert set(history[0].metrics) == {
        f"test_{name}/dataloader_idx_{index}" for name in ("loss", "accuracy") for index in (0, 1)
    }
    # upright digits leave the left and right columns dark, turned ones the top and bottom rows
    turned = [bool(image[:, [0, -1]].mean() > image[[0, -1]].mean()) for image in model.seen]
    assert turned == [False] * 8 + [True] * 8


def test_turned_digits_are_the_same_digits():
    upright, turned = OptdigitsDataModule(), OptdigitsDataModule(quarter_turns=1)
    for module in (upright, turned):
        module.setup("test")
    (first, labels), (second, others) = (next(iter(module.test_dataloader())) for module in (upright, turned))
    assert np.array_equal(np.rot90(first.numpy(), axes=(2, 3)), second.numpy())
    assert torch.equal(labels, others)


def test_digits_of_some_classes():
    some, everything = OptdigitsDataModule(classes=[3, 8]), OptdigitsDataModule()
    for module in (some, everything):
        module.setup("test")
    found, labels = (torch.cat(parts) for parts in zip(*some.test_dataloader(), strict=True))
    images, digits = (torch.cat(parts) for parts in zip(*everything.test_dataloader(), strict=True))
    wanted = (digits == 3) | (digits == 8)
    assert torch.equal(labels, digits[wanted])
    assert torch.equal(found, images[wanted])


def test_a_class_that_is_no_digit_is_refused():
    with pytest.raises(ValueError, match=r"expected classes from 0 to 9, got \[1, 10\]"):
        OptdigitsDataModule(classes=[1, 10])


def test_a_dip_makes_the_model_denser_for_some_rounds():
    schedule = DipSchedule(ConstantSchedule(0.9), start=0.5, end=0.75, value=0.6)
    data = FederatedDataModule(OptdigitsDataModule(batch_size=256), IidPartition(4))
    loop = FederatedLoop(
        8, 1, [DynamicPruning(schedule, every=1), ErrorFeedback()], evaluation=Evaluation("none"), console=False
    )
    history = loop.fit(ImageClassifier(DigitsCNN()), data)
    # the record of a round has the masks of the next one
    assert [round(record.sparsity, 3) for record in history] == [0.9, 0.9, 0.9, 0.9, 0.6, 0.6, 0.9, 0.9, 0.9]
