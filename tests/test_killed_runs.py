"""SIGKILL at every write, and at random moments: a run that goes on ends as if nothing had happened."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_fedsparse import FederatedLoop
from lightning_fedsparse.callbacks import SparsityCallback, feddip
from lightning_fedsparse.checkpoint import load_checkpoint
from lightning_fedsparse.evaluation import Evaluation
from tests.many_lives import ROUNDS
from tests.run_folders import names, rows
from tests.test_loop import Net, clients, loaders

REPOSITORY = Path(__file__).parents[1]


def python(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def same(one, other):
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.slow
def test_a_run_that_is_killed_before_each_write_ends_like_an_undisturbed_one(tmp_path):
    lives = int(python("-m", "tests.many_lives", tmp_path))
    assert lives > 20
    whole, killed = tmp_path / "whole", tmp_path / "lives"
    assert [row["round"] for row in rows(killed)] == list(range(ROUNDS + 1))
    assert rows(killed) == rows(whole)
    kept = names(whole / "checkpoints")
    assert len(kept) == 3
    assert names(killed / "checkpoints") == kept
    for name in kept:
        one, other = (load_checkpoint(run / "checkpoints" / name) for run in (whole, killed))
        assert one["memories"]
        assert one.pop("record").startswith(other.pop("record")[:20])  # times differ; the rows are compared above
        assert same(one, other)


@pytest.mark.slow
@pytest.mark.timeout(900)  # workers take long to start on a machine that has other work
@pytest.mark.parametrize(("recipe", "kills"), [("int8", 2), ("two workers", 1)])
def test_a_run_that_is_killed_at_random_ends_like_an_undisturbed_one(recipe, kills):
    out = python("docs/benchmarks/soak.py", "kill", f"--kills={kills}", "--rounds=2", "--only", recipe, "--print")
    assert "Segments of shared memory left behind: 0." in out


# -- long runs ---------------------------------------------------------------------------------------------------------


class Gauge(SparsityCallback):
    """What the process and the run folder hold after each round."""

    def __init__(self, folder):
        self.folder = folder
        self.files, self.memory, self.disk = [], [], []

    def on_server_round_end(self, state, server_round):
        self.files.append(len(os.listdir("/proc/self/fd")))
        self.memory.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
        self.disk.append(sum(path.stat().st_size for path in (self.folder / "checkpoints").iterdir()))
        return state


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_many_rounds_leave_open_files_memory_and_disk_flat(tmp_path):
    gauge = Gauge(tmp_path)
    methods = [*feddip(sparsity=0.8, reconfigure_every=5, residual="keep"), gauge]
    loop = FederatedLoop(120, 2, methods, evaluation=Evaluation(split="none"), default_root_dir=tmp_path, console=False)
    loop.fit(Net(), loaders(clients()))
    assert len({*gauge.files[1:]}) == 1
    assert gauge.memory[-1] - gauge.memory[30] < 4 * 2**20
    # every client has a residual by then
    assert max(gauge.disk[30:]) < 1.05 * min(gauge.disk[30:])
    assert names(tmp_path) == [".lock", "checkpoints", "history.jsonl"]
