"""Clients that fail: what a round makes of it, and that nothing of a failed client is left anywhere."""

import copy
import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_fedsparse import FederatedDataModule, FederatedLoop
from lightning_fedsparse.callbacks import SparsityCallback, feddip, fiarse, sparsyfed
from lightning_fedsparse.executors import LocalExecutor
from lightning_fedsparse.executors.local import Executor
from lightning_fedsparse.failures import ClientFailure, FailureReason, TooFewClientsError, failure_of
from lightning_fedsparse.faults import FaultPolicy
from lightning_fedsparse.payload import encode
from lightning_fedsparse.records import RoundRecord
from lightning_fedsparse.sampling import UniformSampling
from lightning_fedsparse.screening import Screen
from lightning_fedsparse.testing import Fault, FaultyExecutor, InjectedError, ListedFaults, RandomFaults
from lightning_fedsparse.update import SparseUpdate
from lightning_fedsparse.wire import Link, Wire
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
    return loop._federation.state_dict()["memories"]


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
    return copy.deepcopy(loop._federation.state_dict())


def watched(plan, **options):
    Watch.kept, Watch.received = [], []
    Watch.loop = run(plan, [*moving(), Watch()], fit=False, **options)
    torch.manual_seed(0)
    Watch.loop.fit(Net(), loaders(clients()))
    return Watch.loop, Watch.kept[:1]


# -- what a failed client leaves behind --------------------------------------------------------------------------------


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


class Validated(FederatedDataModule):
    """Every client validates on its own training data."""

    def client(self, client_id):
        return replace(super().client(client_id), val=lambda: DataLoader(clients()[client_id], batch_size=8))


HOOKS = ["round start", "fit start", "batch start", "backward", "validation", "train end", "round end"]


@pytest.mark.parametrize("hook", HOOKS)
def test_wherever_a_client_raises_the_others_go_on_as_if_its_upload_were_lost(hook):
    def methods(trap):
        return [*moving(), Trap(trap)]

    def data():
        return Validated({name: DataLoader(part, batch_size=8, shuffle=True) for name, part in clients().items()})

    trainer = {"max_epochs": 1, "limit_val_batches": 1.0}
    lost = run(always("c3", Fault.DROPPED), methods(None), data=data(), trainer=trainer)
    raised = run(None, methods(hook), data=data(), trainer=trainer)
    assert any("c3" in record.failures for record in raised.history)
    assert {failure.reason for row in raised.history for failure in row.failures.values()} == {FailureReason.EXCEPTION}
    assert_same(weights(raised), weights(lost))
    assert_same(memories(raised), memories(lost))
    assert [r.bytes_down for r in raised.history] == [r.bytes_down for r in lost.history]
    assert [r.bytes_up for r in raised.history] == [r.bytes_up for r in lost.history]


@pytest.mark.parametrize("method", [sparsyfed, fiarse])
def test_other_methods_go_on_as_well(method):
    lost = run(always("c3", Fault.DROPPED), [*method(), Trap(None)])
    raised = run(None, [*method(), Trap("backward")])
    assert_same(weights(raised), weights(lost))


def test_a_step_that_was_cut_off_leaves_neither_frozen_layers_nor_gradients():
    class Manual(Net):
        def __init__(self, cut):
            super().__init__()
            self.automatic_optimization = False
            self.cut = cut

        def training_step(self, batch, batch_idx):
            self.manual_backward(Net.training_step(self, batch, batch_idx))
            if self.cut and len(batch[0]) == 6:  # the last batch of clients with 22 and 30 examples
                self.last.weight.requires_grad_(False)
                raise ValueError("cut off")
            self.optimizers().step()
            self.optimizers().zero_grad()  # after the step: what a cut-off step left would be added to the next one

    plan = {**always("c1", Fault.DROPPED), **always("c5", Fault.DROPPED)}
    lost = run(plan, model=Manual(False), per_round=6)
    raised = run(None, model=Manual(True), per_round=6)
    assert reasons(raised) == [dict.fromkeys(("c1", "c5"), FailureReason.EXCEPTION)] * 3
    assert_same(weights(raised), weights(lost))


def test_generators_are_as_before_a_client_that_raises():
    torch.manual_seed(5)
    model = Net()
    loop = FederatedLoop(1, 4, [Trap("backward")], evaluation=QUIET, console=False)
    before = torch.get_rng_state()
    loop.fit(model, loaders(clients()))
    assert torch.equal(torch.get_rng_state(), before)
    assert loop.history[-1].clients_failed == 1


