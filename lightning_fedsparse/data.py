"""The clients' data: any ``LightningDataModule`` split into clients, or a mapping of clients that have their own.

The user's data module stays as it is: its ``prepare_data``, ``setup("fit")`` and ``train_dataloader`` are called once,
and each client gets loaders with the same settings over its part. Global evaluation uses its own validation and test
loaders. Nothing is built before it is asked for, so a hundred thousand clients cost one index array.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.types import EVAL_DATALOADERS
from torch.utils.data import DataLoader, Dataset

from lightning_fedsparse.capacities import Capacities
from lightning_fedsparse.checks import require_a, require_lightning
from lightning_fedsparse.clients import Client
from lightning_fedsparse.loaders import LoaderSettings, class_labels, client_keys
from lightning_fedsparse.partition import Indices, Partition
from lightning_fedsparse.parts import Parts
from lightning_fedsparse.schedules import Progress

__all__ = ["Client", "FederatedDataModule"]

_BATCH_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


class FederatedDataModule(LightningDataModule):
    """Clients and global evaluation data of a federation.

    Args:
        data: A data module whose training data are split by ``partition``; or client id -> the client's own loader
            or data module, used as they are (in Python only: a recipe gives a data module).
        partition: How to split a data module; None for a mapping.
        validation_fraction: Share of each client's examples kept from training for its validation loader, in [0, 1).
            Those are read from the same data set, with its augmentation if it has any. 0 for a mapping, whose data
            modules bring their own.
        label_fn: Gives the class of each example of the training data set, where it has no ``targets``.
        evaluation: Data module whose validation and test loaders are for the global model; ``data`` if that is a data
            module.
        capacities: Gives each client the share of the model that it can hold, for methods whose clients differ in size.
        seed: Seed of the partition, of the clients' validation parts and of capacities that are drawn.

    Raises:
        TypeError: If ``data`` is neither, or comes from the ``pytorch_lightning`` package.
        ValueError: If the arguments do not go together, or a data module changes batches in a hook that a client's
            training would not call.
    """

    def __init__(
        self,
        data: LightningDataModule | Mapping[str, DataLoader[Any] | LightningDataModule],
        partition: Partition | None = None,
        *,
        validation_fraction: float = 0.0,
        label_fn: Callable[[Dataset[Any]], Sequence[int]] | None = None,
        evaluation: LightningDataModule | None = None,
        capacities: Capacities | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= validation_fraction < 1:
            raise ValueError(f"validation_fraction must be in [0, 1), got {validation_fraction}")
        self._whole: _Module | None = None
        self._own: dict[str, DataLoader[Any] | _Module] = {}
        if isinstance(data, Mapping):
            if not data:
                raise ValueError("a federation needs at least one client, got an empty mapping")
            if partition is not None or validation_fraction or label_fn is not None:
                raise ValueError(
                    "partition, validation_fraction and label_fn split a data module, got them with a mapping of clients"
                )
            for client_id, own in data.items():
                self._own[client_id] = (
                    own if isinstance(own, DataLoader) else _Module(own, f"the data of client {client_id!r}")
                )
        else:
            self._whole = _Module(data, "data")
            if partition is None:
                raise ValueError(f"a partition is needed to split {type(data).__name__} into clients, got None")
        self._evaluation = self._whole if evaluation is None else _Module(evaluation, "evaluation", trains=False)
        self._partition = partition
        self._validation_fraction = validation_fraction
        self._label_fn = label_fn
        self._seed = seed
        if capacities is not None:
            require_a(Capacities, capacities, "capacities", "CapacityMapping({...}) or CapacityList([...])")
        self._capacities = capacities
        self._capacity_of: dict[str, float] = {}
        self._settings: LoaderSettings | None = None
        self._parts = Parts({})
        self._ids: list[str] = []
        self._own_clients: dict[str, Client] = {}

    @property
    def client_ids(self) -> list[str]:
        """All clients, in a fixed order."""
        self.setup("fit")
        return self._ids

    def client(self, client_id: str) -> Client:
        """Return one client.

        Raises:
            KeyError: If there is no such client.
            ValueError: If a client of a mapping has no examples, or a data set without a length.
            TypeError: If a client of a mapping has not exactly one loader.
        """
        self.setup("fit")
        client = self._client(client_id)
        return replace(client, capacity=self._capacity_of[client_id]) if self._capacity_of else client

    def _client(self, client_id: str) -> Client:
        """One client without its capacity."""
        if self._own:
            if client_id not in self._own_clients:
                self._own_clients[client_id] = _client_of_its_own(client_id, self._own[client_id])
            return self._own_clients[client_id]
        assert self._settings is not None
        train, val = self._split(client_id)
        loader = self._settings.loader
        return Client(
            client_id,
            train.size,
            partial(loader, train, train=True),
            partial(loader, val, train=False) if val.size else None,
        )

    @property
    def capacities(self) -> dict[str, float]:
        """Every client's capacity by its id; empty where clients have none."""
        self.setup("fit")
        return dict(self._capacity_of)

    def start_round(self, progress: Progress) -> None:
        """Hear which round comes, on the server and wherever clients are trained: for data that change over a run."""

    def num_examples(self, client_id: str) -> int:
        """Training examples of one client."""
        return self.client(client_id).num_examples

    def prepare_data(self) -> None:
        """Call ``prepare_data`` of the wrapped data module and of ``evaluation``, once."""
        for module in (self._whole, self._evaluation):
            if module is not None:
                module.prepare()

    def setup(self, stage: str) -> None:
        """Build the clients (stage "fit"), or set up the evaluation data (other stages); once each."""
        if stage == "fit":
            if not self._ids:
                if self._whole is not None:
                    self._build(self._whole.ready("fit"))
                ids = list(self._own or self._parts)
                if self._capacities is not None:
                    self._capacity_of = self._capacities.assign(_Clients(ids, self._client), seed=self._seed)
                self._ids = ids
        elif self._evaluation is not None:
            # a Trainer sets validation data up with "fit"; a second set-up of a random split would be another split
            self._evaluation.ready("fit" if stage == "validate" else stage)

    def val_dataloader(self) -> EVAL_DATALOADERS:
        """Validation loaders for the global model; an empty list if there are none."""
        return [] if self._evaluation is None else self._evaluation.loaders("fit", "val_dataloader")

    def test_dataloader(self) -> EVAL_DATALOADERS:
        """Test loaders for the global model; an empty list if there are none."""
        return [] if self._evaluation is None else self._evaluation.loaders("test", "test_dataloader")

    def _build(self, module: LightningDataModule) -> None:
        """Split the training data of a data module."""
        assert self._partition is not None
        settings = LoaderSettings.of(module.train_dataloader())
        dataset = settings.dataset
        num_examples = len(dataset)  # type: ignore[arg-type]
        if self._partition.by == "client_keys":
            labels = client_keys(dataset)
        elif self._label_fn is not None:
            labels = np.asarray(self._label_fn(dataset))
        else:
            labels = class_labels(dataset)
        if labels is not None and len(labels) != num_examples:
            raise ValueError(f"{type(dataset).__name__} has {num_examples} examples but {len(labels)} labels or keys")
        try:
            parts = Parts(self._partition.split(labels, num_examples, self._seed))
        except ValueError as error:
            if labels is not None:
                raise
            hint = "an attribute client_keys" if self._partition.by == "client_keys" else "targets, or pass label_fn"
            raise ValueError(f"{error}: give {type(dataset).__name__} {hint}") from None
        self._check_sizes(parts, settings)
        self._settings, self._parts = settings, parts

    def _check_sizes(self, parts: Parts, settings: LoaderSettings) -> None:
        batch_size = settings.arguments["batch_size"]
        for client_id, size in parts.sizes.items():
            if not size:
                raise ValueError(f"client {client_id!r} has no examples")
            train = size - self._num_validation(size)
            if train < 1:
                raise ValueError(
                    f"validation_fraction {self._validation_fraction} leaves client {client_id!r} "
                    f"no training example out of {size}"
                )
            if settings.arguments["drop_last"] and train < batch_size:
                raise ValueError(
                    f"client {client_id!r} has {train} training examples, which drop_last=True with batch size "
                    f"{batch_size} drops"
                )

    def _num_validation(self, size: int) -> int:
        return round(self._validation_fraction * size)

    def _split(self, client_id: str) -> tuple[Indices, Indices]:
        """Training and validation indices of a client; ascending."""
        part = self._parts[client_id]
        held = self._num_validation(part.size)
        if not held:
            return part, part[:0]
        # seeded by the id: the same whichever clients were asked for before
        order = np.random.default_rng([self._seed, *client_id.encode()]).permutation(part)
        return np.sort(order[held:]), np.sort(order[:held])


