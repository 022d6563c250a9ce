"""How few clients are enough for a round, how many are asked, and how long it waits for them."""

import pytest
import torch

from lightning_fedsparse.failures import FailureReason, TooFewClientsError
from lightning_fedsparse.faults import FaultPolicy
from lightning_fedsparse.sampling import UniformSampling
from lightning_fedsparse.testing import Fault
from lightning_fedsparse.wire import Link, Wire
from tests.failing_clients import (
    Trap,
    Watch,
    always,
    assert_same,
    memories,
    moving,
    reasons,
    run,
    snapshot,
    watched,
    weights,
)
from tests.test_loop import Net, clients

# -- how few are enough ------------------------------------------------------------------------------------------------


def test_if_every_client_raises_the_run_ends_with_the_first_error_as_the_cause():
    class Wrong(Net):
        def training_step(self, batch, batch_idx):
            return self.no_such(batch)

    with pytest.raises(TooFewClientsError) as caught:
        run(model=Wrong())
    assert str(caught.value).startswith(
        "expected at least 1 of the 4 clients of round 1 to return, got 0 (4 exception); client 'c"
    )
    assert "AttributeError: 'Wrong' object has no attribute 'no_such'" in str(caught.value)
    assert isinstance(caught.value.__cause__, AttributeError)
    assert caught.value.__cause__.__traceback__ is not None


def test_a_program_that_is_wrong_is_not_skipped_round_by_round():
    with pytest.raises(TooFewClientsError, match="round 1"):
        run({(0, name): Fault.RAISES for name in clients()}, faults=FaultPolicy(when_fewer="skip"))
    loop = run({(1, name): Fault.RAISES for name in clients()}, faults=FaultPolicy(when_fewer="skip"))
    assert [record.skipped for record in loop.history] == [False, False, True, False]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_ctrl_c_and_exit_end_the_run(error):
    with pytest.raises(KeyboardInterrupt):
        run(None, [Trap("backward", error=error)], per_round=6)


def test_a_skipped_round_leaves_everything_as_it_was():
    plan = {(1, name): Fault.DROPPED for name in ("c0", "c1", "c2", "c3")}
    momentum = {"server_optimizer": lambda parameters: torch.optim.SGD(parameters, lr=1.0, momentum=0.9)}
    policy = FaultPolicy(min_clients=3, when_fewer="skip")
    loop, (first,) = watched(plan, rounds=2, per_round=6, faults=policy, **momentum)
    last = snapshot(loop)
    for name in ("state_dict", "masks", "methods", "optimizer", "memories"):
        assert_same(last[name], first[name])
    assert Watch.received == [0] * 6
    record = loop.history[2]
    assert (record.clients_sampled, record.clients_returned, record.clients_failed, record.clients_unused) == (
        6,
        0,
        4,
        2,
    )
    assert record.skipped
    assert record.bytes_up > 0  # the two that returned have sent


def test_too_few_clients_end_the_run_by_default():
    plan = {(1, name): Fault.OUT_OF_MEMORY for name in ("c0", "c1", "c2", "c3")}
    with pytest.raises(
        TooFewClientsError,
        match=r"expected at least 3 of the 6 clients of round 2 to return, got 2 \(4 out of memory\); client 'c\d': MemoryError",
    ):
        run(plan, per_round=6, faults=FaultPolicy(min_clients=3))


def test_waiting_for_enough_clients_changes_nothing():
    options = {"callbacks": moving(), "per_round": 5}
    assert_same(weights(run({}, faults=FaultPolicy(min_clients=5), **options)), weights(run({}, **options)))


def test_a_round_asks_others_until_enough_have_returned():
    first = UniformSampling().sample(list(clients()), 3, seed=0, round_index=0)
    plan = {(0, name): Fault.DROPPED for name in first[:2]}
    policy = FaultPolicy(min_clients=2, tries=3)
    loop = run(plan, rounds=2, per_round=3, faults=policy)
    record = loop.history[1]
    others = [name for name in record.clients if name not in first]
    assert record.tries == 2
    assert list(record.clients)[:3] == first
    assert len(others) == 2  # as many as are missing from three
    assert (record.clients_sampled, record.clients_returned, record.clients_failed) == (5, 3, 2)
    assert loop.history[2].tries == 1
    assert_same(weights(run(plan, rounds=2, per_round=3, faults=policy)), weights(loop))
    other_seed = run(plan, rounds=2, per_round=3, faults=policy, seed=7)
    assert not torch.equal(other_seed.state.weights["first.weight"], loop.state.weights["first.weight"])