def test_a_loader_that_raises_in_round_7_costs_that_round_one_client():
    class Breaking(Dataset):
        broken = False

        def __init__(self, data):
            self.data = data

        def __len__(self):
            return len(self.data)

        def __getitem__(self, index):
            if self.broken and index == 9:
                raise OSError("disk gone\nand more of it")
            return self.data[index]

    class Late(FederatedDataModule):
        def start_round(self, progress):
            Breaking.broken = progress.step == 6

    parts = {name: DataLoader(part, batch_size=8, shuffle=True) for name, part in clients().items()}
    parts["c2"] = DataLoader(Breaking(clients()["c2"]), batch_size=8, shuffle=True)
    loop = run(data=Late(parts), per_round=6, rounds=8)
    assert [record.clients_failed for record in loop.history] == [0, 0, 0, 0, 0, 0, 0, 1, 0]
    failure = loop.history[7].failures["c2"]
    assert failure.reason == FailureReason.EXCEPTION
    assert failure.sentence.startswith("OSError: disk gone ... and more of it (line ")
    assert failure.sentence.endswith(" of test_faults.py, in __getitem__)")
    assert loop.history[7].clients_returned == 5


@pytest.mark.parametrize("fault", [fault for fault in Fault if fault not in (Fault.TWICE, Fault.REVERSED)])
def test_the_memory_of_a_client_is_as_before_unless_its_update_was_merged(fault):
    options = {"rounds": 2, "per_round": 6, "faults": FaultPolicy(deadline=1000), "screen": Screen(norm=20.0)}
    loop, (first,) = watched({(1, "c3"): fault}, **options)
    assert list(loop.history[2].failures) == ["c3"]
    assert_same(memories(loop)["c3"], first["memories"]["c3"])
    (before,) = (memory["residual"] for memory in first["memories"]["c2"].values())
    (after,) = (memory["residual"] for memory in memories(loop)["c2"].values())
    assert not torch.equal(after["first.weight"], before["first.weight"])


def test_only_a_readable_upload_shows_that_a_client_holds_the_masks_it_was_sent():
    def positions(plan, **arguments):
        callbacks = feddip(sparsity=0.9, initial_sparsity=0.9, reconfigure_every=10)
        loop = run(plan, callbacks, rounds=2, per_round=6, **arguments)
        return {name: traffic.down.codings for name, traffic in loop.history[2].clients.items()}

    none = positions({})
    assert all("known" in codings for codings in none.values())
    for fault in (Fault.RAISES, Fault.DROPPED, Fault.CORRUPTED, Fault.DIES):
        found = positions({(0, "c3"): fault})
        assert "known" not in found["c3"]
        assert all("known" in codings for name, codings in found.items() if name != "c3")
    late = positions({(0, "c3"): Fault.STRAGGLES}, faults=FaultPolicy(deadline=100))
    assert late == none


def test_a_client_that_vanishes_comes_back_with_an_old_mask_and_is_brought_up_to_date():
    # c3 holds the first mask, fails while it moves, and is asked again: whatever it is sent, it trains on what all others get
    plan = {(1, "c3"): Fault.DROPPED, (2, "c3"): Fault.RAISES, (3, "c3"): Fault.DROPPED}
    options = {"rounds": 6, "per_round": 6}
    loop = run(plan, moving(), **options)
    assert [list(record.failures) for record in loop.history[1:]] == [[], ["c3"], ["c3"], ["c3"], [], []]
    assert [record.clients_returned for record in loop.history[1:]] == [6, 5, 5, 5, 6, 6]
    back = loop.history[5].clients["c3"].down
    assert "changes" not in back.codings
    assert back.positions > 0
    again = loop.history[6].clients
    assert again["c3"].down == again["c2"].down


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


# -- screening ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [list, moving, partial(sparsyfed, sparsity=0.5), fiarse])
def test_what_is_screened_out_is_as_if_it_had_not_come(method):
    plan = {**always("c1", Fault.EXPLODES), **always("c4", Fault.EXPLODES)}
    loop = run(plan, method(), per_round=6, screen=Screen(norm=20.0))
    assert reasons(loop) == [dict.fromkeys(("c1", "c4"), FailureReason.SCREENED)] * 3
    lost = run(dict.fromkeys(plan, Fault.STRAGGLES), method(), per_round=6, faults=FaultPolicy(deadline=1000))
    assert_same(weights(loop), weights(lost))


def test_a_change_in_the_other_direction_is_screened_out():
    def similar():
        generator = torch.Generator().manual_seed(1)
        parts = {}
        for number in range(6):
            x = torch.randn(40, 8, generator=generator)
            parts[f"c{number}"] = TensorDataset(x, x[:, :3].argmax(1))
        return loaders(parts)

    plan = always("c2", Fault.REVERSED)
    loop = run(plan, data=similar(), per_round=6, screen=Screen(cosine=0.0))
    assert reasons(loop) == [{"c2": FailureReason.SCREENED}] * 3
    assert "expected a cosine of at least 0 to the others' direction, got -" in loop.history[1].failures["c2"].sentence
    unscreened = run(plan, data=similar(), per_round=6)
    assert not any(reasons(unscreened))


