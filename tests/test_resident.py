"""A Trainer that fits many clients: the same, to the bit, as a new one for each."""

import re
import sys

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    StochasticWeightAveraging,
)
from lightning.pytorch.plugins import HalfPrecision, MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.nn import functional as F

from lightning_fedsparse import FederatedLoop
from lightning_fedsparse.callbacks import feddip, fiarse, sparsyfed
from lightning_fedsparse.failures import TooFewClientsError
from lightning_fedsparse.resident import ResidentDevice, ResidentTrainer
from lightning_fedsparse.testing_models import ConvNet, loader
from tests.test_loop import QUIET, Net, clients, loaders


class Manual(Net):
    """Two optimizers under manual optimization, one with a schedule."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        first = torch.optim.SGD(self.first.parameters(), lr=0.1, momentum=0.9)
        last = torch.optim.AdamW([*self.norm.parameters(), *self.last.parameters()], lr=0.01)
        return [first, last], [torch.optim.lr_scheduler.StepLR(first, 1, 0.5)]

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
        return loss

    def on_train_epoch_end(self):
        self.lr_schedulers().step()


class Logging(Net):
    """Logs, draws, and learns by what the Trainer says about time."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        x = x + 0.01 * self.global_step + 0.1 * self.current_epoch + 0.01 * torch.randn_like(x)
        loss = F.cross_entropy(F.dropout(self(x), 0.2), y)
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss


class Seen(pl.Callback):
    """What every fit sees of the Trainer; shared by all copies."""

    rows: list[tuple] = []

    def __init__(self):
        self.batches = 0

    def on_train_start(self, trainer, pl_module):
        loops = trainer.fit_loop.epoch_loop
        self.rows.append(
            (
                trainer.global_step,
                trainer.current_epoch,
                self.batches,
                loops.batch_progress.total.ready,
                loops.batch_idx,
            )
        )

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches += 1

    def on_fit_end(self, trainer, pl_module):
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.rows.append((trainer.global_step, trainer.current_epoch, self.batches, metrics))


def train(make_model, callbacks, trainer, *, fresh):
    Seen.rows = []
    torch.manual_seed(2)
    model = make_model()
    plain = [*trainer.get("callbacks", []), Seen()]
    loop = FederatedLoop(
        3,
        4,
        callbacks,
        {**trainer, "callbacks": plain},
        seed=5,
        evaluation=QUIET,
        console=False,
        fresh_trainer=fresh,
    )
    history = loop.fit(model, loaders(clients()))
    rows = [(r.train_loss, r.bytes_up, r.bytes_down, r.sparsity) for r in history]
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, rows, Seen.rows


CASES = {
    "epochs": (Net, list, {"max_epochs": 2}),
    "steps": (Net, list, {"max_steps": 4, "max_epochs": -1}),
    "time and epochs": (Net, list, {"max_time": "00:01:00:00", "max_epochs": 2}),
    "logs": (Logging, list, {"max_epochs": 2}),
    "validation inside": (Net, list, {"max_epochs": 2, "limit_val_batches": 1.0}),
    "accumulation": (Net, list, {"max_epochs": 2, "accumulate_grad_batches": 2, "gradient_clip_val": 0.5}),
    "manual": (Manual, list, {"max_epochs": 2}),
    "feddip": (Net, lambda: feddip(0.8, reconfigure_every=1, residual="keep"), {"max_epochs": 2}),
    "sparsyfed": (Net, lambda: sparsyfed(0.5, activation_threshold="first_batch"), {"max_epochs": 2}),
    "fiarse": (Net, lambda: fiarse(0.3), {"max_epochs": 2}),
    "accumulation that changes": (
        Net,
        list,
        {"max_epochs": 3, "callbacks": [GradientAccumulationScheduler({0: 1, 1: 2})]},
    ),
    "stopped early": (
        Logging,
        list,
        {"max_epochs": 4, "callbacks": [EarlyStopping("loss_epoch", patience=1, min_delta=0.05)]},
    ),
    "a callback that moves the Trainer's limits": (
        Net,
        list,
        {"max_epochs": 4, "callbacks": [StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=2)]},
    ),
    "averages": (Net, list, {"max_epochs": 2, "callbacks": [EMAWeightAveraging(decay=0.5)]}),
}


