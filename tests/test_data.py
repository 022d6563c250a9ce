"""Clients: the parts of a data module that is split, or data of their own; and the data of the global evaluation."""

import pickle
from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler

from lightning_fedsparse.data import Client, FederatedDataModule
from lightning_fedsparse.partition import IidPartition
from tests.number_data import EvaluatedModule, Numbers, NumbersModule, numbers


def double(batch):
    return torch.tensor(batch) * 2


def worker_init(worker):
    pass


# clients of a split data module


def test_clients_share_out_the_training_data():
    module = NumbersModule()
    data = FederatedDataModule(module, IidPartition(3))
    assert data.client_ids == ["0", "1", "2"]
    assert [data.num_examples(client_id) for client_id in data.client_ids] == [4, 4, 4]
    held = [numbers(data.client(client_id).train_loader()) for client_id in data.client_ids]
    assert sorted(number for part in held for number in part) == list(range(12))
    for part in held:  # stratified: targets are 0, 1, 2, 0, 1, 2, ...
        assert np.bincount([number % 3 for number in part]).max() == 2
    assert data.client("0").val_loader() is None


def test_the_data_module_is_called_once():
    module = NumbersModule()
    data = FederatedDataModule(module, IidPartition(3))
    assert module.calls == []
    for _ in range(2):
        data.prepare_data()
        data.setup("fit")
        data.client("1").train_loader()
        assert data.client_ids
    assert module.calls == ["prepare", "fit", "train_dataloader"]


def test_loaders_have_the_users_settings():
    loader = DataLoader(
        Numbers(),
        batch_size=2,
        shuffle=True,
        num_workers=1,
        collate_fn=double,
        drop_last=True,
        timeout=3,
        worker_init_fn=worker_init,
        multiprocessing_context="fork",
        prefetch_factor=3,
        persistent_workers=True,
        generator=torch.Generator(),
    )
    mine = FederatedDataModule(NumbersModule(lambda: loader), IidPartition(2)).client("0").train_loader()
    for name in ("batch_size", "num_workers", "collate_fn", "drop_last", "timeout", "worker_init_fn"):
        assert getattr(mine, name) == getattr(loader, name), name
    for name in ("multiprocessing_context", "prefetch_factor", "persistent_workers", "pin_memory"):
        assert getattr(mine, name) == getattr(loader, name), name
    assert isinstance(mine.sampler, RandomSampler)
    assert mine.generator is None


def test_loaders_draw_from_the_global_generator():
    client = FederatedDataModule(NumbersModule(), IidPartition(1)).client("0")
    orders = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        orders.append([batch.tolist() for batch in client.train_loader()])
    assert orders[0] == orders[1] != orders[2]


def test_unshuffled_stays_unshuffled_and_collate_is_used():
    module = NumbersModule(lambda: DataLoader(Numbers(4), batch_size=3, collate_fn=double))
    loader = FederatedDataModule(module, IidPartition(1)).client("0").train_loader()
    assert [batch.tolist() for batch in loader] == [[0, 2, 4], [6]]


def test_validation_part():
    data = FederatedDataModule(NumbersModule(), IidPartition(2), validation_fraction=0.34, seed=5)
    whole = FederatedDataModule(NumbersModule(), IidPartition(2), seed=5)
    for client_id in reversed(data.client_ids):
        client = data.client(client_id)
        train, val = client.train_loader(), client.val_loader()
        assert client.num_examples == len(train.dataset) == 4
        assert isinstance(val.sampler, SequentialSampler)
        assert val.batch_size == 2
        assert len(numbers(val)) == 2
        assert sorted(numbers(train) + numbers(val)) == numbers(whole.client(client_id).train_loader())
    again = FederatedDataModule(NumbersModule(), IidPartition(2), validation_fraction=0.34, seed=5)
    assert numbers(again.client("0").val_loader()) == numbers(data.client("0").val_loader())


