"""Readers of CIFAR-10: the published binary and python layouts, and a plain ``.npz``.

A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009,
https://www.cs.toronto.edu/~kriz/cifar.html. In both layouts a batch holds 10000 images, each as 3072 bytes: 32 x 32 of
red, then green, then blue, row by row.
"""

from __future__ import annotations

import io
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_fedsparse.datasets.arrays import Arrays

__all__ = ["read_binary_archive", "read_binary_folder", "read_npz", "read_python_folder"]

_BATCHES = ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch")
_RECORD = 1 + 3 * 32 * 32

Images = npt.NDArray[np.uint8]


def read_binary_folder(folder: Path) -> Arrays:
    """Read ``data_batch_1.bin`` ... ``test_batch.bin``.

    Raises:
        ValueError: If a file is not a row of records of 3073 bytes with labels 0..9.
    """
    return _joined(lambda name: _records((folder / f"{name}.bin").read_bytes(), f"{folder / name}.bin"))


def read_binary_archive(path: Path) -> Arrays:
    """Read the same from ``cifar-10-binary.tar.gz``, without unpacking it to disk.

    Raises:
        ValueError: If a batch is missing or malformed.
    """
    found: dict[str, tuple[Images, Images]] = {}
    with tarfile.open(path) as archive:
        # in the archive's own order: a gzipped tar can only be read forwards
        for member in archive:
            name = Path(member.name).name.removesuffix(".bin")
            content = archive.extractfile(member) if name in _BATCHES else None
            if content is not None:
                found[name] = _records(content.read(), f"{member.name} in {path}")
    missing = [name for name in _BATCHES if name not in found]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    return _joined(found.__getitem__)


def read_python_folder(folder: Path) -> Arrays:
    """Read ``data_batch_1`` ... ``test_batch``, pickles of ``{"data": ..., "labels": ...}``, admitting arrays only.

    Raises:
        ValueError: If a file names anything but numpy's array and its type, or holds other shapes.
    """
    return _joined(lambda name: _pickled(folder / name))


def read_npz(path: Path) -> Arrays:
    """Read ``train_x``, ``train_y``, ``test_x``, ``test_y``: uint8 images of shape (n, 32, 32, 3), integer labels 0..9.

    Raises:
        ValueError: If an array is missing or has another shape or type.
    """
    with np.load(path, allow_pickle=False) as arrays:
        missing = [name for name in Arrays._fields if name not in arrays]
        if missing:
            raise ValueError(f"{path} lacks the arrays {', '.join(missing)}")
        halves: list[npt.NDArray[Any]] = []
        for half in ("train", "test"):
            images = arrays[f"{half}_x"]
            if images.ndim != 4 or images.shape[1:] != (32, 32, 3):
                raise ValueError(f"{half}_x of {path} must have shape (n, 32, 32, 3), got {images.shape}")
            halves += _checked(images.transpose(0, 3, 1, 2), arrays[f"{half}_y"], f"{half} of {path}")
    return Arrays(*halves)


def _joined(batch: Callable[[str], tuple[Images, Images]]) -> Arrays:
    images, labels = zip(*(batch(name) for name in _BATCHES), strict=True)
    return Arrays(np.concatenate(images[:-1]), np.concatenate(labels[:-1]), images[-1], labels[-1])


def _records(content: bytes, where: str) -> tuple[Images, Images]:
    if not content or len(content) % _RECORD:
        raise ValueError(f"{where} must hold records of {_RECORD} bytes, got {len(content)} bytes")
    records = np.frombuffer(content, np.uint8).reshape(-1, _RECORD)
    return _checked(records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0], where)


def _pickled(path: Path) -> tuple[Images, Images]:
    try:
        # published from Python 2: its strings, raw array bytes among them, come through as latin-1
        batch = _ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()
        data, labels = batch["data"], np.asarray(batch["labels"])
    except FileNotFoundError:
        raise
    except Exception as error:  # noqa: BLE001 (a malformed pickle raises nearly anything)
        raise ValueError(f"{path} is not a CIFAR-10 batch: {error}") from None
    if not isinstance(data, np.ndarray) or data.ndim != 2 or data.shape[1] != _RECORD - 1:
        raise ValueError(f"the data of {path} must have shape (n, {_RECORD - 1}), got {np.shape(data)}")
    return _checked(data.reshape(-1, 3, 32, 32), labels, str(path))


def _checked(images: npt.NDArray[Any], labels: npt.NDArray[Any], where: str) -> tuple[Images, Images]:
    if images.dtype != np.uint8:
        raise ValueError(f"images of {where} must be uint8, got {images.dtype}")
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() > 9:
        raise ValueError(f"labels of {where} must be {len(images)} integers in 0..9, got shape {labels.shape}")
    return np.ascontiguousarray(images), labels.astype(np.uint8)


class _ArrayUnpickler(pickle.Unpickler):
    """Admits what plain numeric arrays are made of: a pickle can name, and so run, nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in {("numpy", "ndarray"), ("numpy", "dtype")}:
            return getattr(np, name)
        if module in {"numpy.core.multiarray", "numpy._core.multiarray"} and name == "_reconstruct":
            return np.empty(0).__reduce__()[0]
        raise pickle.UnpicklingError(f"it names {module}.{name}")
