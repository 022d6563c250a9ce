"""Federations over several processes: the same result, no memory lost, no endless wait."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_fedsparse import FederatedLoop
from lightning_fedsparse.aggregation import Aggregator
from lightning_fedsparse.callbacks.base import SparsityCallback
from lightning_fedsparse.cli import main
from lightning_fedsparse.failures import RankLostError
from lightning_fedsparse.rank_rules import with_own_device
from lightning_fedsparse.records import read_history
from lightning_fedsparse.screening import Screen
from tests.rank_runs import ROUNDS, fit
from tests.test_loop import QUIET, Net, clients, loaders

REPOSITORY = Path(__file__).parents[1]
SCENARIOS = [
    "dense",
    "feddip",
    "feddip-levels",
    "sparsyfed",
    "fiarse",
    "moving",
    "fixed",
    "gradient",
    "spilled",
    "failing",
    "choosing",
]


def python(*arguments, cwd=REPOSITORY, timeout=120, **variables):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), **variables}
    if any(name == "lo" for _, name in socket.if_nameindex()):
        environment["GLOO_SOCKET_IFNAME"] = "lo"  # the machine's own name may lead nowhere
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )


def ranks_run(folder, size, *names, **variables):
    """What each scenario has led to, by rank, and how the ranks ended."""
    # by import: a checkpoint has the name of the module that a callback comes from
    start = f"import pathlib, tests.rank_runs as runs; runs.start(pathlib.Path({str(folder)!r}), {size}, {[*names]})"
    done = python("-c", start, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {name: [folder / f"{name}-{rank}.pt" for rank in range(size)] for name in names}
    return {
        name: [torch.load(path, weights_only=False) for path in paths if path.exists()] for name, paths in found.items()
    }, done.stdout.split()


@pytest.fixture
def launched(monkeypatch):
    """The environment of one of several ranks, of which the others never come."""

    def launch(size, **others):
        names = {"WORLD_SIZE": size, "RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1, **others}
        for name, value in names.items():
            monkeypatch.setenv(name, str(value))

    return launch


# -- whole federations -------------------------------------------------------------------------------------------------


def assert_same(found, expected):
    """Weights to 1e-6, masks and records equal; of numbers in the records that are no counts 1e-6 is enough."""
    for name, tensor in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], tensor, rtol=1e-6, atol=1e-6)
    assert found["masks"].keys() == expected["masks"].keys()
    for name, mask in expected["masks"].items():
        assert (mask is None) == (found["masks"][name] is None)
        assert mask is None or torch.equal(found["masks"][name], mask)
    assert len(found["history"]) == len(expected["history"]) == ROUNDS + 1
    for row, own in zip(found["history"], expected["history"], strict=True):
        numbers = [{**one["metrics"], "train_loss": one["train_loss"] or 0.0} for one in (row, own)]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-6)
        rest = ("metrics", "train_loss", "failures")
        assert {key: row[key] for key in row if key not in rest} == {key: own[key] for key in own if key not in rest}
        assert {client: one.reason for client, one in row["failures"].items()} == {
            client: one.reason for client, one in own["failures"].items()
        }


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process finds, scenario by scenario."""
    found = {}

    def of(name):
        if name not in found:
            found[name] = fit(name, tmp_path_factory.mktemp("alone"))
        return found[name]

    return of


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:client memories need more")  # which is what the scenario is about
@pytest.mark.parametrize(
    ("size", "names"), [(2, SCENARIOS), (4, ["feddip", "sparsyfed", "fiarse", "spilled", "failing", "choosing"])]
)
def test_several_ranks_find_what_one_process_finds(tmp_path, alone, size, names):
    found, ends = ranks_run(tmp_path, size, *names)
    assert ends == ["0"] * size
    for name in names:
        for rank in range(size):
            assert_same(found[name][rank], alone(name))
            # to the bit, times included, what the first rank has
            assert found[name][rank]["history"] == found[name][0]["history"]
            assert all(torch.equal(t, found[name][0]["weights"][n]) for n, t in found[name][rank]["weights"].items())
    held = [one["memories"] for one in found["feddip"]]
    assert sorted(client for part in held for client in part) == alone("feddip")["memories"]
    assert all(held)  # each rank has some, and nobody is with two
    assert [one["memories"] for one in found["spilled"]] == [alone("spilled")["memories"]] * size
    assert sum(len(record["evicted_memories"]) for record in alone("spilled")["history"]) > 0
    for name in ("failing", "choosing"):
        assert len({one.reason for row in alone(name)["history"] for one in row["failures"].values()}) > 2
    assert any(row["tries"] > 1 for row in alone("failing")["history"])
    assert any(row["skipped"] for row in alone("choosing")["history"])
    assert any(row["clients_unused"] for row in alone("choosing")["history"])


