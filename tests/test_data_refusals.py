"""Data that can't be shared out to clients, each with its reason."""

import numpy as np
import pytest
import pytorch_lightning
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    WeightedRandomSampler,
)

from lightning_fedsparse.data import FederatedDataModule
from lightning_fedsparse.loaders import LoaderSettings
from lightning_fedsparse.partition import DirichletPartition, IidPartition, NaturalPartition
from tests.number_data import Numbers, NumbersModule


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(3))


def test_foreign_data_module():
    with pytest.raises(
        TypeError, match=r"expected data built on .*, got LightningDataModule built on pytorch_lightning"
    ):
        FederatedDataModule(pytorch_lightning.LightningDataModule(), IidPartition(2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 2], IidPartition(2)), "expected data to be a lightning.pytorch LightningDataModule, got list"),
        (({"a": [1]},), "expected the data of client 'a' to be a lightning.pytorch LightningDataModule, got list"),
    ],
)
def test_wrong_type(arguments, message):
    with pytest.raises(TypeError, match=message):
        FederatedDataModule(*arguments)


class Transferring(NumbersModule):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch


SOME = {"a": DataLoader(Numbers(3))}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FederatedDataModule({}), "at least one client, got an empty mapping"),
        (lambda: FederatedDataModule(SOME, IidPartition(1)), "split a data module, got them with a mapping"),
        (lambda: FederatedDataModule(SOME, validation_fraction=0.1), "split a data module, got them with a mapping"),
        (lambda: FederatedDataModule(SOME, label_fn=len), "split a data module, got them with a mapping"),
        (lambda: FederatedDataModule(NumbersModule()), "a partition is needed to split NumbersModule into clients"),
        (
            lambda: FederatedDataModule(NumbersModule(), IidPartition(2), validation_fraction=1.0),
            r"validation_fraction must be in \[0, 1\), got 1.0",
        ),
        (
            lambda: FederatedDataModule(Transferring(), IidPartition(2)),
            "Transferring.on_after_batch_transfer would not be called in a client's training",
        ),
        (
            lambda: FederatedDataModule(SOME, evaluation=Transferring()),
            "Transferring.on_after_batch_transfer would not be called",
        ),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def setup(train, partition=None, **arguments):
    module = NumbersModule(lambda: train)
    FederatedDataModule(module, IidPartition(2) if partition is None else partition, **arguments).setup("fit")


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (lambda: setup(DataLoader(Numbers(1))), r"num_clients must be in 1\.\.1, the number of examples, got 2"),
        (
            lambda: setup(DataLoader(Numbers(4)), DirichletPartition(2, alpha=1.0)),
            "DirichletPartition needs integer class labels, and the data set has none: give Numbers targets, or pass label_fn",
        ),
        (
            lambda: setup(DataLoader(Numbers(4)), NaturalPartition()),
            "NaturalPartition needs client_keys, and the data set has none: give Numbers an attribute client_keys",
        ),
        (
            lambda: setup(DataLoader(Numbers(4, targets=[0, 1]))),
            "Numbers has 4 examples but 2 labels or keys",
        ),
        (
            lambda: setup(DataLoader(Numbers(4)), label_fn=lambda dataset: [0.5] * 4),
            "labels must be a row of integers",
        ),
        (
            lambda: setup(DataLoader(Numbers(4)), validation_fraction=0.8),
            "validation_fraction 0.8 leaves client '0' no training example out of 2",
        ),
        (
            lambda: setup(DataLoader(Numbers(4), batch_size=3, drop_last=True)),
            "client '0' has 2 training examples, which drop_last=True with batch size 3 drops",
        ),
        (
            lambda: setup(DataLoader(Numbers(4), batch_sampler=BatchSampler(SequentialSampler(range(4)), 2, False))),
            "own batch_sampler or without a batch size",
        ),
        (lambda: setup(DataLoader(Numbers(4), batch_size=None)), "own batch_sampler or without a batch size"),
        (
            lambda: setup(DataLoader(Numbers(4), sampler=WeightedRandomSampler([1.0] * 4, 4))),
            "cannot split a DataLoader with WeightedRandomSampler as sampler",
        ),
        (
            lambda: setup(DataLoader(Numbers(4), sampler=RandomSampler(range(4), replacement=True))),
            "cannot split a DataLoader with RandomSampler as sampler",
        ),
        (
            lambda: setup(DataLoader(Numbers(4), sampler=RandomSampler(range(4), num_samples=2))),
            "cannot split a DataLoader with RandomSampler as sampler",
        ),
    ],
)
def test_what_cannot_be_split(split, message):
    with pytest.raises(ValueError, match=message):
        split()


class OwnIteration(DataLoader):
    def __iter__(self):
        return iter(())


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (DataLoader(Stream()), "cannot split the iterable data set Stream: use a map-style one"),
        ([DataLoader(Numbers(4))], "must return one DataLoader to split, got list"),
        ({"x": DataLoader(Numbers(4))}, "must return one DataLoader to split, got dict"),
        (OwnIteration(Numbers(4)), "cannot split OwnIteration: it iterates in its own way"),
    ],
)
def test_what_is_no_loader_to_split(loader, message):
    with pytest.raises(TypeError, match=message):
        LoaderSettings.of(loader)


class EmptyPart(IidPartition):
    def split(self, labels, num_examples, seed):
        return {"full": np.arange(num_examples), "idle": np.arange(0)}


class TwoLoaders(NumbersModule):
    def val_dataloader(self):
        return [DataLoader(Numbers(2)), DataLoader(Numbers(3))]


def test_client_without_examples():
    with pytest.raises(ValueError, match="client 'idle' has no examples"):
        setup(DataLoader(Numbers(4)), EmptyPart(2))
    with pytest.raises(ValueError, match="client 'idle' has no examples"):
        FederatedDataModule({"idle": DataLoader(Numbers(0))}).client("idle")


def test_client_of_its_own_with_unusable_loaders():
    with pytest.raises(ValueError, match="the data set of client 'a' must have a length"):
        FederatedDataModule({"a": DataLoader(Stream())}).num_examples("a")
    with pytest.raises(TypeError, match="client 'a' must have one DataLoader, got list"):
        FederatedDataModule({"a": NumbersModule(lambda: [1])}).client("a")
    with pytest.raises(TypeError, match="client 'a' must have one DataLoader, got list"):
        FederatedDataModule({"a": TwoLoaders()}).client("a")


def test_unknown_client():
    with pytest.raises(KeyError, match="nobody"):
        FederatedDataModule(NumbersModule(), IidPartition(2)).client("nobody")
    with pytest.raises(KeyError, match="nobody"):
        FederatedDataModule(SOME).client("nobody")
