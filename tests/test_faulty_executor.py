"""Faults on purpose: a run whose clients fail all the time completes, says what failed, and resumes to the bit."""

import json

import pytest
import torch

from lightning_fedsparse import FederatedLoop
from lightning_fedsparse.executors import LocalExecutor
from lightning_fedsparse.executors.local import Executor
from lightning_fedsparse.failures import FailureReason, TooFewClientsError
from lightning_fedsparse.faults import FaultPolicy
from lightning_fedsparse.screening import Screen
from lightning_fedsparse.testing import Fault, FaultyExecutor, InjectedError, RandomFaults
from tests.failing_clients import assert_same, memories, moving, run, weights
from tests.test_loop import QUIET, Net, clients, loaders

EXPECTED = {
    Fault.RAISES: FailureReason.EXCEPTION,
    Fault.OUT_OF_MEMORY: FailureReason.OUT_OF_MEMORY,
    Fault.DIES: FailureReason.WORKER_DIED,
    Fault.TIMES_OUT: FailureReason.TIMED_OUT,
    Fault.STRAGGLES: FailureReason.LATE,
    Fault.DROPPED: FailureReason.NO_UPLOAD,
    Fault.CORRUPTED: FailureReason.INVALID_UPLOAD,
    Fault.NOT_FINITE: FailureReason.INVALID_UPLOAD,
    Fault.NEXT_ROUND: FailureReason.NO_UPLOAD,
    Fault.EXPLODES: FailureReason.SCREENED,
}
MIXED = RandomFaults(0.3, seed=1, kinds=[*EXPECTED, Fault.TWICE])


def mixed(executor: Executor | None = None, *, rounds=20, root=None, ckpt_path=None):
    torch.manual_seed(0)
    loop = FederatedLoop(
        rounds,
        10,
        moving(),
        executor=FaultyExecutor(executor or LocalExecutor(), MIXED),
        faults=FaultPolicy(min_clients=8, tries=3, oversample=1, deadline=1000),
        screen=Screen(norm=20.0),
        evaluation=QUIET,
        default_root_dir=root,
        console=False,
    )
    loop.fit(Net(), loaders(clients(20)), ckpt_path=ckpt_path)
    return loop


def test_with_30_percent_of_client_rounds_failing_the_run_completes_and_reports_exactly_what_failed():
    loop = mixed()
    asked = failed = 0
    for record in loop.history[1:]:
        planned = {name: MIXED(record.round - 1, name) for name in record.clients}
        expected = {name: EXPECTED[fault] for name, fault in planned.items() if fault in EXPECTED}
        assert {name: failure.reason for name, failure in record.failures.items()} == expected
        assert record.clients_returned >= 8
        assert record.clients_sampled == record.clients_returned + record.clients_failed + record.clients_unused
        asked += record.clients_sampled
        failed += record.clients_failed
    assert 0.2 < failed / asked < 0.4
    assert {failure.reason for record in loop.history for failure in record.failures.values()} == set(EXPECTED.values())
    assert any(record.tries > 1 for record in loop.history)
    assert loop.history[-1].train_loss < loop.history[1].train_loss


def test_a_run_with_failures_resumes_to_the_bit(tmp_path):
    class Cut(LocalExecutor):
        def run(self, worker, jobs):
            for job in jobs:
                if job.index == 5:
                    raise RuntimeError("power cut")
                yield from super().run(worker, [job])

    whole = mixed(rounds=9, root=tmp_path / "whole")
    with pytest.raises(RuntimeError, match="power cut"):
        mixed(Cut(), rounds=9, root=tmp_path / "cut")
    resumed = mixed(rounds=9, root=tmp_path / "cut", ckpt_path="last")
    assert_same(weights(resumed), weights(whole))
    assert_same(memories(resumed), memories(whole))

    def rows(folder):
        lines = (folder / "history.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        # a result that came late was in the executor of the run that ended
        return [{k: v for k, v in row.items() if "seconds" not in k and k != "stray_results"} for row in rows]

    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")


def test_a_run_that_ended_goes_on_with_another_policy_but_not_with_another_screen(tmp_path):
    plan = {(1, name): Fault.DROPPED for name in clients()}
    with pytest.raises(TooFewClientsError, match="round 2"):
        run(plan, default_root_dir=tmp_path)
    other = run(plan, default_root_dir=tmp_path, screen=Screen(norm=2.0), fit=False)
    with pytest.raises(ValueError, match=r"got another: arguments.screen"):
        other.fit(Net(), loaders(clients()), ckpt_path="last")
    loop = run(plan, default_root_dir=tmp_path, faults=FaultPolicy(when_fewer="skip"), fit=False)
    loop.fit(Net(), loaders(clients()), ckpt_path="last")
    assert [record.skipped for record in loop.history] == [False, False, True, False]


def test_the_injected_error_says_where():
    with pytest.raises(TooFewClientsError) as caught:
        run({(0, name): Fault.RAISES for name in clients()})
    assert isinstance(caught.value.__cause__, InjectedError)


def test_random_faults_are_the_same_in_every_run_and_as_many_as_asked_for():
    plan, again = RandomFaults(0.25, seed=3), RandomFaults(0.25, seed=3)
    drawn = [plan(index, f"c{number}") for index in range(50) for number in range(40)]
    assert drawn == [again(index, f"c{number}") for index in range(50) for number in range(40)]
    failing = [fault for fault in drawn if fault is not None]
    assert 0.22 < len(failing) / len(drawn) < 0.28
    assert set(failing) == set(Fault)
    assert RandomFaults(0.0)(0, "c1") is None
