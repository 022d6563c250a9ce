import gzip
import hashlib
import io
import pickle
import struct
import tarfile
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler, Subset

from lightning_fedsparse.data import FederatedDataModule
from lightning_fedsparse.datasets import (
    ArrayDataset,
    CIFAR10DataModule,
    FashionMNISTDataModule,
    MNISTDataModule,
    MNISTWritersDataModule,
    OptdigitsDataModule,
)
from lightning_fedsparse.datasets.cifar import read_binary_archive, read_binary_folder, read_npz, read_python_folder
from lightning_fedsparse.datasets.cifar10 import normalize, random_crop_flip
from lightning_fedsparse.datasets.download import RemoteFile
from lightning_fedsparse.datasets.idx import read_idx
from lightning_fedsparse.datasets.in_memory import ready_batch
from lightning_fedsparse.partition import IidPartition, NaturalPartition, PathologicalPartition

BATCHES = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]


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


# CIFAR-10 layouts: three images per batch


def cifar_batch(number):
    generator = np.random.default_rng(number)
    return generator.integers(0, 256, (3, 3, 32, 32), dtype=np.uint8), generator.integers(0, 10, 3, dtype=np.uint8)


def expected_cifar():
    images, labels = zip(*map(cifar_batch, range(6)), strict=True)
    return [np.concatenate(images[:5]), np.concatenate(labels[:5]), images[5], labels[5]]


def records(number):
    images, labels = cifar_batch(number)
    return b"".join(bytes([label]) + image.tobytes() for image, label in zip(images, labels, strict=True))


def python2_pickle(content):
    """Pickle as Python 2 did: strings, raw array bytes among them, as byte strings; numpy under its old names."""

    class Pickler(pickle._Pickler):
        dispatch: ClassVar = dict(pickle._Pickler.dispatch)

        def save_bytes(self, value):
            self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)
            self.memoize(value)

        def save_str(self, value):
            self.save_bytes(value.encode("ascii"))

        dispatch[bytes] = save_bytes
        dispatch[str] = save_str

    out = io.BytesIO()
    Pickler(out, protocol=2).dump(content)
    return out.getvalue().replace(b"numpy._core.", b"numpy.core.")


def write_cifar(folder, layout):
    folder.mkdir(parents=True)
    for number, name in enumerate(BATCHES):
        images, labels = cifar_batch(number)
        if layout == "binary":
            (folder / f"{name}.bin").write_bytes(records(number))
        else:
            content = {"data": images.reshape(3, -1), "labels": labels.tolist(), "batch_label": "x"}
            (folder / name).write_bytes(python2_pickle(content))
    return folder


def write_archive(path, numbers=range(6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("cifar-10-batches-bin/readme.html"))
        for number in reversed(numbers):
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{BATCHES[number]}.bin")
            info.size = len(records(number))
            archive.addfile(info, io.BytesIO(records(number)))
    return path


def write_npz(path, **changed):
    path.parent.mkdir(parents=True, exist_ok=True)
    train_x, train_y, test_x, test_y = expected_cifar()
    arrays = {"train_x": train_x.transpose(0, 2, 3, 1), "train_y": train_y, "test_x": test_x.transpose(0, 2, 3, 1)}
    arrays = {**arrays, "test_y": test_y.astype(np.int64), **changed}
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


LAYOUTS = {
    "npz": lambda folder: read_npz(write_npz(folder / "cifar10.npz")),
    "binary": lambda folder: read_binary_folder(write_cifar(folder / "cifar-10-batches-bin", "binary")),
    "python": lambda folder: read_python_folder(write_cifar(folder / "cifar-10-batches-py", "python")),
    "archive": lambda folder: read_binary_archive(write_archive(folder / "cifar-10-binary.tar.gz")),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cifar_layouts_hold_the_same(tmp_path, layout):
    arrays = LAYOUTS[layout](tmp_path)
    for array, expected in zip(arrays, expected_cifar(), strict=True):
        assert array.dtype == np.uint8
        np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cifar_data_module_finds_every_layout(tmp_path, layout):
    LAYOUTS[layout](tmp_path / "cifar10")
    module = CIFAR10DataModule(str(tmp_path), batch_size=5, augment=False)
    if layout != "archive":  # its checksum would not be that of the published one
        module.prepare_data()
    module.setup("fit")
    images, targets = next(iter(module.test_dataloader()))
    mean, std = np.array([0.49139968, 0.48215827, 0.44653124]), np.array([0.24703233, 0.24348505, 0.26158768])
    expected = (expected_cifar()[2] / 255 - mean[:, None, None]) / std[:, None, None]
    np.testing.assert_allclose(images.numpy(), expected, atol=1e-5)
    assert targets.tolist() == expected_cifar()[3].tolist()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: read_npz(write_npz(f / "x.npz", test_y=None)), "lacks the arrays test_y"),
        (
            lambda f: read_npz(write_npz(f / "x.npz", test_x=np.zeros((3, 3, 32, 32), np.uint8))),
            r"test_x of .* must have shape \(n, 32, 32, 3\), got \(3, 3, 32, 32\)",
        ),
        (
            lambda f: read_npz(write_npz(f / "x.npz", test_x=np.zeros((3, 32, 32, 3)))),
            "images of test of .* must be uint8, got float64",
        ),
        (
            lambda f: read_npz(write_npz(f / "x.npz", test_y=np.array([0, 1]))),
            r"labels of test of .* must be 3 integers in 0..9, got shape \(2,\)",
        ),
        (lambda f: read_npz(write_npz(f / "x.npz", test_y=np.array([0, 1, 10]))), "must be 3 integers in 0..9"),
        (lambda f: read_binary_archive(write_archive(f / "x.tar.gz", range(4))), "lacks data_batch_5, test_batch"),
    ],
)
def test_cifar_bad_arrays(tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path)


