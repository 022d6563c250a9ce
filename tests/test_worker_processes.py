"""What goes between this process and its workers: loaders' own workers, what can't be loaded there, what can't come back."""

import os
import signal

import pytest
from torch.utils.data import DataLoader

from lightning_fedsparse import FederatedDataModule
from lightning_fedsparse.bounded_reading import PayloadError
from lightning_fedsparse.callbacks import SparsityCallback
from lightning_fedsparse.client import ClientWorker
from lightning_fedsparse.executors import LocalExecutor, ProcessExecutor
from lightning_fedsparse.executors.worker_process import ClientTask
from lightning_fedsparse.failures import TooFewClientsError
from tests.failing_clients import assert_same, run, weights
from tests.test_loop import Net, clients

pytestmark = pytest.mark.slow


def one_worker():
    return ProcessExecutor(1)


def test_loaders_in_a_worker_may_have_workers_of_their_own():
    def data():
        return FederatedDataModule({"c0": DataLoader(clients()["c0"], batch_size=8, shuffle=True, num_workers=1)})

    found, expected = (
        run(data=data(), per_round=1, rounds=2, executor=executor) for executor in (one_worker(), LocalExecutor())
    )
    assert not any(record.failures for record in found.history)
    assert_same(weights(found), weights(expected))


class LoadedBy(Net):
    """Arrives as a call of a function."""

    def __init__(self, function, argument):
        super().__init__()
        self.call = function, (argument,)

    def __reduce__(self):
        return self.call


def kill_myself(number):
    os.kill(os.getpid(), number)


def not_there(name):
    raise AttributeError(f"Can't get attribute {name!r} on <module '__main__'>")


@pytest.mark.parametrize(
    ("model", "kind", "message"),
    [
        (
            LoadedBy(not_there, "Mine"),
            ValueError,
            "that it was sent, got AttributeError: Can't get attribute 'Mine' on <module '__main__'>; their classes must be in",
        ),
        (
            LoadedBy(os._exit, 1),
            RuntimeError,
            "to start, it ended with exit code 1: a script that starts workers must do so under `if __name__ == ",
        ),
        (
            LoadedBy(kill_myself, signal.SIGKILL),
            RuntimeError,
            "to start, it ended with exit code -9: the system ends processes that need more memory than there is$",
        ),
    ],
    ids=["unknown class", "exit", "killed"],
)
def test_a_worker_that_does_not_start(model, kind, message):
    with pytest.raises(kind, match="^expected a worker process .*" + message):
        run(model=model, per_round=1, rounds=1, executor=one_worker())


class RemembersAFunction(SparsityCallback):
    def client_state_dict(self):
        return {"function": lambda: None}


def test_a_memory_that_cannot_come_back():
    with pytest.raises(
        ValueError,
        match="^expected what client 'c[0-9]' remembers to be sent from its worker process, got what can't be pickled: ",
    ):
        run(callbacks=[RemembersAFunction()], per_round=1, rounds=1, executor=one_worker())


def unreadable(monkeypatch, *names):
    original = ClientWorker.receive

    def receive(self, job):
        if job.client_id in names:
            raise PayloadError("expected a broadcast that can be read")
        return original(self, job)

    monkeypatch.setattr(ClientWorker, "receive", receive)


@pytest.mark.parametrize("names", [("c0", "c1"), ("c2", "c5")])
def test_a_broadcast_that_cannot_be_read_costs_the_round_its_client_wherever_it_runs(names, monkeypatch):
    unreadable(monkeypatch, *names)
    found, expected = (run(per_round=6, rounds=2, executor=executor) for executor in (one_worker(), LocalExecutor()))
    assert_same(weights(found), weights(expected))
    assert [record.failures for record in found.history] == [record.failures for record in expected.history]
    assert {*found.history[1].failures} == {*names}


def test_without_any_broadcast_that_can_be_read_no_worker_starts(monkeypatch):
    unreadable(monkeypatch, *clients())
    monkeypatch.setattr("lightning_fedsparse.executors.processes.WorkerProcess", None)
    with pytest.raises(TooFewClientsError) as raised:
        run(executor=one_worker())
    assert isinstance(raised.value.__cause__, PayloadError)


def test_workers_that_take_too_long_to_start():
    with pytest.raises(RuntimeError, match="^expected a worker process to start within 0.01 seconds$"):
        run(per_round=1, rounds=1, executor=ProcessExecutor(1, start_timeout=0.01))


@pytest.mark.parametrize(
    ("environment", "cores"),
    [
        ({}, [1, 3]),
        ({"WORLD_SIZE": "3", "RANK": "0", "LOCAL_RANK": "0"}, [1, 3]),
        ({"WORLD_SIZE": "3", "RANK": "1", "LOCAL_RANK": "1"}, [5, 7]),
        ({"WORLD_SIZE": "3", "RANK": "2", "LOCAL_RANK": "2"}, [9, 1]),  # there are no more
        ({"WORLD_SIZE": "3", "RANK": "2", "LOCAL_RANK": "0"}, [1, 3]),  # of another machine
    ],
)
def test_workers_of_all_ranks_of_a_machine_are_kept_on_cores_of_their_own(environment, cores, monkeypatch):
    started = []

    class Started:
        task = None

        def __init__(self, pickled, core, timeout):
            started.append(core)

    monkeypatch.setattr("lightning_fedsparse.executors.processes.WorkerProcess", Started)
    monkeypatch.setattr("lightning_fedsparse.executors.processes.pickled", lambda worker: None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {1, 3, 5, 7, 9}, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    executor = ProcessExecutor(2, pin=True)
    executor._use(None)
    executor._start_for([ClientTask(None, None), ClientTask(None, None)])
    assert started == cores