def test_asking_ends_when_the_tries_or_the_clients_are_used_up():
    everyone = {(1, name): Fault.TIMES_OUT for name in clients()}
    with pytest.raises(TooFewClientsError, match="of the 4 clients of round 2 to return, got 0 after asking 2 times"):
        run(everyone, per_round=2, faults=FaultPolicy(tries=2))
    loop = run(everyone, per_round=2, faults=FaultPolicy(tries=5, when_fewer="skip"))
    assert (loop.history[2].clients_sampled, loop.history[2].tries) == (6, 3)
    assert loop.history[2].skipped
    with pytest.raises(TooFewClientsError, match="of the 6 clients of round 2 to return, got 0 after asking 3 times"):
        run(everyone, per_round=2, faults=FaultPolicy(tries=5))


# -- more than needed, and in time -------------------------------------------------------------------------------------


def test_over_sampling_without_failures_is_the_run_without_but_for_the_bytes():
    plain, more = run({}, moving()), run({}, moving(), faults=FaultPolicy(oversample=2))
    assert_same(weights(more), weights(plain))
    assert_same(memories(more), memories(plain))
    for one, other in zip(plain.history[1:], more.history[1:], strict=True):
        assert (other.clients_sampled, other.clients_returned, other.clients_unused) == (6, 4, 2)
        assert other.accept == "sampled"
        assert other.bytes_down > one.bytes_down
        assert other.bytes_up > one.bytes_up
        assert other.train_loss == one.train_loss


def test_clients_asked_beyond_stand_in_for_those_that_fail():
    first = UniformSampling().sample(list(clients()), 4, seed=0, round_index=0)
    loop = run({(0, first[1]): Fault.RAISES}, rounds=1, faults=FaultPolicy(oversample=2))
    record = loop.history[1]
    assert (record.clients_returned, record.clients_failed, record.clients_unused) == (4, 1, 1)
    assert list(record.failures) == [first[1]]


def test_the_first_to_come_are_merged_in_the_order_asked():
    first = UniformSampling().sample(list(clients()), 4, seed=0, round_index=0)
    plan = {(0, name): Fault.STRAGGLES for name in first[:2]}
    loop = run(plan, rounds=1, faults=FaultPolicy(oversample=2, accept="first"))
    record = loop.history[1]
    assert (record.accept, record.clients_returned, record.clients_unused, record.clients_failed) == ("first", 4, 2, 0)
    dropped = run(dict.fromkeys(plan, Fault.DROPPED), rounds=1, faults=FaultPolicy(oversample=2))
    assert_same(weights(loop), weights(dropped))


def test_who_takes_longer_than_the_deadline_is_late_and_its_transfer_counts():
    loop = run(always("c3", Fault.STRAGGLES), per_round=6, faults=FaultPolicy(deadline=1000))
    assert reasons(loop) == [{"c3": FailureReason.LATE}] * 3
    assert "expected its upload within 1000 seconds, it took 360" in loop.history[1].failures["c3"].sentence
    assert loop.history[1].clients["c3"].up is not None  # its bytes came, if too late
    slow = Wire(link=Link(up_mbps=1), links={"c1": Link(up_mbps=1e-9)})
    loop = run({}, per_round=6, wire=slow, faults=FaultPolicy(deadline=1000))
    assert reasons(loop) == [{"c1": FailureReason.LATE}] * 3


def test_results_that_nobody_waits_for_are_counted_and_ignored():
    plan = {(0, "c1"): Fault.TWICE, (0, "c2"): Fault.NEXT_ROUND}
    loop = run(plan, per_round=6)
    assert [record.stray_results for record in loop.history] == [0, 1, 1, 0]
    assert reasons(loop) == [{"c2": FailureReason.NO_UPLOAD}, {}, {}]
    assert_same(weights(loop), weights(run({(0, "c2"): Fault.DROPPED}, per_round=6)))


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_clients": 0}, "expected min_clients to be at least 1, got 0"),
        ({"tries": 0}, "expected tries to be at least 1, got 0"),
        ({"oversample": -1}, "expected oversample to be at least 0, got -1"),
        ({"when_fewer": "retry"}, "expected when_fewer to be 'stop' or 'skip', got 'retry'"),
        ({"accept": "last"}, r"expected accept to be one of \('sampled', 'first'\), got 'last'"),
        ({"deadline": 0.0}, "expected a deadline above 0 seconds, got 0.0"),
    ],
)
def test_bad_policies(arguments, message):
    with pytest.raises(ValueError, match=message):
        FaultPolicy(**arguments)


def test_a_policy_that_does_not_fit_the_federation():
    with pytest.raises(ValueError, match="expected min_clients of at most 4, the clients per round, got 5"):
        run(faults=FaultPolicy(min_clients=5))
    with pytest.raises(
        ValueError, match="expected at most 6 clients per round, as many as there are, got 4 and oversample=3"
    ):
        run(faults=FaultPolicy(oversample=3))
    with pytest.raises(ValueError, match="expected tries=1 where a round asks all 6 clients, got 2"):
        run(faults=FaultPolicy(tries=2), per_round=6)
    with pytest.raises(TypeError, match="expected faults of type FaultPolicy"):
        run(faults={"min_clients": 2})
    with pytest.raises(TypeError, match="expected screen of type Screen"):
        run(screen=3.0)