def test_a_screen_that_refuses_nobody_changes_nothing():
    expected = run({}, moving(), per_round=6)
    loop = run({}, moving(), per_round=6, screen=Screen(norm=1e6, cosine=-1.0))
    assert_same(weights(loop), weights(expected))


def test_two_uploads_are_not_screened():
    loop = run(always("c1", Fault.EXPLODES), per_round=2, rounds=6, screen=Screen(norm=2.0, cosine=0.9))
    assert not any(reasons(loop))


# -- all together ------------------------------------------------------------------------------------------------------

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


# -- the record --------------------------------------------------------------------------------------------------------


def test_failures_come_back_from_json_and_from_records_that_had_only_sentences():
    record = run({(0, "c1"): Fault.RAISES}, per_round=6, rounds=1).history[1]
    again = RoundRecord.from_json(record.to_json())
    assert again == record
    assert isinstance(again.failures["c1"].reason, FailureReason)
    row = json.loads(record.to_json())
    for name in ("clients_unused", "stray_results", "tries", "accept", "skipped"):
        del row[name]
    row["failures"] = {"c1": "checksum"}
    old = RoundRecord.from_json(json.dumps(row))
    assert old.failures == {"c1": ClientFailure(FailureReason.INVALID_UPLOAD, "checksum")}
    assert (old.tries, old.accept, old.skipped) == (1, "sampled", False)
    assert record.scalars["skipped"] == 0


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (ValueError("no"), ClientFailure(FailureReason.EXCEPTION, "ValueError: no")),
        (KeyError(), ClientFailure(FailureReason.EXCEPTION, "KeyError")),
        (ValueError(object()), ClientFailure(FailureReason.EXCEPTION, "ValueError: <object object>")),
        (MemoryError(), ClientFailure(FailureReason.OUT_OF_MEMORY, "MemoryError")),
        (
            RuntimeError("CUDA out of memory. Tried"),
            ClientFailure(FailureReason.OUT_OF_MEMORY, "RuntimeError: CUDA out of memory. Tried"),
        ),
    ],
)
def test_errors_have_a_reason_and_a_sentence(error, failure):
    assert failure_of(error) == failure


def test_a_client_can_not_fill_the_history():
    class Talkative(LocalExecutor):
        def run(self, worker, jobs):
            names = [f"{number:0500}" for number in range(900)]
            payload = encode(SparseUpdate(dict.fromkeys(names, torch.zeros(0)), dict.fromkeys(names)))
            for result in super().run(worker, jobs):
                yield replace(result, payload=payload) if result.client_id == "c3" else result

    failure = run(executor=Talkative(), per_round=6, rounds=1).history[1].failures["c3"]
    assert failure.sentence.startswith("expected the parameters of the model, got none for ['first.bias'")
    assert len(failure.sentence) == 600
    assert replace(failure) == failure  # what was cut once stays as it is


def test_a_long_message_is_cut_and_its_place_is_kept():
    try:
        raise ValueError("x" * 10_000)
    except ValueError as error:
        sentence = failure_of(error).sentence
    assert sentence.startswith("ValueError: xxx")
    assert "xxx ... (line " in sentence
    assert len(sentence) < 600


def test_a_loss_that_is_nan_and_a_fit_without_a_step_have_reasons_of_their_own():
    class Choosy(Net):
        def on_train_batch_start(self, batch, batch_idx):
            return None if batch[0].count_nonzero() else -1

    parts = clients()
    parts["c1"] = TensorDataset(torch.zeros(20, 8), torch.zeros(20, dtype=torch.long))
    parts["c4"] = TensorDataset(torch.full((20, 8), torch.nan), torch.zeros(20, dtype=torch.long))
    loop = run(data=loaders(parts), model=Choosy(), per_round=6, rounds=1)
    assert reasons(loop) == [{"c1": FailureReason.NO_STEP, "c4": FailureReason.LOSS_NOT_FINITE}]
    assert "expected at least one optimizer step, got none from client 'c1'" in loop.history[1].failures["c1"].sentence


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "expected a screen with a bound, norm or cosine, got none"),
        ({"norm": 1.0}, "expected norm above 1, in multiples of the cohort's median, got 1.0"),
        ({"cosine": 1.0}, r"expected cosine in \[-1, 1\), got 1.0"),
    ],
)
def test_bad_screens(arguments, message):
    with pytest.raises(ValueError, match=message):
        Screen(**arguments)


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
