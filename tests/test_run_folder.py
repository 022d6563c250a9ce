"""A run's folder: its history and its checkpoints stay together, whatever ends the run."""

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch

from lightning_fedsparse.records import read_history
from tests.run_folders import fit, rows, snapshot


@pytest.mark.parametrize("write", [1, 3, 8, 9, 12])
def test_a_full_disk_ends_a_run_that_goes_on_when_there_is_room(write, tmp_path, monkeypatch):
    fit(tmp_path / "whole", 3)
    synced = os.fsync
    written = []

    def full(handle):
        written.append(handle)
        if len(written) == write:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        synced(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="got: No space left on device$"):
        fit(tmp_path / "cut", 3)
    monkeypatch.undo()
    fit(tmp_path / "cut", 3, ckpt_path="last")
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")


def test_a_leftover_of_a_write_does_no_harm(tmp_path):
    fit(tmp_path, 1)
    for name in ("recipe.yaml.tmp", "checkpoints/last.ckpt.tmp"):
        (tmp_path / name).write_bytes(b"half")
    loop, _ = fit(tmp_path, 2, ckpt_path="last")
    assert [record.round for record in loop.history] == [0, 1, 2]


@pytest.mark.parametrize("left", ["", '{"round": 3, "cli', "whole row"])
def test_rows_after_the_checkpoint_are_done_again(left, tmp_path):
    fit(tmp_path / "whole", 4)
    folder = tmp_path / "cut"
    fit(folder, 2)
    if left == "whole row":
        left = "".join((tmp_path / "whole" / "history.jsonl").read_text().splitlines(keepends=True)[3:])
    with (folder / "history.jsonl").open("a") as file:
        file.write(left)
    loop, _ = fit(folder, 4, ckpt_path="last")
    assert rows(folder) == rows(tmp_path / "whole")
    assert read_history(folder / "history.jsonl") == loop.history


def test_a_history_that_is_read_while_it_is_written_has_whole_rows(tmp_path):
    fit(tmp_path, 1)
    with (tmp_path / "history.jsonl").open("a") as file:
        file.write('{"round": 2, ')
    assert [record.round for record in read_history(tmp_path / "history.jsonl")] == [0, 1]


def test_a_history_of_another_run_is_refused_and_left_alone(tmp_path):
    fit(tmp_path / "one", 2)
    fit(tmp_path / "other", 3, seed=1)
    before = snapshot(tmp_path)
    with pytest.raises(
        ValueError, match="expected the history of the checkpoint's run in .*without the row of its round 2"
    ):
        fit(tmp_path / "other", 3, ckpt_path=tmp_path / "one" / "checkpoints" / "last.ckpt")
    (tmp_path / "other" / ".lock").write_bytes(before[Path("other", ".lock")])
    assert snapshot(tmp_path) == before


def test_a_checkpoint_goes_on_in_a_new_folder_with_its_bytes_counted(tmp_path):
    whole, expected = fit(tmp_path / "whole", 4)
    fit(tmp_path / "first", 2)
    loop, model = fit(tmp_path / "second", 4, ckpt_path=tmp_path / "first" / "checkpoints" / "last.ckpt")
    assert rows(tmp_path / "second") == rows(tmp_path / "whole")[2:]
    assert loop.history[-1].total_bytes_up == whole.history[-1].total_bytes_up
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in expected.state_dict().items())


def test_a_history_without_any_checkpoint_is_not_thrown_away(tmp_path):
    fit(tmp_path, 2)
    shutil.rmtree(tmp_path / "checkpoints")
    before = (tmp_path / "history.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"expected a checkpoint to go on from, found none at .*last\.ckpt"):
        fit(tmp_path, 2, ckpt_path="last")
    assert (tmp_path / "history.jsonl").read_bytes() == before


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch):
    fit(tmp_path)
    opened = os.open

    def read_only(path, flags, *mode, **more):
        if flags & (os.O_WRONLY | os.O_RDWR) and tmp_path in Path(path).parents:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return opened(path, flags, *mode, **more)

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(OSError, match=f"^expected to write {tmp_path}, got: Read-only file system$"):
        fit(tmp_path, 3, ckpt_path="last")