@pytest.mark.parametrize("case", CASES)
def test_one_trainer_is_as_good_as_many(case):
    make_model, callbacks, trainer = CASES[case]
    weights, rows, seen = train(make_model, callbacks(), dict(trainer), fresh=False)
    expected, expected_rows, expected_seen = train(make_model, callbacks(), dict(trainer), fresh=True)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert rows == expected_rows
    assert seen == expected_seen
    assert len(seen) == 2 * 3 * 4


def test_callbacks_are_copied_when_it_is_made_and_again_for_each_fit():
    mine = Seen()
    trainers = ResidentTrainer({"max_epochs": 1}, [mine])
    mine.batches = 7
    for _ in range(2):
        trainer = trainers.next()
        (found,) = (callback for callback in trainer.callbacks if isinstance(callback, Seen))
        assert found is not mine
        assert found.batches == 0
        trainer.fit(ConvNet(), loader(8))
        assert found.batches > 0


def test_a_gradient_scaler_starts_anew():
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)
    trainers = ResidentTrainer({"max_epochs": 1, "plugins": [MixedPrecision("16-mixed", "cpu", scaler)]})
    assert trainers.next().precision_plugin.scaler is scaler
    scaler.scale(torch.ones(()))
    scaler.update(8.0)
    assert scaler.get_scale() == 8.0
    assert trainers.next().precision_plugin.scaler.get_scale() == 1024.0


def test_only_fresh_ones_are_new_objects():
    resident, fresh = ResidentTrainer({}), ResidentTrainer({}, fresh=True)
    assert resident.next() is resident.next()
    assert fresh.next() is not fresh.next()


def test_after_a_fit_that_was_cut_off_there_is_a_new_one():
    class Failing(Net):
        fails = True

        def training_step(self, batch, batch_idx):
            if self.fails:
                raise ValueError("no more memory")
            return super().training_step(batch, batch_idx)

    model = Failing()
    loop = FederatedLoop(1, 4, None, {"max_epochs": 1}, evaluation=QUIET, console=False)
    with pytest.raises(TooFewClientsError, match=r"client 'c\d': ValueError: no more memory \(line \d+ of") as caught:
        loop.fit(model, loaders(clients()))
    assert isinstance(caught.value.__cause__, ValueError)
    if sys.version_info >= (3, 11):
        assert re.match(r"raised in the training of client 'c\d' in round 1", caught.value.__cause__.__notes__[0])
    worker = loop._run.worker
    assert worker._trainers._trainer is None
    Failing.fails = False
    assert loop.fit(model, loaders(clients()))[-1].clients_returned == 4


def test_a_module_stays_on_its_device_from_fit_to_fit(monkeypatch):
    done = []
    for name in ("setup", "teardown"):
        monkeypatch.setattr(CPUAccelerator, name, lambda self, *_, name=name: done.append(name))
    monkeypatch.setattr(ConvNet, "cpu", lambda self: done.append("cpu"))
    trainers = ResidentTrainer({"max_steps": 1, "accelerator": "cpu"})
    model = ConvNet()
    for _ in range(3):
        trainers.next().fit(model, loader(8))
    assert done == ["setup"]
    assert trainers.device == torch.device("cpu")


def test_a_strategy_of_the_users_own_is_left_alone():
    class Mine(SingleDeviceStrategy):
        pass

    strategy = Mine("cpu")
    assert ResidentTrainer({"strategy": strategy}).next().strategy is strategy
    strategy = SingleDeviceStrategy("cpu", precision_plugin=HalfPrecision("bf16-true"))
    assert ResidentTrainer({"strategy": strategy}).next().strategy is strategy
    assert isinstance(ResidentTrainer({}).next().strategy, ResidentDevice)


class Unfreezing(Net):
    """Fine-tunes its head first, then all but the statistics, and tells what it trained."""

    def __init__(self):
        super().__init__()
        self.first.requires_grad_(False)
        self.learned = []

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.first.requires_grad_(True)
            self.norm.eval()
        self.learned.append((self.first.weight.requires_grad, self.norm.training))


def test_every_client_begins_with_the_layers_frozen_that_the_user_froze():
    model = Unfreezing()
    FederatedLoop(1, 3, [], {"max_epochs": 2}, evaluation=QUIET, console=False).fit(model, loaders(clients()))
    assert model.learned == [(False, True), (True, False)] * 3
    assert (model.first.weight.requires_grad, model.norm.training) == (False, True)
