"""The arguments of clients' Trainers: what the loop decides itself is refused, and a training always has an end."""

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_fedsparse import FederatedLoop
from lightning_fedsparse.resident import ResidentTrainer
from tests.failing_clients import run

ONE_DEVICE = "^expected one device for a client's Trainer, such as devices=1 or devices=\\[0\\], got "
ONE_PROCESS = (
    "^expected strategy='auto' or a SingleDeviceStrategy for a client's Trainer, which is one process, got 'ddp_spawn'$"
)


def loop(**trainer):
    return FederatedLoop(1, 1, trainer=trainer, console=False)


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"devices": 2}, ONE_DEVICE + "2$"),
        ({"devices": -1}, ONE_DEVICE + "-1$"),
        ({"devices": "auto"}, ONE_DEVICE + "'auto'$"),
        ({"devices": [0, 1]}, ONE_DEVICE + r"\[0, 1\]$"),
        ({"num_nodes": 2}, "^expected a client's Trainer on one node, got num_nodes=2$"),
        ({"strategy": "ddp_spawn"}, ONE_PROCESS),
        (
            {"max_epochs": -1},
            "^expected an end of each client's training, got max_epochs=-1 without max_steps or max_time$",
        ),
    ],
)
def test_what_the_loop_decides_itself(trainer, message):
    with pytest.raises(ValueError, match=message):
        loop(**trainer)


def test_one_device_of_the_users_choice():
    for devices in (1, "1", [1]):
        assert loop(devices=devices).trainer["devices"] == devices
    assert loop(strategy=SingleDeviceStrategy("cpu"), num_nodes=1)


def test_a_client_trains_on_one_device_of_a_machine_that_has_several(monkeypatch):
    monkeypatch.setattr(CPUAccelerator, "auto_device_count", staticmethod(lambda: 2))
    arguments = {"accelerator": "cpu", "max_epochs": 1}
    assert Trainer(**arguments, logger=False, enable_checkpointing=False).num_devices == 2
    assert ResidentTrainer(arguments).next().num_devices == 1


@pytest.mark.parametrize("trainer", [{}, {"max_epochs": None}, {"max_steps": -1}, {"max_time": None}], ids=str)
def test_one_epoch_where_no_end_is_given(trainer):
    assert loop(**trainer).trainer["max_epochs"] == 1


@pytest.mark.parametrize("trainer", [{"max_steps": 3}, {"max_steps": 3, "max_epochs": -1}], ids=str)
def test_an_end_that_is_given_is_the_end(trainer):
    assert loop(**trainer).trainer == trainer
    assert run(trainer=trainer, rounds=1).history[1].clients_returned == 4
