"""Optical digits, which come with the package, and what all image data modules share."""

import numpy as np
import pytest
import torch
from torch.utils.data import RandomSampler

from lightning_fedsparse.data import FederatedDataModule
from lightning_fedsparse.datasets import OptdigitsDataModule
from lightning_fedsparse.partition import IidPartition


def test_optdigits():
    module = OptdigitsDataModule()
    module.prepare_data()
    module.setup("fit")
    train, test = module.train_dataloader(), module.test_dataloader()
    assert (len(train.dataset), len(test.dataset)) == (3823, 1797)
    assert isinstance(train.sampler, RandomSampler)
    assert not isinstance(test.sampler, RandomSampler)
    assert train.batch_size == 32
    assert np.bincount(train.dataset.targets).tolist() == [376, 389, 380, 389, 387, 376, 377, 387, 380, 382]
    images, targets = next(iter(test))
    assert images.shape == (32, 1, 8, 8)
    assert (images.min(), images.max()) == (0, 1)
    # the first test image is a zero: dark in the middle, light around
    assert targets[0] == 0
    assert (images[0, 0] * 16)[0].tolist() == [0, 0, 5, 13, 9, 1, 0, 0]
    assert module.val_dataloader() == []


def test_held_out_images_are_the_same_for_every_run():
    halves = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        module = OptdigitsDataModule(validation_fraction=0.1)
        module.setup("fit")
        halves.append((module.train_dataloader().dataset.indices, module.val_dataloader().dataset.indices))
    (train, val), again = halves
    assert (train, val) == again
    assert len(val) == 382
    assert sorted(train + val) == list(range(3823))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"validation_fraction": 1.0}, r"validation_fraction must be in \[0, 1\), got 1.0"),
        ({"validation_fraction": -0.1}, r"validation_fraction must be in \[0, 1\), got -0.1"),
    ],
)
def test_data_module_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        OptdigitsDataModule(**arguments)


def test_federated_optdigits_with_held_out_images():
    data = FederatedDataModule(OptdigitsDataModule(validation_fraction=0.1), IidPartition(10), validation_fraction=0.2)
    clients = [data.client(client_id) for client_id in data.client_ids]
    assert sum(client.num_examples + len(client.val_loader().dataset) for client in clients) == 3823 - 382
    images, targets = next(iter(clients[0].train_loader()))
    assert images.shape == (32, 1, 8, 8)
    assert len(set(targets.tolist())) > 5
    assert len(data.val_dataloader().dataset) == 382
    assert len(data.test_dataloader().dataset) == 1797