def test_validation_reads_all_batches_where_training_drops_the_last():
    module = NumbersModule(partial(DataLoader, Numbers(), batch_size=4, drop_last=True))
    client = FederatedDataModule(module, IidPartition(1), validation_fraction=0.5).client("0")
    assert len(numbers(client.train_loader())) == 4
    assert len(numbers(client.val_loader())) == 6


def test_a_hundred_thousand_clients_are_cheap():
    module = NumbersModule(lambda: DataLoader(Numbers(200_000)))
    data = FederatedDataModule(module, IidPartition(100_000))
    assert len(data.client_ids) == 100_000
    bases = {id(part.base) for part in data._parts.values()}
    assert len(bases) == 1
    assert len(numbers(data.client("99999").train_loader())) == 2


def test_pickles_with_its_clients():
    data = FederatedDataModule(NumbersModule(), IidPartition(3), validation_fraction=0.25)
    data.setup("fit")
    copy = pickle.loads(pickle.dumps(data))
    assert numbers(copy.client("1").train_loader()) == numbers(data.client("1").train_loader())
    client = pickle.loads(pickle.dumps(data.client("1")))
    assert numbers(client.val_loader()) == numbers(data.client("1").val_loader())


# clients that have their own data


def test_mapping_of_loaders_is_used_as_it_is():
    loaders = {"a": DataLoader(Numbers(3)), "b": DataLoader(Numbers(5))}
    data = FederatedDataModule(loaders)
    assert data.client_ids == ["a", "b"]
    assert data.num_examples("b") == 5
    assert data.client("a").train_loader() is loaders["a"]
    assert data.client("a").val_loader() is None
    assert data.val_dataloader() == data.test_dataloader() == []


def test_mapping_of_data_modules_is_set_up_when_asked_for():
    modules = {"a": EvaluatedModule(), "b": NumbersModule()}
    data = FederatedDataModule(modules)
    assert data.client_ids == ["a", "b"]
    assert modules["a"].calls == []
    assert data.num_examples("a") == 12
    assert len(data.client("a").val_loader()) == 5
    assert modules["a"].calls == ["prepare", "fit", "train_dataloader"]
    assert data.client("b").val_loader() is None


def test_a_client_can_be_made_by_hand():
    client = Client("x", 3, partial(DataLoader, Numbers(3)))
    assert numbers(client.train_loader()) == [0, 1, 2]
    assert client.val_loader() is None


# global evaluation


def test_evaluation_loaders_are_the_users():
    module = EvaluatedModule()
    data = FederatedDataModule(module, IidPartition(2))
    assert len(data.val_dataloader()) == 5
    assert len(data.test_dataloader()) == 7
    data.setup("validate")
    data.setup("test")
    # validation data are those of "fit": another set-up might draw another split
    assert module.calls == ["prepare", "fit", "test"]


def test_no_evaluation_loaders():
    data = FederatedDataModule(NumbersModule(), IidPartition(2))
    assert data.val_dataloader() == []
    assert data.test_dataloader() == []


@pytest.mark.parametrize("clients", [{"a": DataLoader(Numbers(3))}, NumbersModule()], ids=["mapping", "module"])
def test_evaluation_can_be_another_data_module(clients):
    partition = None if isinstance(clients, dict) else IidPartition(2)
    evaluation = EvaluatedModule()
    data = FederatedDataModule(clients, partition, evaluation=evaluation)
    data.prepare_data()
    assert len(data.val_dataloader()) == 5
    assert len(data.test_dataloader()) == 7
    assert evaluation.calls == ["prepare", "fit", "test"]


def test_a_trainer_validates_with_it():
    class Vectors(NumbersModule):
        def val_dataloader(self):
            return DataLoader(torch.ones(4, 32))

    module = Vectors()
    data = FederatedDataModule(module, IidPartition(2))
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    for _ in range(2):
        trainer.validate(BoringModel(), datamodule=data, verbose=False)
    assert module.calls == ["prepare", "fit"]
