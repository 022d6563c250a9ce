"""Runs whose clients fail, and what there is to compare about them."""

import copy

import torch

from lightning_fedsparse import FederatedLoop
from lightning_fedsparse.callbacks import SparsityCallback, feddip
from lightning_fedsparse.executors import LocalExecutor
from lightning_fedsparse.testing import FaultyExecutor, ListedFaults
from tests.test_loop import QUIET, Net, clients, loaders

ROUNDS = range(20)


def always(client_id, fault):
    return {(index, client_id): fault for index in ROUNDS}


def run(plan=None, callbacks=None, *, rounds=3, per_round=4, data=None, model=None, fit=True, **arguments):
    torch.manual_seed(0)
    model = model or Net()
    executor = None if plan is None else FaultyExecutor(LocalExecutor(), ListedFaults(plan))
    arguments.setdefault("executor", executor)
    arguments.setdefault("evaluation", QUIET)
    loop = FederatedLoop(rounds, per_round, callbacks, console=False, **arguments)
    if fit:
        loop.fit(model, data or loaders(clients()))
    return loop


def weights(loop):
    return {**loop.state.tensors, "masks": loop.state.masks.id}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, dict):
            assert_same(found[name], value)
        elif isinstance(value, torch.Tensor):
            assert torch.equal(found[name], value), name
        else:
            assert found[name] == value, name


def memories(loop):
    return loop._run.federation.state_dict()["memories"]


def reasons(loop):
    return [{name: failure.reason for name, failure in record.failures.items()} for record in loop.history[1:]]


def moving(**arguments):
    return feddip(0.8, 0.3, reconfigure_every=1, residual="keep", **arguments)


class Watch(SparsityCallback):
    """Keeps what the server has at the end of every round that counts."""

    loop = None  # of the class, as are the lists: clients get deep copies of the callback
    kept = []
    received = []

    def on_server_receive(self, state, server_round, update):
        Watch.received.append(server_round.index)

    def on_server_round_end(self, state, server_round):
        Watch.kept.append(snapshot(Watch.loop))
        return state


def snapshot(loop):
    return copy.deepcopy(loop._run.federation.state_dict())


def watched(plan, **options):
    Watch.kept, Watch.received = [], []
    Watch.loop = run(plan, [*moving(), Watch()], fit=False, **options)
    torch.manual_seed(0)
    Watch.loop.fit(Net(), loaders(clients()))
    return Watch.loop, Watch.kept[:1]


class Trap(SparsityCallback):
    """Raises in one client's rounds, at one of its hooks."""

    def __init__(self, hook, client_id="c3", error=ValueError):
        self.hook, self.client_id, self.error = hook, client_id, error

    def _spring(self, hook):
        if hook == self.hook and self.client_round is not None and self.client_round.client_id == self.client_id:
            raise self.error("sprung")

    def on_client_round_start(self, *args):
        self._spring("round start")

    def on_fit_start(self, *args):
        self._spring("fit start")

    def on_train_batch_start(self, *args):
        self._spring("batch start")

    def on_after_backward(self, *args):
        self._spring("backward")

    def on_validation_batch_start(self, *args):
        self._spring("validation")

    def on_train_end(self, *args):
        self._spring("train end")

    def on_client_round_end(self, trainer, pl_module, update):
        self._spring("round end")
        return update
