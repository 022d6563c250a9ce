"""CIFAR-10: every layout that it is published in holds the same images, and nothing else is believed."""

import hashlib
import io
import pickle
import struct
import tarfile
from typing import ClassVar

import numpy as np
import pytest
import torch

from lightning_fedsparse.datasets import CIFAR10DataModule
from lightning_fedsparse.datasets.cifar import read_binary_archive, read_binary_folder, read_npz, read_python_folder
from lightning_fedsparse.datasets.cifar10 import normalize, random_crop_flip

# layouts: three images per batch


BATCHES = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]


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


# published data


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
