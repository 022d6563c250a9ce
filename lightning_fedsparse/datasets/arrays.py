"""In-memory data sets whose loader hands out ready batches, and the data module around them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.types import EVAL_DATALOADERS
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

__all__ = ["ArrayDataModule", "ArrayDataset", "Arrays", "ready_batch"]

_Batch = TypeVar("_Batch")

# the held-out part is one fixed choice: results with different run seeds compare on the same images
_HOLD_OUT_SEED = 0


def ready_batch(batch: _Batch) -> _Batch:
    """Collate what is collated already: goes with :meth:`ArrayDataset.__getitems__`."""
    return batch


class ArrayDataset(Dataset[tuple[Tensor, Tensor]]):
    """Images kept as bytes, scaled to float32 batch by batch.

    ``__getitems__`` returns one ready batch instead of a list of examples, so a loader with
    ``collate_fn=ready_batch`` spends next to nothing per example; ``Subset`` passes it on.

    Args:
        images: uint8, shape (n, channels, height, width).
        targets: Class of each image, int64, shape (n,).
        full_scale: Value that becomes 1.0.
        transform: Applied to each float32 batch of shape (b, channels, height, width); draws from torch's global
            generator if it draws.
        client_keys: Natural client of each image, shape (n,), if there is one.
    """

    def __init__(
        self,
        images: Tensor,
        targets: Tensor,
        *,
        full_scale: float = 255.0,
        transform: Callable[[Tensor], Tensor] | None = None,
        client_keys: npt.NDArray[np.generic] | None = None,
    ) -> None:
        if len(images) != len(targets) or (client_keys is not None and len(client_keys) != len(images)):
            raise ValueError(f"{len(images)} images need as many targets and client keys, got {len(targets)} targets")
        self.images = images
        self.targets = targets
        self.full_scale = full_scale
        self.transform = transform
        self.client_keys = client_keys

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return a batch: float32 images of shape (b, channels, height, width) and int64 targets of shape (b,)."""
        # through numpy: torch takes three times as long to read a list of ints
        chosen = torch.from_numpy(np.asarray(indices, np.int64))
        images = self.images.index_select(0, chosen).float().div_(self.full_scale)
        if self.transform is not None:
            images = self.transform(images)
        return images, self.targets.index_select(0, chosen)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return one example: a float32 image of shape (channels, height, width) and its int64 target, a scalar."""
        images, targets = self.__getitems__([index])
        return images[0], targets[0]

    def __len__(self) -> int:
        return len(self.targets)


class Arrays(NamedTuple):
    """Images uint8 of shape (n, channels, height, width) and integer labels of shape (n,), for training and test."""

    train_x: npt.NDArray[np.uint8]
    train_y: npt.NDArray[Any]
    test_x: npt.NDArray[np.uint8]
    test_y: npt.NDArray[Any]


class ArrayDataModule(LightningDataModule, ABC):
    """Loaders over arrays in memory; a subclass says where the arrays come from.

    Args:
        batch_size: Images per batch.
        validation_fraction: Share of the training images held out for validation, in [0, 1), the same images for every
            run; with 0 there is no validation loader.
        num_workers: Worker processes of a loader; none is quickest, for the images are in memory.
    """

    full_scale = 255.0

    def __init__(self, *, batch_size: int = 128, validation_fraction: float = 0.0, num_workers: int = 0) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if not 0 <= validation_fraction < 1:
            raise ValueError(f"validation_fraction must be in [0, 1), got {validation_fraction}")
        self.batch_size = batch_size
        self.validation_fraction = validation_fraction
        self.num_workers = num_workers
        self._arrays: Arrays | None = None
        self._keys: npt.NDArray[np.generic] | None = None

    @abstractmethod
    def load(self) -> Arrays:
        """Read all images and labels from local files."""

    def client_keys(self) -> npt.NDArray[np.generic] | None:
        """Natural client of each training image, shape (n,), or None."""
        return None

    def transform(self, *, train: bool) -> Callable[[Tensor], Tensor] | None:
        """What is done to each batch of images in [0, 1]."""
        return None

    def setup(self, stage: str) -> None:
        """Load the arrays, once for all stages."""
        if self._arrays is None:
            self._arrays = self.load()
            self._keys = self.client_keys()

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled batches of the training images that are not held out."""
        kept, _ = self._hold_out()
        dataset = self._dataset("train", train=True)
        return self._loader(Subset(dataset, kept.tolist()) if self.validation_fraction else dataset, shuffle=True)

    def val_dataloader(self) -> EVAL_DATALOADERS:
        """Batches of the held-out training images, not augmented; an empty list if none are held out."""
        _, held = self._hold_out()
        return self._loader(Subset(self._dataset("train", train=False), held.tolist())) if held.size else []

    def test_dataloader(self) -> DataLoader[Any]:
        """Batches of the test images."""
        return self._loader(self._dataset("test", train=False))

    def _hold_out(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        assert self._arrays is not None, "setup comes first"
        size = len(self._arrays.train_y)
        order = np.random.default_rng(_HOLD_OUT_SEED).permutation(size)
        held = round(self.validation_fraction * size)
        return np.sort(order[held:]), np.sort(order[:held])

    def _dataset(self, half: str, *, train: bool) -> ArrayDataset:
        assert self._arrays is not None, "setup comes first"
        images, labels = self._arrays[:2] if half == "train" else self._arrays[2:]
        return ArrayDataset(
            torch.from_numpy(images),
            torch.from_numpy(np.asarray(labels, np.int64)),
            full_scale=self.full_scale,
            transform=self.transform(train=train),
            client_keys=self._keys if half == "train" else None,
        )

    def _loader(self, dataset: Dataset[Any], *, shuffle: bool = False) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            collate_fn=ready_batch,
        )
