"""MNIST and Fashion-MNIST: 60000 + 10000 grey images of 28 x 28, ten classes.

Y. LeCun, C. Cortes, C. J. C. Burges, "The MNIST database of handwritten digits",
http://yann.lecun.com/exdb/mnist/. H. Xiao, K. Rasul, R. Vollgraf, "Fashion-MNIST: a Novel Image Dataset for
Benchmarking Machine Learning Algorithms", 2017, https://arxiv.org/abs/1708.07747 (MIT licence).
"""

from abc import abstractmethod
from pathlib import Path
from typing import ClassVar

from lightning_fedsparse.datasets.arrays import ArrayDataModule, Arrays
from lightning_fedsparse.datasets.download import RemoteFile, data_root, fetch
from lightning_fedsparse.datasets.idx import read_idx

__all__ = ["FashionMNISTDataModule", "MNISTDataModule"]

_FASHION_MNIST_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
_MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"

# sha256 of the published .gz
_FASHION_MNIST = {
    "train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    "train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    "t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    "t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
}
# sha256 of the content: the same four files are around in different compressions
_MNIST = {
    "train-images-idx3-ubyte.gz": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte.gz": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte.gz": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte.gz": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


class _IdxDataModule(ArrayDataModule):
    folder_name: ClassVar[str]

    def __init__(
        self,
        root: str | None = None,
        *,
        batch_size: int = 128,
        validation_fraction: float = 0.0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, validation_fraction=validation_fraction, num_workers=num_workers)
        self.folder: Path = data_root(root) / self.folder_name

    @abstractmethod
    def remote_files(self) -> list[RemoteFile]:
        """Training images, training labels, test images, test labels."""

    def prepare_data(self) -> None:
        """Download what is not in the data folder."""
        for file in self.remote_files():
            fetch(file, self.folder)

    def load(self) -> Arrays:
        """Read the four files."""
        train_x, train_y, test_x, test_y = (read_idx(self.folder / file.name) for file in self.remote_files())
        return Arrays(train_x[:, None], train_y, test_x[:, None], test_y)


class FashionMNISTDataModule(_IdxDataModule):
    """Images of shape (1, 28, 28) in [0, 1], neither normalised nor augmented.

    Args:
        root: Folder of all data sets, with ``fashion-mnist/`` in it; see
            :func:`lightning_fedsparse.datasets.download.data_root`.
        batch_size: Images per batch.
        validation_fraction: Share of the training images held out for validation, in [0, 1).
        num_workers: Worker processes of a loader.
    """

    folder_name = "fashion-mnist"

    def remote_files(self) -> list[RemoteFile]:
        """Name the four files."""
        return [RemoteFile(name, (_FASHION_MNIST_URL + name,), sha256) for name, sha256 in _FASHION_MNIST.items()]


class MNISTDataModule(_IdxDataModule):
    """Images of shape (1, 28, 28) in [0, 1], neither normalised nor augmented.

    Args:
        root: Folder of all data sets, with ``mnist/`` in it; see
            :func:`lightning_fedsparse.datasets.download.data_root`.
        batch_size: Images per batch.
        validation_fraction: Share of the training images held out for validation, in [0, 1).
        num_workers: Worker processes of a loader.
    """

    folder_name = "mnist"

    def remote_files(self) -> list[RemoteFile]:
        """Name the four files."""
        return [RemoteFile(name, (_MNIST_URL + name,), sha256, unpacked=True) for name, sha256 in _MNIST.items()]
