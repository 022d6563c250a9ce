"""Shakespeare by role: known answers on a small text in the published layout."""

import hashlib

import numpy as np
import pytest
import torch

from lightning_fedsparse.data import FederatedDataModule
from lightning_fedsparse.datasets import ShakespeareDataModule
from lightning_fedsparse.datasets.download import RemoteFile
from lightning_fedsparse.datasets.shakespeare import roles, windows
from lightning_fedsparse.partition import NaturalPartition

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
