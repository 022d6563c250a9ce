"""A run's folder: what is written is whole or not there, what is read is what was written, and only one run is at work."""

import errno
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import textwrap
from collections import OrderedDict
from enum import Enum
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lightning_fedsparse import FederatedLoop, load_folded
from lightning_fedsparse.callbacks import feddip
from lightning_fedsparse.checkpoint import CHECKPOINT_VERSION, load_checkpoint, save_checkpoint
from lightning_fedsparse.checkpointing import Checkpointing
from lightning_fedsparse.durable import append_line, replace_file
from lightning_fedsparse.evaluation import Evaluation
from lightning_fedsparse.locking import locked
from lightning_fedsparse.records import read_history
from lightning_fedsparse.resuming import flat
from lightning_fedsparse.schedules import CubicSchedule, LinearSchedule
from lightning_fedsparse.wire import Wire
from tests.test_loop import Net, clients, loaders


class Mode(str, Enum):
    FAST = "fast"


CONTENT = {"round": 3, "state_dict": {"weight": torch.arange(2000.0)}, "memories": {"a": {"b": [1, None, "c"]}}}


def fit(folder, rounds=2, callbacks=None, *, model=Net, population=6, per_round=3, ckpt_path=None, **arguments):
    torch.manual_seed(0)
    module = model()
    arguments = {"evaluation": Evaluation(split="none"), **arguments}
    loop = FederatedLoop(rounds, per_round, callbacks, console=False, default_root_dir=folder, **arguments)
    loop.fit(module, loaders(clients(population)), ckpt_path=ckpt_path)
    return loop, module


