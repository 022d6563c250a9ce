import pickle
from functools import partial

import numpy as np
import pytest
import pytorch_lightning
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_fedsparse.data import Client, FederatedDataModule
from lightning_fedsparse.loaders import LoaderSettings, class_labels, client_keys
from lightning_fedsparse.partition import DirichletPartition, IidPartition, NaturalPartition


class Numbers(Dataset):
    """Example ``i`` is the number ``i``."""

    def __init__(self, size=12, **attributes):
        self.size = size
        self.__dict__.update(attributes)

    def __getitem__(self, index):
        return index

    def __len__(self):
        return self.size


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(3))


TWELVE_NUMBERS = partial(DataLoader, Numbers(targets=[0, 1, 2] * 4), batch_size=2, shuffle=True)


class NumbersModule(LightningDataModule):
    """A data module that notes its calls; ``train`` makes its training loader."""

    def __init__(self, train=TWELVE_NUMBERS):
        super().__init__()
        self.train = train
        self.calls = []

    def prepare_data(self):
        self.calls.append("prepare")

    def setup(self, stage):
        self.calls.append(stage)

    def train_dataloader(self):
        self.calls.append("train_dataloader")
        return self.train()


class EvaluatedModule(NumbersModule):
    def val_dataloader(self):
        return DataLoader(Numbers(5))

    def test_dataloader(self):
        return DataLoader(Numbers(7))


class BoringData(LightningDataModule):
    """Constructed from a recipe."""

    def __init__(self, size: int = 12, batch_size: int = 4) -> None:
        super().__init__()
        self.size, self.batch_size = size, batch_size

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.zeros(self.size, 1), torch.arange(self.size) % 3), self.batch_size)


def numbers(loader):
    return sorted(int(number) for batch in loader for number in batch)


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


# labels and keys


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


# from a recipe

RECIPE = """
data:
  class_path: lightning_fedsparse.data.FederatedDataModule
  init_args:
    data:
      class_path: {module}
      init_args: {{size: 30}}
    partition:
      class_path: lightning_fedsparse.partition.DirichletPartition
      init_args: {{num_clients: 3, alpha: 0.5}}
    validation_fraction: 0.2
"""


def parser():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data", required=True)
    return parser


def instantiate(recipe):
    config = parser().parse_string(recipe)
    return getattr(parser(), "instantiate", parser().instantiate_classes)(config).data


def test_constructed_from_yaml():
    data = instantiate(RECIPE.format(module=f"{__name__}.BoringData"))
    assert isinstance(data, FederatedDataModule)
    assert data.client_ids == ["0", "1", "2"]
    sizes = [
        len(loader.dataset)
        for c in data.client_ids
        for loader in (data.client(c).train_loader(), data.client(c).val_loader())
        if loader
    ]
    assert sum(sizes) == 30


def test_yaml_names_a_mistyped_key():
    with pytest.raises(Exception, match="Option 'size' is not accepted"):
        instantiate(RECIPE.format(module=f"{__name__}.NumbersModule"))


def test_yaml_mapping_of_clients_is_refused():
    recipe = """
    data:
      class_path: lightning_fedsparse.data.FederatedDataModule
      init_args: {data: {a: {class_path: BoringData}}}
    """
    with pytest.raises(ValueError, match="data must have a train_dataloader, and LightningDataModule has none"):
        instantiate(recipe)


# errors


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
