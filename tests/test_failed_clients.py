"""What a failed client leaves behind: nothing, anywhere."""

from dataclasses import replace
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset

from lightning_fedsparse import FederatedDataModule, FederatedLoop
from lightning_fedsparse.callbacks import feddip, fiarse, sparsyfed
from lightning_fedsparse.executors import LocalExecutor, ProcessExecutor
from lightning_fedsparse.failures import FailureReason, TooFewClientsError
from lightning_fedsparse.faults import FaultPolicy
from lightning_fedsparse.screening import Screen
from lightning_fedsparse.testing import Fault
from tests.failing_clients import Trap, always, assert_same, memories, moving, reasons, run, watched, weights
from tests.test_loop import QUIET, Net, clients, loaders


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


class BreakingInRound7(FederatedDataModule):
    def __init__(self):
        parts = {name: DataLoader(part, batch_size=8, shuffle=True) for name, part in clients().items()}
        parts["c2"] = DataLoader(Breaking(clients()["c2"]), batch_size=8, shuffle=True)
        super().__init__(parts)

    def start_round(self, progress):
        Breaking.broken = progress.step == 6


TWO_WORKERS = pytest.param(partial(ProcessExecutor, 2), marks=pytest.mark.slow, id="two workers")


@pytest.mark.parametrize("executor", [pytest.param(LocalExecutor, id="here"), TWO_WORKERS])
def test_a_loader_that_raises_in_round_7_costs_that_round_one_client(executor):
    loop = run(data=BreakingInRound7(), per_round=6, rounds=8, executor=executor())
    assert [record.clients_failed for record in loop.history] == [0, 0, 0, 0, 0, 0, 0, 1, 0]
    failure = loop.history[7].failures["c2"]
    assert failure.reason == FailureReason.EXCEPTION
    assert failure.sentence.startswith("OSError: disk gone ... and more of it (line ")
    assert failure.sentence.endswith(" of test_failed_clients.py, in __getitem__)")
    assert loop.history[7].clients_returned == 5


@pytest.mark.parametrize("executor", [pytest.param(LocalExecutor, id="here"), TWO_WORKERS])
def test_a_loader_that_raises_in_round_7_ends_a_run_that_needs_every_client(executor):
    with pytest.raises(
        TooFewClientsError,
        match=r"^expected at least 6 of the 6 clients of round 7 to return, got 5 \(1 exception\); client 'c2': OSError: disk",
    ) as caught:
        run(data=BreakingInRound7(), per_round=6, rounds=8, executor=executor(), faults=FaultPolicy(min_clients=6))
    assert isinstance(caught.value.__cause__, OSError)


class YieldsNothing(BatchSampler):
    def __init__(self):
        super().__init__(range(3), 1, drop_last=False)

    def __iter__(self):
        return iter(())


@pytest.mark.parametrize("end", [{"max_epochs": 2}, {"max_steps": 5}, {"max_time": {"hours": 1}}], ids=str)
def test_a_client_whose_loader_yields_nothing_fails_however_its_training_would_end(end):
    own = {name: DataLoader(part, batch_size=8) for name, part in clients().items()}
    own["c2"] = DataLoader(clients()["c2"], batch_sampler=YieldsNothing())
    # few batches for the others, so that they need no hour
    loop = run(data=FederatedDataModule(own), per_round=6, rounds=1, trainer=end, callbacks=[StopAfterTwo()])
    assert {name: failure.reason for name, failure in loop.history[1].failures.items()} == {"c2": FailureReason.NO_STEP}
    assert loop.history[1].failures["c2"].sentence == (
        "expected a batch in every epoch, got none in epoch 1 of client 'c2' in round 1: look at its loader, or its batch "
        "sampler"
    )


class StopAfterTwo(pl.Callback):
    def on_train_batch_end(self, trainer, *args):
        trainer.should_stop = trainer.global_step >= 2


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
