"""A checkpoint's file: whole or not there, read as it was written, and damage is found."""

import errno
import os
import random
import resource
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lightning_fedsparse.checkpoint import CHECKPOINT_VERSION, load_checkpoint, save_checkpoint
from lightning_fedsparse.durable import append_line, replace_file
from tests.run_folders import Mode, names, snapshot
from tests.test_loop import Net

CONTENT = {"round": 3, "state_dict": {"weight": torch.arange(2000.0)}, "memories": {"a": {"b": [1, None, "c"]}}}


def test_a_checkpoint_is_read_as_it_was_written_by_us_and_by_torch(tmp_path):
    path = tmp_path / "new" / "last.ckpt"
    save_checkpoint(path, CONTENT)
    for content in (load_checkpoint(path), torch.load(path, weights_only=True)):
        assert content["version"] == CHECKPOINT_VERSION
        assert content["memories"] == CONTENT["memories"]
        assert torch.equal(content["state_dict"]["weight"], CONTENT["state_dict"]["weight"])
    assert names(path.parent) == ["last.ckpt"]


def test_every_flipped_bit_and_every_cut_is_found(tmp_path):
    path = tmp_path / "last.ckpt"
    save_checkpoint(path, CONTENT)
    whole = path.read_bytes()
    generator = random.Random(0)
    flips = [*range(60), *generator.sample(range(60, len(whole) - 60), 100), *range(len(whole) - 60, len(whole))]
    for place in flips:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << generator.randrange(8)]) + whole[place + 1 :])
        with pytest.raises(ValueError, match="expected a federation's checkpoint.* got (one|a file) that"):
            load_checkpoint(path)
    for size in [0, 1, 39, 40, *generator.sample(range(len(whole)), 20), *range(len(whole) - 45, len(whole))]:
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="expected a federation's checkpoint.* got (one|a file) that"):
            load_checkpoint(path)


@pytest.mark.parametrize(
    ("version", "age"), [(CHECKPOINT_VERSION + 1, "a newer"), (CHECKPOINT_VERSION - 1, "an older")]
)
def test_a_checkpoint_of_another_version_is_refused(version, age, tmp_path):
    save_checkpoint(tmp_path / "last.ckpt", {**CONTENT, "version": version})
    with pytest.raises(ValueError, match=f"got {version} in .*last.ckpt, which {age} lightning-fedsparse wrote"):
        load_checkpoint(tmp_path / "last.ckpt")


@pytest.mark.parametrize("content", [{"state_dict": {}}, {"version": "1.0"}, [1]])
def test_other_files_are_no_checkpoints(content, tmp_path):
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"got something else in .*other\.ckpt"):
        load_checkpoint(tmp_path / "other.ckpt")


@pytest.mark.parametrize(
    ("value", "kind"),
    [(np.float64(0.5), "numpy.float64"), (Mode.FAST, "Mode"), (Path("x"), "Path"), ({1: Net}, "type")],
)
def test_what_could_not_be_loaded_is_not_saved(value, kind, tmp_path):
    path = tmp_path / "last.ckpt"
    save_checkpoint(path, CONTENT)
    with pytest.raises(TypeError, match=rf"plain values in a checkpoint, got \S*{kind} at memories\.c0\.0"):
        save_checkpoint(path, {"memories": {"c0": (value,)}})
    assert load_checkpoint(path)["round"] == CONTENT["round"]
    assert names(tmp_path) == ["last.ckpt"]


def test_what_is_saved_can_be_loaded(tmp_path):
    plain = [None, True, 1, 0.5, 1j, "s", b"b", (1,), {2}, OrderedDict(a=1), torch.Size([1]), torch.float16]
    content = {"plain": plain, "tensors": [torch.ones(2), nn.Parameter(torch.ones(2))]}
    save_checkpoint(tmp_path / "last.ckpt", content)
    assert load_checkpoint(tmp_path / "last.ckpt")["plain"] == plain


def test_what_cannot_be_written_leaves_what_was_there(tmp_path):
    path = tmp_path / "file"
    replace_file(path, lambda file: file.write(b"old"))

    def fails(file):
        file.write(b"half of the new")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match=f"^expected to write {path}, got: No space left on device$"):
        replace_file(path, fails)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_a_full_disk_leaves_checkpoint_and_history_as_they_were(tmp_path):
    # a limit on the size of files stands for the disk: the system itself refuses, in the middle of a write
    save_checkpoint(tmp_path / "last.ckpt", {"round": 1})
    append_line(tmp_path / "history.jsonl", "x" * 3000)
    before = snapshot(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        with pytest.raises(OSError, match=r"^expected to write .*last\.ckpt, got: File too large$"):
            save_checkpoint(tmp_path / "last.ckpt", CONTENT)
        with pytest.raises(OSError, match=r"^expected to write .*history\.jsonl, got: File too large$"):
            append_line(tmp_path / "history.jsonl", "y" * 3000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert snapshot(tmp_path) == before
