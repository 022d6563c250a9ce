"""The workloads of the speed page: networks, images, clients, and the batches that each client trains on in each round."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
import torch
from speed_apart import BATCH, CLIENTS, COHORT, RATE, SimpleCNN
from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_fedsparse import FederatedDataModule
from lightning_fedsparse.datasets import CIFAR10DataModule, FashionMNISTDataModule
from lightning_fedsparse.datasets.arrays import ArrayDataModule, ArrayDataset
from lightning_fedsparse.datasets.cifar10 import normalize
from lightning_fedsparse.datasets.in_memory import InMemoryDataModule
from lightning_fedsparse.models import AlexNet, ImageClassifier, LeNet5
from lightning_fedsparse.partition import IidPartition
from lightning_fedsparse.sampling import UniformSampling
from lightning_fedsparse.seeding import derive_seed

SEED = 0

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Work:
    """What clients train, and on what; plain SGD.

    Args:
        network: Makes the network.
        source: Reads the real images.
        shape: Channels, height and width of an image, for synthetic ones.
        transform: Of a batch of images in [0, 1].
        count: Training images.
        clients: They are dealt to so many clients.
        cohort: Clients per round.
        epochs: Local epochs.
        batch: Images per step.
        rate: Learning rate.
        decay: Weight decay.
        dropout: Whether the network's dropout is on.
    """

    network: Callable[[], nn.Module]
    source: Callable[[], ArrayDataModule]
    shape: tuple[int, ...]
    transform: Callable[[Tensor], Tensor] | None
    count: int
    clients: int
    cohort: int
    epochs: int
    batch: int
    rate: float = RATE
    decay: float = 0.0
    dropout: bool = True

    @cached_property
    def _read(self) -> tuple[ArrayDataset, bool]:
        """The training images, and whether they are real."""
        real = True
        try:
            arrays = self.source().load()
            images, classes = torch.from_numpy(arrays.train_x), torch.from_numpy(arrays.train_y.astype(np.int64))
        except OSError:
            real = False
            generator = torch.Generator().manual_seed(SEED)
            images = torch.randint(0, 256, (self.count, *self.shape), dtype=torch.uint8, generator=generator)
            classes = torch.arange(self.count) % 10
        return ArrayDataset(images, classes, transform=self.transform), real

    @property
    def examples(self) -> ArrayDataset:
        """The training images; random ones of the same shape where the real ones are not there."""
        return self._read[0]

    @property
    def images(self) -> str:
        """Which images these are."""
        return "real images" if self._read[1] else "synthetic images of the same shape"

    def new_network(self) -> nn.Module:
        """The network as everybody starts with it."""
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            network = self.network()
        for layer in network.modules():
            if isinstance(layer, nn.Dropout) and not self.dropout:
                layer.p = 0.0
        return network

    @property
    def optimizer(self) -> partial[torch.optim.SGD]:
        """SGD in one fused pass over all tensors, as the hand-written loop has it."""
        return partial(torch.optim.SGD, lr=self.rate, weight_decay=self.decay, fused=True)

    def model(self, *, channels_last: bool = False) -> ImageClassifier:
        return ImageClassifier(self.new_network(), self.optimizer, channels_last=channels_last)

    def data(self) -> FederatedDataModule:
        return FederatedDataModule(_Examples(self.examples, self.batch), IidPartition(self.clients))


class _Examples(InMemoryDataModule):
    def __init__(self, examples: ArrayDataset, batch_size: int) -> None:
        super().__init__(batch_size=batch_size)
        self._examples = examples

    def dataset(self, half: Literal["train", "test"], *, augment: bool) -> Dataset[Any]:
        return self._examples


class Cohorts:
    """Each round's batches, ready in memory: the images that a ``FederatedLoop`` of the same data meets, in its order.

    Args:
        work: The workload.
        data: Its clients.
    """

    def __init__(self, work: Work, data: FederatedDataModule) -> None:
        self._work = work
        self._data = data
        self._last: tuple[int, list[list[Batch]]] = -1, []

    def ready(self, index: int) -> list[list[Batch]]:
        """The batches of each client of a round; those of the last round asked for are kept."""
        if self._last[0] != index:
            ids = UniformSampling().sample(self._data.client_ids, self._work.cohort, seed=SEED, round_index=index)
            self._last = index, [self._batches(index, client_id) for client_id in ids]
        return self._last[1]

    def _batches(self, index: int, client_id: str) -> list[Batch]:
        loader = self._data.client(client_id).train_loader()
        with torch.random.fork_rng():
            torch.manual_seed(derive_seed(SEED, "client", index, client_id))
            return [(images, classes) for _ in range(self._work.epochs) for images, classes in loader]


_CIFAR10 = partial(
    Work, source=partial(CIFAR10DataModule, augment=False), shape=(3, 32, 32), transform=normalize, count=50_000
)
CIFAR10 = _CIFAR10(SimpleCNN, clients=CLIENTS, cohort=COHORT, epochs=1, batch=BATCH)
# few clients of 400 images: a step of 23 million weights takes a good part of a second
ALEXNET = {size: _CIFAR10(AlexNet, clients=125, cohort=2, epochs=1, batch=size, decay=5e-4) for size in (32, 128)}
FASHION = Work(
    LeNet5, FashionMNISTDataModule, (1, 28, 28), None, 60_000, clients=50, cohort=5, epochs=5, batch=128, decay=5e-4
)