def rows(folder):
    lines = (folder / "history.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if "seconds" not in name} for line in lines]


def snapshot(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# -- files -------------------------------------------------------------------------------------------------------------


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


# -- histories ---------------------------------------------------------------------------------------------------------


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


# -- what fits ---------------------------------------------------------------------------------------------------------


class Wider(Net):
    def __init__(self):
        super().__init__()
        self.last = nn.Linear(16, 4)


class Doubles(Net):
    def __init__(self):
        super().__init__()
        self.last = self.last.double()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": 1}, r"got another: arguments.seed: 0 -> 1; a run that goes on may change rounds, executor, "),
        ({"per_round": 2}, "arguments.clients_per_round: 3 -> 2;"),
        ({"population": 7}, "arguments.clients: 6 -> 7;"),
        ({"wire": Wire(uploads="bfloat16")}, "arguments.wire.uploads: 'float32' -> 'bfloat16';"),
        ({"trainer": {"max_epochs": 3}}, "arguments.trainer.max_epochs: 1 -> 3;"),
        (
            {"callbacks": feddip(sparsity=0.5)},
            r"arguments.callbacks.0: None -> '\S+DynamicPruning', .* -> .*, .* -> .* and \d+ more;",
        ),
        ({"model": Wider}, r"'last.bias' is float32\[4\] in the model and float32\[3\] in the checkpoint"),
        ({"model": Doubles}, r"'last.bias' is float64\[3\] in the model and float32\[3\] in the checkpoint"),
        ({"rounds": 1}, "expected at least 2 rounds, as many as the checkpoint has done, got 1"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_and_nothing_changes(arguments, message, tmp_path):
    fit(tmp_path)
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, **{"rounds": 3, **arguments}, ckpt_path="last")
    assert snapshot(tmp_path) == before


def test_what_does_not_change_the_rounds_that_are_done_may_differ(tmp_path):
    fit(tmp_path)
    evaluated = Evaluation(every=2, split="none")
    fit(tmp_path, 3, fresh_trainer=True, evaluation=evaluated, checkpointing=Checkpointing(2), ckpt_path="last")


def test_a_finished_run_is_left_as_it_is(tmp_path):
    loop, model = fit(tmp_path)
    before = snapshot(tmp_path)
    again, same = fit(tmp_path, ckpt_path="last")
    assert snapshot(tmp_path) == before
    assert again.history == loop.history
    assert all(torch.equal(same.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


class Counting:
    def __init__(self, every, where, quiet=False):
        self.every = every
        self.where = Path(where)  # no plain value
        self.count = 0  # no argument
        self._quiet = quiet


def test_flat_names_values_classes_and_the_arguments_that_objects_keep():
    optimizer = partial(torch.optim.SGD, lr=0.5)
    assert flat({"a": [1, {"b": None}], "c": Counting(3, "x"), "d": Net, "e": optimizer, "f": len}) == {
        "a.0": 1,
        "a.1.b": None,
        "c": "tests.test_run_folder.Counting",
        "c.every": 3,
        "d": "tests.test_loop.Net",
        "e": "functools.partial",
        "e.function": "torch.optim.sgd.SGD",
        "e.lr": 0.5,
        "f": "builtins.len",
    }
    leaves = flat({"a": np.float64(0.5), "b": Mode.FAST, "c": True, "d": 1})
    assert [type(leaf) for leaf in leaves.values()] == [float, str, bool, int]
    schedules = CubicSchedule(0.0, 0.9), LinearSchedule(0.0, 0.9)
    assert [flat(schedule, "s") for schedule in schedules] == [
        {"s": f"lightning_fedsparse.schedules.{name}", "s.initial": 0.0, "s.final": 0.9}
        for name in ("CubicSchedule", "LinearSchedule")
    ]


def test_methods_are_compared_by_their_arguments(tmp_path):
    fit(tmp_path, 2, feddip(sparsity=0.8))
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=r"another: arguments.callbacks.0.schedule.final: 0.8 -> 0.5;"):
        fit(tmp_path, 3, feddip(sparsity=0.5), ckpt_path="last")
    assert snapshot(tmp_path) == before
    fit(tmp_path, 3, feddip(sparsity=0.8), ckpt_path="last")


# -- the best ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "k", "kept"), [("min", 1, [4]), ("min", 2, [2, 4]), ("max", 1, [1]), ("max", -1, [1, 2, 3, 4])]
)
def test_the_best_rounds_stay(mode, k, kept, tmp_path, monkeypatch):
    losses = iter([0.9, 0.8, 0.3, 0.3, 0.2])
    monkeypatch.setattr("lightning_fedsparse.evaluation.Evaluator.is_due", lambda *_: True)
    monkeypatch.setattr("lightning_fedsparse.evaluation.Evaluator.run", lambda *_: {"loss": next(losses)})
    loop, _ = fit(tmp_path, 4, checkpointing=Checkpointing(monitor="loss", mode=mode, save_top_k=k))
    assert names(tmp_path / "checkpoints") == ["last.ckpt", *(f"round={number}.ckpt" for number in kept)]
    for number in kept:
        assert load_checkpoint(tmp_path / "checkpoints" / f"round={number}.ckpt")["round"] == number
    served = load_folded(tmp_path / "checkpoints" / f"round={kept[-1]}.ckpt", Net())
    if kept[-1] == 4:
        assert all(torch.equal(loop.state.tensors[name], tensor) for name, tensor in served.state_dict().items())


def test_a_resumed_run_keeps_the_best_of_the_whole_run(tmp_path):
    best = {"checkpointing": Checkpointing(monitor="train_loss", save_top_k=2)}
    fit(tmp_path / "whole", 5, **best)
    fit(tmp_path / "cut", 3, **best)
    (tmp_path / "cut" / "checkpoints" / "round=4.ckpt").write_bytes(b"of a round that is done again")
    fit(tmp_path / "cut", 5, ckpt_path="last", **best)
    kept = names(tmp_path / "whole" / "checkpoints")
    assert len(kept) == 3
    assert names(tmp_path / "cut" / "checkpoints") == kept
    for name in kept:
        one, other = (load_checkpoint(tmp_path / run / "checkpoints" / name) for run in ("whole", "cut"))
        assert all(torch.equal(one["state_dict"][key], tensor) for key, tensor in other["state_dict"].items())


def test_a_run_goes_back_to_a_best_round_also_if_it_ends_at_once(tmp_path, monkeypatch):
    fit(tmp_path, 4, checkpointing=Checkpointing(monitor="train_loss", save_top_k=-1))
    whole = rows(tmp_path)

    def power_cut(*arguments):
        raise RuntimeError("power cut")

    monkeypatch.setattr(FederatedLoop, "_round", power_cut)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(tmp_path, 4, ckpt_path=tmp_path / "checkpoints" / "round=2.ckpt")
    monkeypatch.undo()
    assert rows(tmp_path) == whole[:3]
    fit(tmp_path, 4, ckpt_path="last")
    assert rows(tmp_path) == whole


def test_a_monitored_number_that_no_round_has_is_named_after_the_first(tmp_path):
    with pytest.raises(ValueError, match="expected 'val_los', which is monitored, among a round's numbers, got bound_"):
        fit(tmp_path, 4, checkpointing=Checkpointing(monitor="val_los"))
    assert [record.round for record in read_history(tmp_path / "history.jsonl")] == [0, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every_n_rounds": 0}, "expected a checkpoint every 1 or more rounds, got every_n_rounds=0"),
        ({"monitor": "loss", "mode": "best"}, "expected mode 'min' or 'max', got 'best'"),
        ({"monitor": "loss", "save_top_k": 0}, "expected save_top_k of at least 1, or -1 for all, got 0"),
        ({"save_top_k": 2}, "expected monitor, by which rounds are compared, with save_top_k=2, got none"),
    ],
)
def test_bad_checkpointing(arguments, message):
    with pytest.raises(ValueError, match=message):
        Checkpointing(**arguments)


def test_checkpointing_is_an_object():
    with pytest.raises(TypeError, match=r"expected checkpointing of type Checkpointing, such as .*, got int"):
        FederatedLoop(1, 1, checkpointing=5)


# -- one at a time -----------------------------------------------------------------------------------------------------


def test_a_folder_holds_one_run_at_a_time(tmp_path):
    with locked(tmp_path):
        with pytest.raises(RuntimeError, match=f"one run at a time in {tmp_path}, found process {os.getpid()} at work"):
            fit(tmp_path)
        # nor did the attempt let go of it
        assert "found process" in in_another_process(tmp_path)
    assert in_another_process(tmp_path) == ""
    fit(tmp_path)


def in_another_process(folder):
    script = "import sys; from pathlib import Path; from lightning_fedsparse.locking import locked\nwith locked(Path(sys.argv[1])): pass"
    done = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True, check=False)
    return done.stderr


@pytest.mark.slow
def test_the_lock_goes_with_a_killed_process_even_if_its_children_stay(tmp_path):
    script = textwrap.dedent("""
        import os, sys, time
        from pathlib import Path
        from lightning_fedsparse.locking import locked
        with locked(Path(sys.argv[1])):
            if os.fork():
                print("locked", flush=True)
            time.sleep(30)
    """)
    with subprocess.Popen(
        [sys.executable, "-c", script, tmp_path], stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        try:
            assert process.stdout.readline() == b"locked\n"
            with pytest.raises(RuntimeError, match=f"found process {process.pid} at work"), locked(tmp_path):
                pass
            process.kill()
            process.wait()
            with locked(tmp_path):
                pass
        finally:
            os.killpg(process.pid, 9)


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
