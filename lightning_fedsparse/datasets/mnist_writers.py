"""MNIST with its writers as natural clients: 539 people wrote the training images, 297 others the test images.

Who wrote which digit is known since C. Yadav, L. Bottou, "Cold Case: The Lost MNIST Digits", NeurIPS 2019,
https://arxiv.org/abs/1905.10498. Their training labels, at https://github.com/facebookresearch/qmnist (BSD-style licence),
follow MNIST's images one by one: a row of eight integers per image, the class in column 0, the writer in column 2.
"""

import numpy as np
import numpy.typing as npt

from lightning_fedsparse.datasets.download import RemoteFile, fetch
from lightning_fedsparse.datasets.idx import read_idx
from lightning_fedsparse.datasets.mnist import MNISTDataModule

__all__ = ["MNISTWritersDataModule"]

_NAME = "qmnist-train-labels-idx2-int.gz"
# the MD5 that torchvision checks; its authors state none
_LABELS = RemoteFile(
    _NAME,
    (f"https://raw.githubusercontent.com/facebookresearch/qmnist/master/{_NAME}",),
    "0058f8dd561b90ffdd0f734c6a30e5e4",
    algorithm="md5",
)
_NPZ = "qmnist-writers.npz"
_CLASS, _WRITER, _COLUMNS = 0, 2, 8


class MNISTWritersDataModule(MNISTDataModule):
    """Images of shape (1, 28, 28) in [0, 1], with the number of each training image's writer as its ``client_keys``.

    The data folder ``mnist/`` may hold ``qmnist-writers.npz`` (array ``train_writer``, integers of shape (60000,));
    else QMNIST's ``qmnist-train-labels-idx2-int.gz`` is used, and downloaded if it is not there.

    Args:
        root: Folder of all data sets, with ``mnist/`` in it; see
            :func:`lightning_fedsparse.datasets.download.data_root`.
        batch_size: Images per batch.
        validation_fraction: Share of the training images held out for validation, in [0, 1).
        num_workers: Worker processes of a loader.
    """

    def prepare_data(self) -> None:
        """Download what is not in the data folder."""
        super().prepare_data()
        if not (self.folder / _NPZ).exists():
            fetch(_LABELS, self.folder)

    def client_keys(self) -> npt.NDArray[np.generic]:
        """Read the writer of each training image.

        Raises:
            ValueError: If the file that is there does not belong to these images.
        """
        assert self._arrays is not None, "load comes first"
        path, classes = self.folder / _NPZ, self._arrays.train_y
        if path.exists():
            with np.load(path, allow_pickle=False) as arrays:
                if "train_writer" not in arrays:
                    raise ValueError(f"{path} lacks the array train_writer")
                writers: npt.NDArray[np.generic] = arrays["train_writer"]
            if writers.shape != classes.shape or writers.dtype.kind not in "iu":
                raise ValueError(
                    f"train_writer of {path} must be {len(classes)} integers, got {writers.dtype} of shape {writers.shape}"
                )
            return writers
        path = self.folder / _NAME
        labels: npt.NDArray[np.generic] = read_idx(path)
        if labels.shape != (len(classes), _COLUMNS):
            raise ValueError(f"{path} must have shape {(len(classes), _COLUMNS)}, got {labels.shape}")
        if not np.array_equal(labels[:, _CLASS], classes):
            raise ValueError(f"the classes in column {_CLASS} of {path} are not those of MNIST's training images")
        return labels[:, _WRITER]