@pytest.mark.parametrize("content", [b"", b"x" * 3072])
def test_cifar_bad_records(tmp_path, content):
    folder = write_cifar(tmp_path / "bin", "binary")
    (folder / "data_batch_3.bin").write_bytes(content)
    with pytest.raises(ValueError, match=f"data_batch_3.bin must hold records of 3073 bytes, got {len(content)} bytes"):
        read_binary_folder(folder)


def test_cifar_missing_file_is_named(tmp_path):
    folder = write_cifar(tmp_path / "py", "python")
    (folder / "test_batch").unlink()
    with pytest.raises(FileNotFoundError, match="test_batch"):
        read_python_folder(folder)


class Runs:
    def __reduce__(self):
        return print, ("a pickle ran code",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps(Runs(), protocol=2), "is not a CIFAR-10 batch: it names (__builtin__|builtins).print"),
        (
            pickle.dumps({"data": np.zeros(2, object), "labels": Runs()}, protocol=2),
            "is not a CIFAR-10 batch: it names",
        ),
        (pickle.dumps([1], protocol=2), "is not a CIFAR-10 batch"),
        (pickle.dumps({"data": 1, "labels": [1]}, protocol=2), r"must have shape \(n, 3072\), got \(\)"),
        (b"nonsense", "is not a CIFAR-10 batch"),
    ],
)
def test_cifar_pickles_run_nothing(tmp_path, capsys, content, message):
    folder = write_cifar(tmp_path / "py", "python")
    (folder / "data_batch_1").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_python_folder(folder)
    assert "ran code" not in capsys.readouterr().out


# augmentation


def test_crop_flip_is_one_of_the_possible_ones():
    images = torch.arange(1, 2 * 3 * 6 * 5 + 1, dtype=torch.float32).reshape(2, 3, 6, 5)
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (2, 2), (2, 2)))
    seen = set()
    for _ in range(200):
        for index, image in enumerate(random_crop_flip(images, padding=2).numpy()):
            found = [
                (top, left, mirrored)
                for top in range(5)
                for left in range(5)
                for mirrored in (1, -1)
                if np.array_equal(image, padded[index, :, top : top + 6, left : left + 5][..., ::mirrored])
            ]
            assert len(found) == 1
            seen.update(found)
    assert len(seen) == 50


def test_crop_flip_draws_from_the_global_generator():
    images = torch.rand(8, 3, 32, 32)
    torch.manual_seed(1)
    first = random_crop_flip(images)
    torch.manual_seed(1)
    torch.testing.assert_close(random_crop_flip(images), first, rtol=0, atol=0)
    assert not torch.equal(random_crop_flip(images), first)


def test_only_training_images_are_augmented(tmp_path):
    write_npz(tmp_path / "cifar10" / "cifar10.npz")
    module = CIFAR10DataModule(str(tmp_path), batch_size=20, validation_fraction=0.2)
    module.setup("fit")
    draws = [[next(iter(loader()))[0] for _ in range(2)] for loader in (module.val_dataloader, module.test_dataloader)]
    for first, second in draws:
        assert torch.equal(first, second)
    torch.manual_seed(0)
    train, _ = next(iter(module.train_dataloader()))
    plain = normalize(torch.from_numpy(expected_cifar()[0]).float().div_(255))
    assert train.shape == (12, 3, 32, 32)
    assert not any(torch.equal(image, other) for image in train for other in plain)


# in-memory data set


def array_dataset(size=10, **arguments):
    return ArrayDataset(
        torch.arange(size * 4, dtype=torch.uint8).reshape(size, 1, 2, 2), torch.arange(size), **arguments
    )


def test_array_dataset_batches():
    images, targets = array_dataset(full_scale=2.0).__getitems__([2, 0])
    assert images.dtype == torch.float32
    assert images.tolist() == [[[[4, 4.5], [5, 5.5]]], [[[0, 0.5], [1, 1.5]]]]
    assert targets.tolist() == [2, 0]
    assert targets.dtype == torch.int64


def test_array_dataset_gives_single_examples():
    dataset = array_dataset()
    image, target = dataset[np.int64(3)]
    assert image.shape == (1, 2, 2)
    assert image[0, 1, 1] == torch.tensor(15 / 255)
    assert target == 3
    assert len(dataset) == 10


