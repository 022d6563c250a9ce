"""Images in memory with their classes, and the data module around them."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_fedsparse.datasets.in_memory import InMemoryDataModule, ReadyDataset

__all__ = ["ArrayDataModule", "ArrayDataset", "Arrays"]


class ArrayDataset(ReadyDataset):
    """Images kept as bytes, scaled to float32 batch by batch.

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
        super().__init__(images, targets, client_keys=client_keys)
        self.full_scale = full_scale
        self.transform = transform

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return float32 images of shape (b, channels, height, width) and int64 targets of shape (b,)."""
        images, targets = super().batch(indices)
        images = images.float().div_(self.full_scale)
        return images if self.transform is None else self.transform(images), targets


class Arrays(NamedTuple):
    """Images uint8 of shape (n, channels, height, width) and integer labels of shape (n,), for training and test."""

    train_x: npt.NDArray[np.uint8]
    train_y: npt.NDArray[Any]
    test_x: npt.NDArray[np.uint8]
    test_y: npt.NDArray[Any]


class ArrayDataModule(InMemoryDataModule):
    """Loaders over images in memory; a subclass says where they come from.

    Args:
        batch_size: Images per batch.
        validation_fraction: Share of the training images held out for validation, in [0, 1), the same images for every
            run; with 0 there is no validation loader.
        num_workers: Worker processes of a loader; none is quickest, for the images are in memory.
    """

    full_scale = 255.0

    def __init__(self, *, batch_size: int = 128, validation_fraction: float = 0.0, num_workers: int = 0) -> None:
        super().__init__(batch_size=batch_size, validation_fraction=validation_fraction, num_workers=num_workers)
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

    def dataset(self, half: Literal["train", "test"], *, augment: bool) -> ArrayDataset:
        """Return the training or the test images."""
        assert self._arrays is not None, "setup comes first"
        images, labels = self._arrays[:2] if half == "train" else self._arrays[2:]
        return ArrayDataset(
            torch.from_numpy(images),
            torch.from_numpy(np.asarray(labels, np.int64)),
            full_scale=self.full_scale,
            transform=self.transform(train=augment),
            client_keys=self._keys if half == "train" else None,
        )
