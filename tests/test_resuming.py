"""Which run a checkpoint goes on with: the same one, and no other."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lightning_fedsparse.callbacks import feddip
from lightning_fedsparse.checkpointing import Checkpointing
from lightning_fedsparse.evaluation import Evaluation
from lightning_fedsparse.resuming import flat
from lightning_fedsparse.schedules import CubicSchedule, LinearSchedule
from lightning_fedsparse.wire import Wire
from tests.run_folders import Mode, fit, snapshot
from tests.test_loop import Net


class Wider(Net):
    def __init__(self):
        super().__init__()
        self.last = nn.Linear(16, 4)


class Doubles(Net):
    def __init__(self):
        super().__init__()
        self.last = self.last.double()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": 1}, r"got another: arguments.seed: 0 -> 1; a run that goes on may change rounds, executor, "),
        ({"per_round": 2}, "arguments.clients_per_round: 3 -> 2;"),
        ({"population": 7}, "arguments.clients: 6 -> 7;"),
        ({"wire": Wire(uploads="bfloat16")}, "arguments.wire.uploads: 'float32' -> 'bfloat16';"),
        ({"trainer": {"max_epochs": 3}}, "arguments.trainer.max_epochs: 1 -> 3;"),
        (
            {"callbacks": feddip(sparsity=0.5)},
            r"arguments.callbacks.0: None -> '\S+DynamicPruning', .* -> .*, .* -> .* and \d+ more;",
        ),
        ({"model": Wider}, r"'last.bias' is float32\[4\] in the model and float32\[3\] in the checkpoint"),
        ({"model": Doubles}, r"'last.bias' is float64\[3\] in the model and float32\[3\] in the checkpoint"),
        ({"rounds": 1}, "expected at least 2 rounds, as many as the checkpoint has done, got 1"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_and_nothing_changes(arguments, message, tmp_path):
    fit(tmp_path)
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, **{"rounds": 3, **arguments}, ckpt_path="last")
    assert snapshot(tmp_path) == before


def test_what_does_not_change_the_rounds_that_are_done_may_differ(tmp_path):
    fit(tmp_path)
    evaluated = Evaluation(every=2, split="none")
    fit(tmp_path, 3, fresh_trainer=True, evaluation=evaluated, checkpointing=Checkpointing(2), ckpt_path="last")


def test_a_finished_run_is_left_as_it_is(tmp_path):
    loop, model = fit(tmp_path)
    before = snapshot(tmp_path)
    again, same = fit(tmp_path, ckpt_path="last")
    assert snapshot(tmp_path) == before
    assert again.history == loop.history
    assert all(torch.equal(same.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


class Counting:
    def __init__(self, every, where, quiet=False):
        self.every = every
        self.where = Path(where)  # no plain value
        self.count = 0  # no argument
        self._quiet = quiet


def test_flat_names_values_classes_and_the_arguments_that_objects_keep():
    optimizer = partial(torch.optim.SGD, lr=0.5)
    assert flat({"a": [1, {"b": None}], "c": Counting(3, "x"), "d": Net, "e": optimizer, "f": len}) == {
        "a.0": 1,
        "a.1.b": None,
        "c": "tests.test_resuming.Counting",
        "c.every": 3,
        "d": "tests.test_loop.Net",
        "e": "functools.partial",
        "e.function": "torch.optim.sgd.SGD",
        "e.lr": 0.5,
        "f": "builtins.len",
    }
    leaves = flat({"a": np.float64(0.5), "b": Mode.FAST, "c": True, "d": 1})
    assert [type(leaf) for leaf in leaves.values()] == [float, str, bool, int]
    schedules = CubicSchedule(0.0, 0.9), LinearSchedule(0.0, 0.9)
    assert [flat(schedule, "s") for schedule in schedules] == [
        {"s": f"lightning_fedsparse.schedules.{name}", "s.initial": 0.0, "s.final": 0.9}
        for name in ("CubicSchedule", "LinearSchedule")
    ]


def test_methods_are_compared_by_their_arguments(tmp_path):
    fit(tmp_path, 2, feddip(sparsity=0.8))
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=r"another: arguments.callbacks.0.schedule.final: 0.8 -> 0.5;"):
        fit(tmp_path, 3, feddip(sparsity=0.5), ckpt_path="last")
    assert snapshot(tmp_path) == before
    fit(tmp_path, 3, feddip(sparsity=0.8), ckpt_path="last")
