"""MNIST, Fashion-MNIST and MNIST's writers, from IDX files."""

import gzip
import hashlib
import io
import struct

import numpy as np
import pytest
import torch

from lightning_fedsparse.data import FederatedDataModule
from lightning_fedsparse.datasets import FashionMNISTDataModule, MNISTDataModule, MNISTWritersDataModule
from lightning_fedsparse.datasets.download import RemoteFile
from lightning_fedsparse.datasets.idx import read_idx
from lightning_fedsparse.partition import NaturalPartition, PathologicalPartition

# IDX


def idx(code, shape, values):
    return bytes([0, 0, code, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + values


@pytest.mark.parametrize("packed", [False, True])
def test_idx_reads_bytes_plain_or_gzipped(tmp_path, packed):
    content = idx(0x08, (2, 3), bytes([1, 2, 3, 4, 5, 255]))
    (tmp_path / "file").write_bytes(gzip.compress(content, mtime=0) if packed else content)
    array = read_idx(tmp_path / "file")
    assert array.dtype == np.uint8
    assert array.tolist() == [[1, 2, 3], [4, 5, 255]]


@pytest.mark.parametrize(
    ("code", "form", "dtype"),
    [(0x09, "b", "int8"), (0x0B, "h", "int16"), (0x0C, "i", "int32"), (0x0D, "f", "float32"), (0x0E, "d", "float64")],
)
def test_idx_reads_every_type(tmp_path, code, form, dtype):
    (tmp_path / "file").write_bytes(idx(code, (3,), struct.pack(f">3{form}", 1, -2, 3)))
    array = read_idx(tmp_path / "file")
    assert array.dtype == np.dtype(dtype)
    assert array.dtype.isnative
    assert array.tolist() == [1, -2, 3]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not an IDX file: it begins with $"),
        (b"PK\3\4", "is not an IDX file: it begins with 50 4b 03 04"),
        (bytes([0, 0, 7, 1]), "is not an IDX file: it begins with 00 00 07 01"),
        (bytes([0, 0, 8, 0]), "is not an IDX file: it begins with 00 00 08 00"),
        (bytes([0, 0, 8, 2, 0, 0]), "ends inside its header of 2 dimensions"),
        (idx(0x08, (2, 3), b"12345"), r"holds 5 bytes of values, its header states 6 \(shape \(2, 3\)\)"),
        (idx(0x08, (2, 3), b"1234567"), "holds 7 bytes of values, its header states 6"),
        (idx(0x08, (2**32 - 1,) * 3, b"1"), "holds 1 bytes of values, its header states"),
        (gzip.compress(idx(0x08, (2,), b"12"), mtime=0)[:-4], "is not a complete gzip file"),
    ],
)
def test_idx_bad_input(tmp_path, content, message):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_idx(tmp_path / "file")


@pytest.mark.parametrize(
    ("module_class", "name", "sha256"),
    [
        (FashionMNISTDataModule, "fashion-mnist", lambda content: hashlib.sha256(gzip.compress(content, mtime=0))),
        (MNISTDataModule, "mnist", hashlib.sha256),
    ],
)
def test_idx_data_modules_read_small_files(tmp_path, monkeypatch, module_class, name, sha256):
    generator = np.random.default_rng(0)
    contents = {}
    for half, size in (("train", 6), ("t10k", 4)):
        images, labels = generator.integers(0, 256, (size, 28, 28), np.uint8), np.arange(size, dtype=np.uint8)
        contents[f"{half}-images-idx3-ubyte.gz"] = idx(0x08, images.shape, images.tobytes())
        contents[f"{half}-labels-idx1-ubyte.gz"] = idx(0x08, labels.shape, labels.tobytes())
    folder = tmp_path / name
    folder.mkdir()
    for file, content in contents.items():
        (folder / file).write_bytes(gzip.compress(content, mtime=0))
    table = {file: sha256(content).hexdigest() for file, content in contents.items()}
    constant = "_MNIST" if name == "mnist" else "_FASHION_MNIST"
    monkeypatch.setattr(f"lightning_fedsparse.datasets.mnist.{constant}", table)
    monkeypatch.setenv("FEDSPARSE_DATA", str(tmp_path))
    module = module_class(batch_size=4)
    module.prepare_data()
    module.setup("fit")
    images, targets = next(iter(module.test_dataloader()))
    assert images.shape == (4, 1, 28, 28)
    assert targets.tolist() == [0, 1, 2, 3]
    pixels = np.frombuffer(contents["t10k-images-idx3-ubyte.gz"], np.uint8, offset=16).reshape(4, 1, 28, 28)
    assert torch.equal(images, torch.from_numpy(pixels.astype(np.float32)) / 255)
    assert len(module.train_dataloader().dataset) == 6
    assert module.train_dataloader().dataset.client_keys is None


# MNIST's writers: six images by three people


