"""What data sets are split by: class labels and natural keys."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_fedsparse.data import FederatedDataModule
from lightning_fedsparse.loaders import class_labels, client_keys
from lightning_fedsparse.partition import IidPartition, NaturalPartition
from tests.number_data import Numbers, NumbersModule, numbers


@pytest.mark.parametrize(
    "targets", [[2, 0, 1], torch.tensor([2, 0, 1]), np.array([2, 0, 1])], ids=lambda t: type(t).__name__
)
def test_labels_are_the_targets(targets):
    dataset = Numbers(3, targets=targets)
    assert class_labels(dataset).tolist() == [2, 0, 1]
    assert class_labels(Subset(dataset, [2, 1])).tolist() == [1, 0]
    assert class_labels(Subset(Subset(dataset, [2, 1]), [1])).tolist() == [0]


def test_labels_are_the_last_integer_tensor():
    assert class_labels(TensorDataset(torch.zeros(2, 3), torch.tensor([4, 5]))).tolist() == [4, 5]
    assert class_labels(TensorDataset(torch.zeros(2, 3), torch.zeros(2))) is None
    assert class_labels(TensorDataset(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64))) is None
    assert class_labels(Numbers(3)) is None
    assert class_labels(Subset(Numbers(3), [1])) is None


def test_natural_keys_are_looked_up_through_subsets():
    dataset = Numbers(4, client_keys=["b", "a", "b", "a"])
    assert client_keys(Subset(dataset, [1, 2])).tolist() == ["a", "b"]
    module = NumbersModule(lambda: DataLoader(Subset(dataset, [3, 2, 0])))
    data = FederatedDataModule(module, NaturalPartition())
    assert data.client_ids == ["a", "b"]
    assert numbers(data.client("b").train_loader()) == [0, 2]


def test_label_fn_gives_labels():
    module = NumbersModule(lambda: DataLoader(Numbers(8)))
    data = FederatedDataModule(module, IidPartition(2), label_fn=lambda dataset: [0, 1] * 4)
    for client_id in data.client_ids:
        assert [number % 2 for number in numbers(data.client(client_id).train_loader())].count(0) == 2