@pytest.mark.parametrize("wrap", [lambda d: d, lambda d: Subset(Subset(d, [9, 8, 7, 6, 5]), [4, 2, 0])])
def test_ready_batches_equal_collated_ones(wrap):
    class Single(torch.utils.data.Dataset):  # the same examples, one by one
        def __init__(self, dataset):
            self.dataset = dataset

        def __getitem__(self, index):
            return self.dataset[index]

        def __len__(self):
            return len(self.dataset)

    dataset = wrap(array_dataset())
    ready = list(DataLoader(dataset, batch_size=2, collate_fn=ready_batch))
    collated = list(DataLoader(Single(dataset), batch_size=2))
    for (images, targets), (other_images, other_targets) in zip(ready, collated, strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(targets, other_targets)


def test_array_dataset_sizes_must_agree():
    with pytest.raises(ValueError, match="3 inputs need as many targets and client keys, got 2 targets"):
        ArrayDataset(torch.zeros(3, 1, 2, 2), torch.zeros(2))
    with pytest.raises(ValueError, match="10 inputs need as many targets and client keys"):
        array_dataset(client_keys=np.arange(3))


# data modules


def test_optdigits():
    module = OptdigitsDataModule()
    module.prepare_data()
    module.setup("fit")
    train, test = module.train_dataloader(), module.test_dataloader()
    assert (len(train.dataset), len(test.dataset)) == (3823, 1797)
    assert isinstance(train.sampler, RandomSampler)
    assert not isinstance(test.sampler, RandomSampler)
    assert train.batch_size == 32
    assert np.bincount(train.dataset.targets).tolist() == [376, 389, 380, 389, 387, 376, 377, 387, 380, 382]
    images, targets = next(iter(test))
    assert images.shape == (32, 1, 8, 8)
    assert (images.min(), images.max()) == (0, 1)
    # the first test image is a zero: dark in the middle, light around
    assert targets[0] == 0
    assert (images[0, 0] * 16)[0].tolist() == [0, 0, 5, 13, 9, 1, 0, 0]
    assert module.val_dataloader() == []


def test_held_out_images_are_the_same_for_every_run():
    halves = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        module = OptdigitsDataModule(validation_fraction=0.1)
        module.setup("fit")
        halves.append((module.train_dataloader().dataset.indices, module.val_dataloader().dataset.indices))
    (train, val), again = halves
    assert (train, val) == again
    assert len(val) == 382
    assert sorted(train + val) == list(range(3823))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"validation_fraction": 1.0}, r"validation_fraction must be in \[0, 1\), got 1.0"),
        ({"validation_fraction": -0.1}, r"validation_fraction must be in \[0, 1\), got -0.1"),
    ],
)
def test_data_module_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        OptdigitsDataModule(**arguments)


def test_federated_optdigits_with_held_out_images():
    data = FederatedDataModule(OptdigitsDataModule(validation_fraction=0.1), IidPartition(10), validation_fraction=0.2)
    clients = [data.client(client_id) for client_id in data.client_ids]
    assert sum(client.num_examples + len(client.val_loader().dataset) for client in clients) == 3823 - 382
    images, targets = next(iter(clients[0].train_loader()))
    assert images.shape == (32, 1, 8, 8)
    assert len(set(targets.tolist())) > 5
    assert len(data.val_dataloader().dataset) == 382
    assert len(data.test_dataloader().dataset) == 1797


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


def test_cifar10_real_in_binary_layout(real_data, tmp_path):
    """The images kept as differences of neighbours, written in the published layout, have the published checksums."""
    path = real_data("cifar10") / "cifar10-delta.npz"
    if not path.exists():
        pytest.skip("needs cifar10-delta.npz")
    folder = tmp_path / "cifar10" / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    with np.load(path) as arrays:
        halves = [(arrays[f"{half}_x"], arrays[f"{half}_y"]) for half in ("train", "test")]
    content = []
    for differences, labels in halves:
        planes = differences.cumsum(2, dtype=np.uint8).cumsum(3, dtype=np.uint8)
        planes[0] += planes[1]
        planes[2] += planes[1]
        pixels = planes.transpose(1, 0, 2, 3).reshape(len(labels), -1)
        content.append(np.concatenate([labels[:, None].astype(np.uint8), pixels], axis=1))
    for number, name in enumerate(BATCHES):
        batch = content[0][number * 10000 : (number + 1) * 10000] if number < 5 else content[1]
        (folder / f"{name}.bin").write_bytes(batch.tobytes())
    published = {"data_batch_1": "5dd7e06a14cb22eb9f671a540d1b7c25", "test_batch": "803d5f7f4d78ea53de84dbe85f74fb6d"}
    for name, md5 in published.items():
        assert hashlib.md5((folder / f"{name}.bin").read_bytes()).hexdigest() == md5
    module = CIFAR10DataModule(str(tmp_path), augment=False)
    module.prepare_data()
    module.setup("fit")
    images = torch.cat([images for images, _ in module.train_dataloader()])
    assert images.shape == (50000, 3, 32, 32)
    # mean and standard deviation are those of the training images
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(3), atol=1e-3, rtol=0)
    torch.testing.assert_close(images.std((0, 2, 3)), torch.ones(3), atol=1e-3, rtol=0)
