"""Worker processes: the result of one process to the bit, whatever happens to the workers."""

import os
import signal
import time
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.profilers import PassThroughProfiler
from torch.utils.data import DataLoader

from lightning_fedsparse import FederatedDataModule, FederatedLoop
from lightning_fedsparse.callbacks import SparsityCallback, feddip, fiarse
from lightning_fedsparse.capacities import CapacityShares
from lightning_fedsparse.datasets import OptdigitsDataModule
from lightning_fedsparse.executors import LocalExecutor, ProcessExecutor
from lightning_fedsparse.executors.sharing import SharedUpdate
from lightning_fedsparse.failures import FailureReason, TooFewClientsError
from lightning_fedsparse.faults import FaultPolicy
from lightning_fedsparse.models import DigitsCNN, ImageClassifier
from lightning_fedsparse.partition import DirichletPartition
from lightning_fedsparse.screening import Screen
from lightning_fedsparse.testing import Fault, FaultyExecutor, ListedFaults, RandomFaults
from lightning_fedsparse.update import MaskSet, SparseUpdate
from tests.test_loop import QUIET, Net, clients, loaders


class Dying(Net):
    """Does something to its process in the first training step that finds the file."""

    def __init__(self, trap, deed):
        super().__init__()
        self.trap = trap
        self.deed = deed

    def training_step(self, batch, batch_idx):
        if Path(self.trap).exists():
            self.deed(Path(self.trap))
        return super().training_step(batch, batch_idx)


def killed_once(trap):
    trap.unlink()
    os.kill(os.getpid(), signal.SIGKILL)


def killed(trap):
    os.kill(os.getpid(), signal.SIGKILL)


def hung(trap):
    time.sleep(1000)


class UnsendableError(RuntimeError):
    def __init__(self, number, what):
        super().__init__(f"{what} {number}")


def raising(trap):
    raise UnsendableError(7, "no such file as part")


def run(
    executor=None,
    callbacks=None,
    *,
    model=None,
    data=None,
    rounds=2,
    per_round=3,
    trainer=None,
    faults=None,
    screen=None,
):
    torch.manual_seed(0)
    model = model or Net()
    loop = FederatedLoop(
        rounds,
        per_round,
        callbacks,
        {"max_epochs": 1, **(trainer or {})},
        executor=executor,
        faults=faults,
        screen=screen,
        evaluation=QUIET,
        console=False,
    )
    history = loop.fit(model, data or loaders(clients()))
    rows = [(r.train_loss, r.bytes_up, r.bytes_down, r.sparsity, sorted(r.clients)) for r in history]
    return rows, {name: tensor.clone() for name, tensor in model.state_dict().items()}, loop


def assert_same(found, expected):
    assert found[0] == expected[0]
    assert all(torch.equal(found[1][name], expected[1][name]) for name in expected[1])


def unequal():
    data = OptdigitsDataModule(batch_size=64)
    capacities = CapacityShares({1.0: 0.25, 0.25: 0.5, 0.0625: 0.25})
    return FederatedDataModule(data, DirichletPartition(8, alpha=0.5, min_examples=20), capacities=capacities)


@pytest.mark.slow
def test_two_workers_are_one_process_to_the_bit():
    executor = ProcessExecutor(2, pin=True)
    memory = {"callbacks": feddip(0.8, reconfigure_every=1, residual="keep"), "rounds": 3}
    found = run(executor, **memory)
    assert_same(found, run(None, **memory))
    assert executor._processes == []  # none outlives the run
    memories = found[2]._run.federation.memories
    assert memories
    assert not any(
        value.is_shared()
        for memory in memories.values()
        for state in memory.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )


@pytest.mark.slow
def test_clients_of_different_size_in_workers():
    def arguments():
        return {"callbacks": fiarse(), "model": ImageClassifier(DigitsCNN()), "data": unequal(), "per_round": 6}

    torch.manual_seed(0)
    found = run(ProcessExecutor(2), **arguments())
    torch.manual_seed(0)
    assert_same(found, run(None, **arguments()))


@pytest.mark.slow
def test_a_worker_that_is_killed_is_replaced_and_its_client_runs_again(tmp_path):
    trap = tmp_path / "trap"
    trap.touch()
    expected = run(None, model=Net())
    assert_same(run(ProcessExecutor(2), model=Dying(str(trap), killed_once)), expected)
    assert not trap.exists()


