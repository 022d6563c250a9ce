"""Turbofan engines: known answers on small files in the published layouts."""

import numpy as np
import pytest
import torch

from lightning_fedsparse.data import FederatedDataModule
from lightning_fedsparse.datasets import TurbofanDataModule
from lightning_fedsparse.datasets.turbofan import read_engines
from lightning_fedsparse.partition import NaturalPartition

# histories of 4 and 3 cycles for training, 5 and 3 for test; every sensor shows 10 * engine + cycle


def rows(lengths):
    return np.array(
        [
            [engine, cycle, 0.1, 0.2, 100, *[10 * engine + cycle] * 21]
            for engine, length in enumerate(lengths, start=1)
            for cycle in range(1, length + 1)
        ],
        float,
    )


def write_engines(root, layout, **changed):
    folder = root / "cmapss-fd001"
    folder.mkdir()
    arrays = {"train": rows([4, 3]), "test": rows([5, 3]), "rul": np.array([7.0, 200.0]), **changed}
    if layout == "npz":
        np.savez(folder / "fd001.npz", **{name: array for name, array in arrays.items() if array is not None})
        return folder
    for name, array in arrays.items():
        if array is not None:
            # as published: numbers and spaces, two spaces at each line's end
            lines = [" ".join(f"{value:g}" for value in np.atleast_1d(row)) + "  \n" for row in array]
            (folder / f"{'RUL' if name == 'rul' else name}_FD001.txt").write_text("".join(lines))
    return folder


@pytest.mark.parametrize("layout", ["npz", "text"])
def test_engines_are_clients_and_each_cycle_an_example(tmp_path, layout):
    write_engines(tmp_path, layout)
    data = FederatedDataModule(TurbofanDataModule(str(tmp_path), window=2, cap=1.5), NaturalPartition())
    assert {client_id: data.num_examples(client_id) for client_id in data.client_ids} == {"1": 3, "2": 2}
    dataset = data.client("1").train_loader().dataset
    inputs, left = dataset.__getitems__([0, 1, 2])
    assert inputs.shape == (3, 14, 2)
    assert inputs.dtype == left.dtype == torch.float32
    # the training values run from 11 to 23: 11 is -1, 23 is 1
    torch.testing.assert_close(inputs[:, 5] * 6 + 17, torch.tensor([[11.0, 12], [12, 13], [13, 14]]))
    assert left.tolist() == [1.5, 1, 0]
    inputs, left = next(iter(data.test_dataloader()))
    torch.testing.assert_close(inputs[:, 0] * 6 + 17, torch.tensor([[14.0, 15], [22, 23]]))
    assert left.tolist() == [1.5, 1.5]
    module = TurbofanDataModule(str(tmp_path), window=2)
    module.setup("test")
    assert next(iter(module.test_dataloader()))[1].tolist() == [7, 125]


def test_a_sensor_that_does_not_change_is_no_division_by_zero(tmp_path):
    train = rows([3])
    train[:, 6] = 5.0
    write_engines(tmp_path, "npz", train=train)
    module = TurbofanDataModule(str(tmp_path), window=3)
    module.setup("fit")
    ((inputs, _),) = list(module.train_dataloader())
    assert inputs[0, 0].tolist() == [-1, -1, -1]
    assert inputs[0, 1].tolist() == [-1, 0, 1]


def test_missing_engines_say_what_is_expected_where(tmp_path):
    write_engines(tmp_path, "text", rul=None)
    with pytest.raises(
        FileNotFoundError, match=r"^expected NASA's train_FD001.txt, .* in .*, found no RUL_FD001.txt: "
    ):
        TurbofanDataModule(str(tmp_path)).setup("fit")


@pytest.mark.parametrize(
    ("layout", "changed", "message"),
    [
        ("npz", {"rul": None}, "lacks the arrays rul$"),
        (
            "npz",
            {"train": rows([4])[:, :25]},
            r"train of FD001 in .* must have rows of 26 columns, got shape \(4, 25\)",
        ),
        ("text", {"test": rows([4])[:, 1:]}, r"test of FD001 in .* must have rows of 26 columns, got shape \(4, 25\)"),
        ("text", {"rul": np.ones(3)}, r"RUL of FD001 in .* must have one value for each of 2 engines, got \(3,\)"),
    ],
)
def test_engines_of_another_shape(tmp_path, layout, changed, message):
    folder = write_engines(tmp_path, layout, **changed)
    with pytest.raises(ValueError, match=message):
        read_engines(folder)


def test_a_window_longer_than_a_history(tmp_path):
    write_engines(tmp_path, "npz")
    with pytest.raises(ValueError, match="^window must be at most 3, the cycles of train engine 2, got 4$"):
        TurbofanDataModule(str(tmp_path), window=4).setup("fit")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"window": 0}, "window must be at least 1, got 0"), ({"cap": 0}, "cap must be positive, got 0")],
)
def test_turbofan_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        TurbofanDataModule(**arguments)


def test_turbofan_real(real_data):
    real_data("cmapss-fd001")
    data = FederatedDataModule(TurbofanDataModule(), NaturalPartition())
    sizes = [data.num_examples(client_id) for client_id in data.client_ids]
    assert (len(sizes), sum(sizes), min(sizes), max(sizes)) == (100, 17731, 99, 333)
    inputs, left = next(iter(data.client("1").train_loader()))
    assert inputs.shape == (64, 14, 30)
    assert inputs.abs().max() <= 1
    assert left.max() <= 125
    assert len(data.test_dataloader().dataset) == 100