def write_mnist(folder, monkeypatch):
    folder.mkdir()
    table = {}
    for half, size in (("train", 6), ("t10k", 4)):
        for name, content in (
            ("images-idx3", idx(0x08, (size, 28, 28), bytes(size * 784))),
            ("labels-idx1", idx(0x08, (size,), bytes(range(size)))),
        ):
            table[f"{half}-{name}-ubyte.gz"] = hashlib.sha256(content).hexdigest()
            (folder / f"{half}-{name}-ubyte.gz").write_bytes(gzip.compress(content, mtime=0))
    monkeypatch.setattr("lightning_fedsparse.datasets.mnist._MNIST", table)


def qmnist_labels(classes, writers):
    rows = [(c, 0, w, 7, 30 + c, 1000, 0, 0) for c, w in zip(classes, writers, strict=True)]
    return gzip.compress(idx(0x0C, (len(rows), 8), b"".join(struct.pack(">8i", *row) for row in rows)), mtime=0)


def written(tmp_path, monkeypatch, name, content):
    write_mnist(tmp_path / "mnist", monkeypatch)
    (tmp_path / "mnist" / name).write_bytes(content)
    if name == LABELS:
        file = RemoteFile(LABELS, (), hashlib.md5(content).hexdigest(), algorithm="md5")
        monkeypatch.setattr("lightning_fedsparse.datasets.mnist_writers._LABELS", file)
    return FederatedDataModule(MNISTWritersDataModule(str(tmp_path)), NaturalPartition())


def npz(**arrays):
    content = io.BytesIO()
    np.savez(content, **arrays)
    return content.getvalue()


LABELS, NPZ = "qmnist-train-labels-idx2-int.gz", "qmnist-writers.npz"
WRITERS = [2100, 5, 2100, 610, 5, 5]


@pytest.mark.parametrize(
    ("name", "content"), [(LABELS, qmnist_labels(range(6), WRITERS)), (NPZ, npz(train_writer=np.array(WRITERS)))]
)
def test_mnist_writers_are_clients(tmp_path, monkeypatch, name, content):
    data = written(tmp_path, monkeypatch, name, content)
    assert {i: data.client(i).train_loader().dataset.indices for i in data.client_ids} == {
        "5": [1, 4, 5],
        "610": [3],
        "2100": [0, 2],
    }


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (LABELS, qmnist_labels(range(5), WRITERS[:5]), r"must have shape \(6, 8\), got \(5, 8\)"),
        (LABELS, gzip.compress(idx(0x08, (6,), bytes(6)), mtime=0), r"must have shape \(6, 8\), got \(6,\)"),
        (LABELS, qmnist_labels([1] * 6, WRITERS), "the classes in column 0 of .* are not those of MNIST's training"),
        (NPZ, npz(other=np.zeros(6)), "lacks the array train_writer"),
        (NPZ, npz(train_writer=np.zeros(6)), r"must be 6 integers, got float64 of shape \(6,\)"),
        (NPZ, npz(train_writer=np.zeros(5, int)), r"must be 6 integers, got int64 of shape \(5,\)"),
    ],
)
def test_mnist_writers_of_other_images(tmp_path, monkeypatch, name, content, message):
    with pytest.raises(ValueError, match=message):
        written(tmp_path, monkeypatch, name, content).client_ids  # noqa: B018


def test_mnist_writers_are_downloaded_where_there_is_no_npz(tmp_path, monkeypatch):
    write_mnist(tmp_path / "mnist", monkeypatch)
    asked = []
    monkeypatch.setattr("lightning_fedsparse.datasets.mnist_writers.fetch", lambda file, folder: asked.append(file))
    MNISTWritersDataModule(str(tmp_path)).prepare_data()
    (tmp_path / "mnist" / NPZ).write_bytes(b"")
    MNISTWritersDataModule(str(tmp_path)).prepare_data()
    assert [file.name for file in asked] == [LABELS]


# published data


def test_fashion_mnist_real(real_data):
    real_data("fashion-mnist")
    data = FederatedDataModule(FashionMNISTDataModule(), PathologicalPartition(50))
    assert [data.num_examples(client_id) for client_id in data.client_ids] == ([1198] * 9 + [1218]) * 5
    images, targets = next(iter(data.client("00").train_loader()))
    assert images.shape == (128, 1, 28, 28)
    assert images.max() == 1
    assert set(targets.tolist()) == {0, 1}


def test_mnist_real_has_writers_as_clients(real_data):
    real_data("mnist")
    data = FederatedDataModule(MNISTWritersDataModule(), NaturalPartition())
    sizes = [data.num_examples(client_id) for client_id in data.client_ids]
    assert (len(sizes), sum(sizes), min(sizes), max(sizes)) == (539, 60000, 19, 131)
    assert len(data.test_dataloader().dataset) == 10000