class OfOneClient(SparsityCallback):
    """Does something to the process of one client's training."""

    def __init__(self, deed):
        self.deed = deed

    def on_train_batch_start(self, *args):
        if self.client_round.client_id == "c1":
            self.deed(None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("deed", "limits", "reason", "words"),
    [
        (
            killed,
            {},
            FailureReason.WORKER_DIED,
            "to run client 'c1' in round 1, 3 workers died in it, the last with exit code -9",
        ),
        (
            hung,
            {"timeout": 6.0},
            FailureReason.TIMED_OUT,
            "client 'c1' in round 1 to take at most 6 seconds, its worker was ended",
        ),
        (
            hung,
            {"deadline": 6.0},
            FailureReason.LATE,
            "client 'c1' in round 1 to take at most 6 seconds, its worker was ended",
        ),
    ],
    ids=["killed", "hung", "late"],
)
def test_a_client_that_kills_or_hangs_its_workers_fails_and_the_others_go_on(deed, limits, reason, words):
    executor = ProcessExecutor(1, timeout=limits.get("timeout", 60.0))
    faults = FaultPolicy(deadline=limits.get("deadline"))
    found = run(executor, [OfOneClient(deed)], rounds=1, per_round=6, faults=faults)
    record = found[2].history[1]
    assert {name: failure.reason for name, failure in record.failures.items()} == {"c1": reason}
    assert words in record.failures["c1"].sentence
    expected = run(FaultyExecutor(LocalExecutor(), ListedFaults({(0, "c1"): Fault.DROPPED})), rounds=1, per_round=6)
    assert found[1].keys() == expected[1].keys()
    assert all(torch.equal(tensor, expected[1][name]) for name, tensor in found[1].items())


@pytest.mark.slow
def test_what_all_clients_raise_arrives_and_ends_the_run(tmp_path):
    trap = tmp_path / "trap"
    trap.touch()
    with pytest.raises(TooFewClientsError, match="UnsendableError: no such file as part 7") as caught:
        run(ProcessExecutor(1), model=Dying(str(trap), raising))
    error = caught.value.__cause__
    assert str(error) == "UnsendableError: no such file as part 7"
    assert "in training_step" in str(error.__cause__)  # where it was raised


@pytest.mark.slow
def test_faults_are_those_of_one_process_whatever_the_number_of_workers():
    def faulty(executor):
        return FaultyExecutor(executor, RandomFaults(0.4, seed=2))

    arguments = {
        "callbacks": feddip(0.8, reconfigure_every=1, residual="keep"),
        "faults": FaultPolicy(min_clients=3, tries=2, deadline=1000, when_fewer="skip"),
        "screen": Screen(norm=20.0),
        "rounds": 5,
        "per_round": 5,
    }
    one, two = run(faulty(LocalExecutor()), **arguments), run(faulty(ProcessExecutor(2)), **arguments)
    assert_same(two, one)
    failures = [record.failures for record in one[2].history]
    assert [record.failures for record in two[2].history] == failures
    assert sum(map(len, failures)) > 5


@pytest.mark.parametrize(
    ("what", "arguments"),
    [
        ("the model", lambda: {"model": Dying("", lambda trap: None)}),
        ("the data", lambda: {"data": FederatedDataModule({"c0": DataLoader([1], collate_fn=lambda batch: batch)})}),
        ("callbacks", lambda: {"callbacks": [_WithLambda()]}),
        ("the Trainer's arguments", lambda: {"trainer": {"profiler": Unpicklable()}}),
    ],
)
def test_what_cannot_be_sent(what, arguments):
    with pytest.raises(
        ValueError, match=f"^expected {what} to be sent to worker processes, got what can't be pickled: "
    ):
        run(ProcessExecutor(1), per_round=1, **arguments())


class Unpicklable(PassThroughProfiler):
    def __reduce__(self):
        raise TypeError("a handle of the system")


class _WithLambda(pl.Callback):
    def __init__(self):
        self.function = None

    def __deepcopy__(self, memo):
        return self

    def __reduce__(self):
        raise TypeError("a handle of the system")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"workers": 0}, "expected workers to be at least 1, got 0"),
        ({"timeout": 0.0}, "expected timeout above 0 seconds, got 0.0"),
        ({"start_timeout": -1.0}, "expected start_timeout above 0 seconds, got -1.0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ProcessExecutor(**arguments)


def test_more_workers_than_clients():
    with pytest.raises(
        ValueError, match="^expected at most as many workers as clients per round, got 4 for 3 clients: "
    ):
        FederatedLoop(1, 3, executor=ProcessExecutor(4), console=False)


def test_an_update_in_shared_memory_is_the_update():
    masks = MaskSet.of(
        {"a": torch.tensor([[True, False], [False, True]]), "b": None, "c": torch.zeros(2, dtype=torch.bool)}
    )
    update = SparseUpdate(
        {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[3.0]]), "c": torch.zeros(0)},
        masks,
        num_examples=7,
        absent="zero",
        buffers={"n": torch.tensor(5), "mean": torch.tensor([0.5])},
        mask_id=masks.id,
    )
    shared = SharedUpdate.of(update)
    assert all(block.is_shared() for block in shared.blocks.values())
    found = shared.open()
    assert isinstance(found.masks, MaskSet)
    assert found.masks.id == masks.id
    assert list(found.masks) == list(masks)
    for name, value in update.values.items():
        assert torch.equal(found.values[name], value)
        mask = masks[name]
        assert found.masks[name] is None if mask is None else torch.equal(found.masks[name], mask)
    assert torch.equal(found.buffers["n"], torch.tensor(5))
    assert (found.num_examples, found.absent, found.mask_id) == (7, "zero", masks.id)