class _Clients(Mapping[str, Client]):
    """Clients by id, each built when it is looked up."""

    def __init__(self, ids: Sequence[str], build: Callable[[str], Client]) -> None:
        self._ids = ids
        self._build = build

    def __getitem__(self, client_id: str) -> Client:
        return self._build(client_id)

    def __iter__(self) -> Iterator[str]:
        return iter(self._ids)

    def __len__(self) -> int:
        return len(self._ids)


class _Module:
    """A user's data module, prepared once and set up once per stage."""

    def __init__(self, module: LightningDataModule, where: str, *, trains: bool = True) -> None:
        _check_data_module(module, where, trains=trains)
        self._module = module
        self._prepared = False
        self._stages: set[str] = set()

    def prepare(self) -> None:
        if not self._prepared:
            self._module.prepare_data()
            self._prepared = True

    def ready(self, stage: str) -> LightningDataModule:
        self.prepare()
        if stage not in self._stages:
            self._module.setup(stage)
            self._stages.add(stage)
        return self._module

    def loaders(self, stage: str, hook: str) -> EVAL_DATALOADERS:
        """What the module's own hook returns; an empty list if it has none."""
        return getattr(self.ready(stage), hook)() if is_overridden(hook, self._module) else []


def _client_of_its_own(client_id: str, own: DataLoader[Any] | _Module) -> Client:
    if isinstance(own, DataLoader):
        train, val = _one_loader(client_id, own), None
    else:
        train = _one_loader(client_id, own.ready("fit").train_dataloader())
        loaders = own.loaders("fit", "val_dataloader")
        if isinstance(loaders, Sequence) and len(loaders) < 2:
            loaders = loaders[0] if loaders else None
        val = None if loaders is None else _one_loader(client_id, loaders)
    try:
        num_examples = len(train.dataset)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(f"the data set of client {client_id!r} must have a length") from None
    if not num_examples:
        raise ValueError(f"client {client_id!r} has no examples")
    return Client(client_id, num_examples, partial(_same, train), None if val is None else partial(_same, val))


def _one_loader(client_id: str, loader: object) -> DataLoader[Any]:
    if not isinstance(loader, DataLoader):
        raise TypeError(f"client {client_id!r} must have one DataLoader, got {type(loader).__name__}")
    return loader


def _same(loader: DataLoader[Any]) -> DataLoader[Any]:
    return loader


def _check_data_module(module: LightningDataModule, where: str, *, trains: bool) -> None:
    require_lightning(module, LightningDataModule, where)
    if trains and not is_overridden("train_dataloader", module):
        raise ValueError(f"{where} must have a train_dataloader, and {type(module).__name__} has none")
    for hook in _BATCH_HOOKS:
        if is_overridden(hook, module):
            raise ValueError(
                f"{type(module).__name__}.{hook} would not be called in a client's training: move it to the LightningModule"
            )
