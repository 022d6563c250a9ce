"""CIFAR-10: 50000 + 10000 colour images of 32 x 32, ten classes, with the usual crop and flip.

A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009,
https://www.cs.toronto.edu/~kriz/cifar.html.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_fedsparse.datasets.arrays import ArrayDataModule, Arrays
from lightning_fedsparse.datasets.cifar import read_binary_archive, read_binary_folder, read_npz, read_python_folder
from lightning_fedsparse.datasets.download import RemoteFile, data_root, fetch

__all__ = ["CIFAR10DataModule", "normalize", "random_crop_flip"]

_ARCHIVE = RemoteFile(
    "cifar-10-binary.tar.gz",
    ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",),
    "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
)
# per channel, over the training images scaled to [0, 1]: the numbers of FedDIP's released code
_MEAN = (0.49139968, 0.48215827, 0.44653124)
_STD = (0.24703233, 0.24348505, 0.26158768)


def random_crop_flip(images: Tensor, padding: int = 4) -> Tensor:
    """Shift each image by up to ``padding`` pixels, filling with zeros, and mirror half of them.

    Args:
        images: Shape (n, channels, height, width).
        padding: Largest shift in pixels.

    Returns:
        Images of the same shape; shifts and mirrors are drawn from torch's global generator.
    """
    count, channels, height, width = images.shape
    wide = width + 2 * padding
    top, left = torch.randint(0, 2 * padding + 1, (2, count, 1))
    mirrored = torch.rand(count, 1) < 0.5
    columns = torch.arange(width)
    columns = left + torch.where(mirrored, width - 1 - columns, columns)
    rows = (top + torch.arange(height)) * wide
    # one gather for the whole batch: a slice per image takes half as long again
    where = (rows[:, :, None] + columns[:, None, :]).reshape(count, 1, -1).expand(count, channels, -1)
    padded = F.pad(images, (padding,) * 4).flatten(2)
    return padded.gather(2, where).reshape(images.shape)


def normalize(images: Tensor) -> Tensor:
    """Centre and scale each channel of images in [0, 1], shape (n, 3, height, width), in place."""
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (_MEAN, _STD))
    return images.sub_(mean).div_(std)


class CIFAR10DataModule(ArrayDataModule):
    """Images of shape (3, 32, 32), normalised per channel; training images cropped and mirrored at random.

    The data folder ``cifar10/`` may hold ``cifar10.npz`` (uint8 images of shape (n, 32, 32, 3) and labels, as
    ``train_x``, ``train_y``, ``test_x``, ``test_y``), ``cifar-10-batches-bin/``, ``cifar-10-batches-py/`` or
    ``cifar-10-binary.tar.gz``, looked for in this order; the last is downloaded (170 MB) if none is there.

    Args:
        root: Folder of all data sets, with ``cifar10/`` in it; see
            :func:`lightning_fedsparse.datasets.download.data_root`.
        batch_size: Images per batch.
        validation_fraction: Share of the training images held out for validation, in [0, 1).
        num_workers: Worker processes of a loader.
        augment: Whether training images are cropped and mirrored.
    """

    def __init__(
        self,
        root: str | None = None,
        *,
        batch_size: int = 128,
        validation_fraction: float = 0.0,
        num_workers: int = 0,
        augment: bool = True,
    ) -> None:
        super().__init__(batch_size=batch_size, validation_fraction=validation_fraction, num_workers=num_workers)
        self.folder: Path = data_root(root) / "cifar10"
        self.augment = augment

    def prepare_data(self) -> None:
        """Download the archive unless the images are there in some layout."""
        if self._local() is None:
            fetch(_ARCHIVE, self.folder)

    def load(self) -> Arrays:
        """Read whichever layout is there."""
        read = self._local()
        return read_binary_archive(self.folder / _ARCHIVE.name) if read is None else read()

    def transform(self, *, train: bool) -> Callable[[Tensor], Tensor]:
        """Crop and mirror for training, normalise always."""
        return _augmented if train and self.augment else normalize

    def _local(self) -> Callable[[], Arrays] | None:
        """How to read the images that are there, archive aside."""
        for name, read in (
            ("cifar10.npz", read_npz),
            ("cifar-10-batches-bin", read_binary_folder),
            ("cifar-10-batches-py", read_python_folder),
        ):
            if (self.folder / name).exists():
                return partial(read, self.folder / name)
        return None


def _augmented(images: Tensor) -> Tensor:
    return normalize(random_crop_flip(images))
