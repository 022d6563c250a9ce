"""Shakespeare by role and turbofan engines: known answers on small files in the published layouts."""

import hashlib

import numpy as np
import pytest
import torch

from lightning_fedsparse.data import FederatedDataModule
from lightning_fedsparse.datasets import ShakespeareDataModule, TurbofanDataModule
from lightning_fedsparse.datasets.download import RemoteFile
from lightning_fedsparse.datasets.shakespeare import roles, windows
from lightning_fedsparse.datasets.turbofan import read_engines
from lightning_fedsparse.partition import NaturalPartition

# Shakespeare

PLAY = "B:\nabcab\n\nA:\nabababababababab\n\nB:\ncab\nc\n"


def test_roles_keep_their_speeches_in_order():
    assert roles(PLAY) == {"A": "ab" * 8, "B": "abcab\ncab\nc"}


def test_an_empty_line_inside_a_speech_is_no_new_role():
    assert roles("\nA:\none\n\ntwo\nthree\n\n\nB:\nfour") == {"A": "one\ntwo\nthree", "B": "four"}


def test_a_text_without_roles():
    with pytest.raises(
        ValueError, match="^expected a role's name and a colon at the beginning of a play text, got 'It was"
    ):
        roles("It was a dark night.\n\nA:\nHo")


@pytest.mark.parametrize(
    ("size", "expected"),
    [(7, [[0, 1, 2, 3], [3, 4, 5, 6]]), (6, [[0, 1, 2, 3]]), (4, [[0, 1, 2, 3]]), (3, []), (0, [])],
)
def test_windows_share_one_character(size, expected):
    found = windows(np.arange(size, dtype=np.uint8), 3)
    assert found.shape == (len(expected), 4)
    assert found.tolist() == expected


def shakespeare(tmp_path, monkeypatch, **arguments):
    (tmp_path / "shakespeare").mkdir()
    (tmp_path / "shakespeare" / "tinyshakespeare.txt").write_bytes(PLAY.encode())
    file = RemoteFile("tinyshakespeare.txt", (), hashlib.sha256(PLAY.encode()).hexdigest())
    monkeypatch.setattr("lightning_fedsparse.datasets.shakespeare._TEXT", file)
    return ShakespeareDataModule(str(tmp_path), length=3, **arguments)


def test_roles_are_clients_and_the_end_of_each_is_for_the_test(tmp_path, monkeypatch):
    module = shakespeare(tmp_path, monkeypatch)
    data = FederatedDataModule(module, NaturalPartition())
    # 15 // 3 = 5 windows of A, of which one for the test; 10 // 3 = 3 of B, of which one
    assert {client_id: data.num_examples(client_id) for client_id in data.client_ids} == {"A": 4, "B": 2}
    text = module.symbols
    assert text == "\n:ABabc"
    inputs, targets = next(iter(data.client("B").train_loader()))
    assert inputs.dtype == targets.dtype == torch.int64
    read = {("".join(text[i] for i in x), "".join(text[i] for i in y)) for x, y in zip(inputs, targets, strict=True)}
    assert read == {("abc", "bca"), ("ab\n", "b\nc")}
    inputs, targets = next(iter(data.test_dataloader()))
    assert ["".join(text[i] for i in x) for x in inputs] == ["aba", "cab"]
    assert ["".join(text[i] for i in y) for y in targets] == ["bab", "ab\n"]


def test_held_out_windows_are_of_the_training_part(tmp_path, monkeypatch):
    module = shakespeare(tmp_path, monkeypatch, validation_fraction=0.5)
    module.prepare_data()
    module.setup("fit")
    assert (len(module.train_dataloader().dataset), len(module.val_dataloader().dataset)) == (3, 3)


def test_a_window_has_a_character():
    with pytest.raises(ValueError, match="^length must be at least 1, got 0$"):
        ShakespeareDataModule(length=0)


def test_shakespeare_real(real_data):
    real_data("shakespeare")
    module = ShakespeareDataModule()
    data = FederatedDataModule(module, NaturalPartition(min_examples=20))
    assert (len(data.client_ids), sum(map(data.num_examples, data.client_ids))) == (99, 9141)
    assert len(module.symbols) == 65
    assert len(module.dataset("train", augment=False)) == 10160
    assert len(data.test_dataloader().dataset) == 2535


# turbofan engines: histories of 4 and 3 cycles for training, 5 and 3 for test; every sensor shows 10 * engine + cycle


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