@pytest.mark.slow
def test_a_rank_that_hangs_drifts_or_dies_ends_the_run_with_a_sentence(tmp_path):
    found, ends = ranks_run(tmp_path, 2, "hung", "drifting", "lost")
    assert ends == ["0", "-9"]
    silent, late = found["hung"]
    assert silent.startswith(
        "RankLostError: expected all 2 ranks in round 2, but rank 1 was not heard of for 5 seconds: start the"
    )
    assert late.startswith("RankLostError: expected all 2 ranks in round 2, but ")
    drifted = (
        "RuntimeError: expected the same weights and masks on every rank, got others in round 1 on rank 1: start the same "
        "script or recipe on all, with the same versions of everything and on the same kind of processor"
    )
    assert found["drifting"] == [drifted, drifted]
    (survivor,) = found["lost"]
    assert survivor == (
        "RankLostError: expected all 2 ranks in round 3, but rank 1 ended: start the job again to go on from the last "
        "checkpoint, as torchrun --max-restarts does by itself"
    )
    # what the two have left goes on in one process, and in three, with what all clients remember
    history = [{**vars(record), "seconds": 0} for record in read_history(tmp_path / "lost-run" / "history.jsonl")]
    assert [row["round"] for row in history] == [0, 1, 2]
    shutil.copytree(tmp_path / "lost-run", tmp_path / "alone" / "lost-run")
    whole = fit("resumed", tmp_path / "whole")
    assert_same(fit("lost", tmp_path / "alone"), whole)
    again, ends = ranks_run(tmp_path, 3, "lost", TORCHELASTIC_RESTART_COUNT="1")
    assert ends == ["0"] * 3
    for one in again["lost"]:
        assert_same(one, whole)


RECIPE = """\
# a federation whose second process is killed in its second round
base: quickstart
loop:
  callbacks:
    - class_path: tests.rank_runs.Dies
      init_args: {index: 1, rank: 1}
    - class_path: lightning_fedsparse.callbacks.CompressionMemory
  rounds: 3
"""


