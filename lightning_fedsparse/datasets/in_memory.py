"""Data modules whose examples are in memory, and whose loaders hand out ready batches."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.types import EVAL_DATALOADERS
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

__all__ = ["InMemoryDataModule", "ReadyDataset", "ready_batch"]

_Batch = TypeVar("_Batch")

# the held-out part is one fixed choice: results with different run seeds compare on the same examples
_HOLD_OUT_SEED = 0


def ready_batch(batch: _Batch) -> _Batch:
    """Collate what is collated already: goes with :meth:`ReadyDataset.__getitems__`."""
    return batch


class ReadyDataset(Dataset[tuple[Tensor, Tensor]]):
    """Inputs and targets as two tensors.

    ``__getitems__`` returns one ready batch instead of a list of examples, so a loader with
    ``collate_fn=ready_batch`` spends next to nothing per example; ``Subset`` passes it on. A subclass that makes more of
    an example than a row of each tensor overrides :meth:`batch`.

    Args:
        inputs: Shape (n, ...).
        targets: Shape (n, ...).
        client_keys: Natural client of each example, shape (n,), if there is one.
    """

    def __init__(self, inputs: Tensor, targets: Tensor, *, client_keys: npt.NDArray[np.generic] | None = None) -> None:
        if len(inputs) != len(targets) or (client_keys is not None and len(client_keys) != len(inputs)):
            raise ValueError(f"{len(inputs)} inputs need as many targets and client keys, got {len(targets)} targets")
        self.inputs = inputs
        self.targets = targets
        self.client_keys = client_keys

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return the inputs and targets of these examples, given as int64 of shape (b,)."""
        return self.inputs.index_select(0, indices), self.targets.index_select(0, indices)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return a batch: inputs and targets of shapes (b, ...)."""
        # through numpy: torch takes three times as long to read a list of ints
        return self.batch(torch.from_numpy(np.asarray(indices, np.int64)))

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return one example, without the batch dimension."""
        inputs, targets = self.__getitems__([index])
        return inputs[0], targets[0]

    def __len__(self) -> int:
        return len(self.targets)


class InMemoryDataModule(LightningDataModule, ABC):
    """Loaders over data sets in memory; a subclass makes those.

    Args:
        batch_size: Examples per batch.
        validation_fraction: Share of the training examples held out for validation, in [0, 1), the same examples for
            every run; with 0 there is no validation loader.
        num_workers: Worker processes of a loader; none is quickest, for the examples are in memory.
    """

    def __init__(self, *, batch_size: int = 128, validation_fraction: float = 0.0, num_workers: int = 0) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if not 0 <= validation_fraction < 1:
            raise ValueError(f"validation_fraction must be in [0, 1), got {validation_fraction}")
        self.batch_size = batch_size
        self.validation_fraction = validation_fraction
        self.num_workers = num_workers

    @abstractmethod
    def dataset(self, half: Literal["train", "test"], *, augment: bool) -> Dataset[Any]:
        """Return the training or the test half, augmented or not; called after ``setup``."""

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled batches of the training examples that are not held out."""
        dataset = self.dataset("train", augment=True)
        if self.validation_fraction:
            kept, _ = self._hold_out(len(dataset))  # type: ignore[arg-type]
            dataset = Subset(dataset, kept.tolist())
        return self._loader(dataset, shuffle=True)

    def val_dataloader(self) -> EVAL_DATALOADERS:
        """Batches of the held-out training examples, not augmented; an empty list if none are held out."""
        dataset = self.dataset("train", augment=False)
        _, held = self._hold_out(len(dataset))  # type: ignore[arg-type]
        return self._loader(Subset(dataset, held.tolist())) if held.size else []

    def test_dataloader(self) -> DataLoader[Any]:
        """Batches of the test examples."""
        return self._loader(self.dataset("test", augment=False))

    def _hold_out(self, size: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        order = np.random.default_rng(_HOLD_OUT_SEED).permutation(size)
        held = round(self.validation_fraction * size)
        return np.sort(order[held:]), np.sort(order[:held])

    def _loader(self, dataset: Dataset[Any], *, shuffle: bool = False) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            collate_fn=ready_batch,
        )