@pytest.mark.slow
def test_torchrun_starts_a_recipe_again_where_it_was(tmp_path, monkeypatch):
    (tmp_path / "dying.yaml").write_text(RECIPE)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1")
    command = (
        "-m",
        "lightning_fedsparse",
        "run",
        "dying.yaml",
        "--loop.default_root_dir=out",
        "--loop.rank_timeout=60",
    )
    done = python(*torchrun, *command, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("going on after round 1 of 3") == 1  # the first rank speaks for all
    assert done.stdout.count("saved in out") == 1
    monkeypatch.chdir(tmp_path)
    assert main(["run", "dying.yaml", "--loop.default_root_dir=alone"]) == 0
    found, expected = (read_history(tmp_path / folder / "history.jsonl") for folder in ("out", "alone"))
    assert [row.round for row in found] == [0, 1, 2, 3]
    for row, own in zip(found, expected, strict=True):
        assert row.metrics == pytest.approx(own.metrics, rel=1e-5)
        assert (row.bytes_up, row.bytes_down) == (own.bytes_up, own.bytes_down)


# -- what can't be run by several ranks --------------------------------------------------------------------------------


def refused(**arguments):
    loop = FederatedLoop(1, 4, console=False, evaluation=QUIET, **arguments)
    loop.fit(Net(), loaders(clients()))


def test_more_ranks_than_clients_per_round_are_refused(launched):
    launched(5)
    with pytest.raises(ValueError, match="expected at most as many ranks as clients per round, got 5 for 4 clients"):
        refused()


def test_a_screen_is_refused(launched):
    launched(2)
    with pytest.raises(ValueError, match="expected no screen with 2 ranks, got Screen"):
        refused(screen=Screen(norm=5.0))


class Median(Aggregator):
    def start(self, template):
        pass

    def add(self, update):
        pass

    def result(self):
        return {}


class Counts(SparsityCallback):
    def on_server_receive(self, state, server_round, update):
        pass


def test_what_adds_up_in_one_process_only_is_refused(launched):
    launched(2)
    with pytest.raises(
        TypeError, match=r"expected an aggregator that overrides reduce\(ranks\), for 2 ranks, got Median"
    ):
        refused(aggregator=Median())
    with pytest.raises(
        TypeError, match="that override on_server_received beside on_server_receive, for 2 ranks, got Counts"
    ):
        refused(callbacks=[Counts()])


def test_an_environment_that_says_half_is_refused(launched, monkeypatch):
    launched(2)
    monkeypatch.delenv("MASTER_ADDR")
    with pytest.raises(
        ValueError, match="expected RANK, MASTER_ADDR, MASTER_PORT in the environment beside WORLD_SIZE=2"
    ):
        refused()


@pytest.mark.parametrize("seconds", [0, -1.0, float("inf"), float("nan")])
def test_every_wait_has_a_limit(seconds):
    with pytest.raises(ValueError, match=f"expected a rank_timeout above 0 seconds, got {seconds}"):
        refused(rank_timeout=seconds)


def test_ranks_that_do_not_come_are_waited_for_no_longer_than_said(launched, free_port):
    launched(2, MASTER_PORT=free_port)
    with pytest.raises(RankLostError, match="expected 2 ranks to meet at 127.0.0.1:.* within 1 seconds, got not all"):
        refused(rank_timeout=1)


@pytest.fixture
def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"accelerator": "gpu", "devices": [1]}),
        ({"devices": 1, "precision": 16}, {"accelerator": "gpu", "devices": [1], "precision": 16}),
        ({"devices": [0]}, {"devices": [0]}),
        ({"accelerator": "cpu"}, {"accelerator": "cpu"}),
    ],
)
def test_a_rank_has_a_gpu_of_its_own(launched, monkeypatch, given, expected):
    launched(8, RANK=5, LOCAL_RANK=3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert with_own_device(given) == expected


def test_without_ranks_or_without_gpus_the_trainer_is_as_it_was(launched, monkeypatch):
    assert with_own_device({"devices": 1}) == {"devices": 1}
    launched(2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert with_own_device({"devices": 1}) == {"devices": 1}


# -- the command -------------------------------------------------------------------------------------------------------


def test_a_restart_has_to_find_the_folder(monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert main(["run", "quickstart"]) == 2
    expected = (
        "expected the run folder with torchrun --max-restarts, for a restart to find it, got none: add --loop.default_"
    )
    assert capsys.readouterr().err.startswith(f"error: {expected}")


def test_an_error_says_whose_it_is(launched, capsys):
    launched(2, RANK=1)
    assert main(["run", "quickstarf"]) == 2
    assert capsys.readouterr().err.startswith("error on rank 1: unknown recipe 'quickstarf'")


def test_a_restarted_process_goes_on_and_any_other_needs_an_empty_folder(tmp_path, monkeypatch):
    def run(rounds):
        torch.manual_seed(0)
        loop = FederatedLoop(rounds, 2, console=False, evaluation=QUIET, default_root_dir=tmp_path / "run")
        return loop.fit(Net(), loaders(clients()))

    run(1)
    with pytest.raises(ValueError, match="expected an empty run folder, found a run"):
        run(2)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert [record.round for record in run(2)] == [0, 1, 2]
