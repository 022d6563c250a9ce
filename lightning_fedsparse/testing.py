"""The conformance suite: what every callback here does, and what yours should do.

Each check is a function of a factory, which makes fresh callbacks (the one under test and those it needs beside it),
and of an empty folder; it raises ``AssertionError`` with what was expected. With pytest::

    @pytest.mark.parametrize("check", CHECKS)
    def test_conformance(check, tmp_path):
        check(lambda: [MagnitudePruning(ConstantSchedule(0.5)), MyCallback()], tmp_path)

    def test_selections():
        check_two_instances(lambda names: MyCallback(include=names), lambda: [ErrorFeedback()])

Models and data are tiny and made here; a check takes a fraction of a second on a CPU. Clients that fail on purpose are those of
:class:`~lightning_fedsparse.testing_faults.FaultyExecutor`, which is here too.
"""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_fedsparse.data import FederatedDataModule
from lightning_fedsparse.evaluation import Evaluation
from lightning_fedsparse.loop import FederatedLoop
from lightning_fedsparse.testing_faults import (
    Fault,
    FaultPlan,
    FaultyExecutor,
    InjectedError,
    ListedFaults,
    RandomFaults,
)
from lightning_fedsparse.testing_models import EPOCHS, ConvNet, Mlp, fit, loader, make

__all__ = [
    "CHECKS",
    "Check",
    "Factory",
    "Fault",
    "FaultPlan",
    "FaultyExecutor",
    "InjectedError",
    "ListedFaults",
    "RandomFaults",
    "check_accumulates_gradients",
    "check_copies_and_pickles",
    "check_federates",
    "check_fits_a_second_model",
    "check_keeps_the_state_dict",
    "check_leaves_no_trace",
    "check_resumes",
    "check_state_loads_with_weights_only",
    "check_trains",
    "check_two_instances",
]

Factory: TypeAlias = Callable[[], Sequence[pl.Callback]]
Check: TypeAlias = Callable[[Factory, Path], None]


def check_trains(factory: Factory, folder: Path) -> None:
    """The callbacks work in a plain Trainer: the loss is finite and weights move."""
    module = make(ConvNet)
    before = _tensors(module)
    fit(module, factory())
    _require(all(math.isfinite(loss) for loss in module.losses), f"finite losses, got {module.losses}")
    moved = [name for name, parameter in module.named_parameters() if not torch.equal(parameter, before[name])]
    _require(bool(moved), "training to change at least one parameter, got none changed")


def check_keeps_the_state_dict(factory: Factory, folder: Path) -> None:
    """Names, order, shapes and dtypes of the module's ``state_dict`` stay, during training and after."""
    module = make(ConvNet)
    before = _layout(module)
    during = _SeeLayout()
    fit(module, [*factory(), during])
    for when, layout in (("in training", during.layout), ("after fit", _layout(module))):
        _require(layout == before, f"the state_dict {before} {when}, got {layout}")


def check_resumes(factory: Factory, folder: Path) -> None:
    """Resuming from the middle equals no interruption: weights and the callbacks' state, to the bit."""
    straight, resumed = make(ConvNet), make(ConvNet)
    first, second = list(factory()), list(factory())
    path = folder / "middle.ckpt"
    fit(straight, [*first, _SaveAt(path, epoch=EPOCHS // 2 - 1)])
    fit(resumed, second, ckpt_path=path)
    _require_equal(_tensors(resumed), _tensors(straight), "the module after resuming")
    for one, other in zip(first, second, strict=True):
        _require_equal(other.state_dict(), one.state_dict(), f"the state of {type(one).__name__} after resuming")


def check_copies_and_pickles(factory: Factory, folder: Path) -> None:
    """Deep copies and pickles, made before and after ``fit``, keep their state and train as the original does."""
    original = list(factory())
    expected = make(ConvNet)
    copies = [copy.deepcopy(original), pickle.loads(pickle.dumps(original))]
    fit(expected, original)
    copies += [copy.deepcopy(original), pickle.loads(pickle.dumps(original))]
    for clone in copies[2:]:
        for one, other in zip(original, clone, strict=True):
            _require_equal(other.state_dict(), one.state_dict(), f"the state of a copied {type(one).__name__}")
    for clone in copies:
        module = make(ConvNet)
        fit(module, clone)
        _require_equal(_tensors(module), _tensors(expected), "the module trained with a copy")


def check_fits_a_second_model(factory: Factory, folder: Path) -> None:
    """One set of callbacks fits another model afterwards, as fresh ones would."""
    used = list(factory())
    fit(make(ConvNet), used)
    module, expected = make(Mlp), make(Mlp)
    fit(module, used)
    fit(expected, factory())
    _require_equal(_tensors(module), _tensors(expected), "a second model trained with used callbacks")


def check_accumulates_gradients(factory: Factory, folder: Path) -> None:
    """Accumulating over two batches equals batches of twice the size."""
    module, expected = make(Mlp), make(Mlp)
    fit(module, factory(), accumulate_grad_batches=2)
    fit(expected, factory(), batch_size=16)
    for name, tensor in _tensors(expected).items():
        difference = float((module.state_dict()[name] - tensor).abs().max())
        _require(difference < 1e-5, f"{name} equal to 1e-5 to that of larger batches, got a difference of {difference}")


def check_state_loads_with_weights_only(factory: Factory, folder: Path) -> None:
    """A checkpoint with the callbacks' state loads without unpickling, and fresh callbacks take the state."""
    callbacks = list(factory())
    path = folder / "end.ckpt"
    fit(make(ConvNet), [*callbacks, _SaveAt(path, epoch=EPOCHS - 1)])
    states = torch.load(path, weights_only=True)["callbacks"]
    for one, fresh in zip(callbacks, factory(), strict=True):
        _require(fresh.state_key == one.state_key, f"one state key, got {one.state_key!r} and {fresh.state_key!r}")
        if one.state_key in states:
            fresh.load_state_dict(states[one.state_key])
            # as saved and not as it is by now: the end of fit may have folded what it describes
            _require_equal(fresh.state_dict(), states[one.state_key], f"the loaded state of {type(one).__name__}")


def check_leaves_no_trace(factory: Factory, folder: Path) -> None:
    """After ``fit`` module and optimizers carry no hook, attribute or gradient mode that was not there before."""
    module = make(ConvNet)
    before = _attributes(module)
    trainer = fit(module, factory())
    _require(_attributes(module) == before, f"the module's attributes {before}, got {_attributes(module)}")
    for layer in module.modules():
        hooks = [name for name in vars(layer) if "hooks" in name and vars(layer)[name]]
        _require(not hooks, f"no hook on {type(layer).__name__}, got {hooks}")
    for optimizer in trainer.optimizers:
        hooks = [name for name in vars(optimizer) if "hooks" in name and vars(optimizer)[name]]
        _require(not hooks, f"no hook on {type(optimizer).__name__}, got {hooks}")
    _require(
        all(p.requires_grad for p in module.parameters()), "parameters that require gradients, got some that don't"
    )


def check_federates(factory: Factory, folder: Path) -> None:
    """Two rounds over two clients run, and give the same result when run again."""
    results = []
    for _ in range(2):
        module = make(ConvNet)
        data = FederatedDataModule({"a": loader(8), "b": loader(4)})
        loop = FederatedLoop(2, 2, list(factory()), evaluation=Evaluation(split="none"), console=False)
        before = _tensors(module)
        with torch.random.fork_rng():
            history = loop.fit(module, data)
        failures = [failure for record in history for failure in record.failures.values()]
        _require(not failures, f"valid updates from both clients, got {failures}")
        tensors = _tensors(module)
        _require(all(bool(t.isfinite().all()) for t in tensors.values()), "finite weights after two rounds, got others")
        moved = any(not torch.equal(parameter, before[name]) for name, parameter in module.named_parameters())
        _require(moved, "two rounds to change at least one parameter, got none changed")
        results.append(tensors)
    _require_equal(results[1], results[0], "a second run of the same federation")


CHECKS: tuple[Check, ...] = (
    check_trains,
    check_keeps_the_state_dict,
    check_resumes,
    check_copies_and_pickles,
    check_fits_a_second_model,
    check_accumulates_gradients,
    check_state_loads_with_weights_only,
    check_leaves_no_trace,
    check_federates,
)


def check_two_instances(select: Callable[[Sequence[str]], pl.Callback], beside: Factory = tuple) -> None:
    """Instances for disjoint selections of parameters work side by side, in any order.

    Args:
        select: Makes the callback for the given globs of parameter names.
        beside: Makes the callbacks that it needs once, whatever the number of instances.
    """
    results = []
    for names in (["first.weight", "second.weight"], ["second.weight", "first.weight"]):
        module = make(Mlp)
        fit(module, [*(select([name]) for name in names), *beside()])
        results.append(_tensors(module))
    _require_equal(results[1], results[0], "two instances in the other order")


class _SaveAt(pl.Callback):
    """Saves a checkpoint at the end of one epoch."""

    def __init__(self, path: Path, *, epoch: int) -> None:
        self._path = path
        self._epoch = epoch

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == self._epoch:
            trainer.save_checkpoint(self._path)


class _SeeLayout(pl.Callback):
    """Reads the state_dict's layout in the middle of a batch."""

    def __init__(self) -> None:
        self.layout: list[tuple[str, torch.Size, torch.dtype]] = []

    @override
    def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        self.layout = _layout(pl_module)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def _layout(module: nn.Module) -> list[tuple[str, torch.Size, torch.dtype]]:
    return [(name, tensor.shape, tensor.dtype) for name, tensor in module.state_dict().items()]


def _attributes(module: nn.Module) -> list[str]:
    # Lightning's own are there from the first fit on
    return [f"{name}.{key}" for name, layer in module.named_modules() for key in vars(layer) if key[:1] != "_"]


def _require(condition: bool, expected: str) -> None:
    if not condition:
        raise AssertionError(f"expected {expected}")


def _require_equal(found: Any, expected: Any, what: str) -> None:
    """Equal to the bit, whatever the nesting of dicts, sequences, tensors and primitives."""
    if isinstance(expected, Mapping) and isinstance(found, Mapping):
        _require(found.keys() == expected.keys(), f"{what} with the keys {list(expected)}, got {list(found)}")
        for key in expected:
            _require_equal(found[key], expected[key], f"{what}, {key}")
        return
    if isinstance(expected, list | tuple) and isinstance(found, list | tuple):
        _require(len(found) == len(expected), f"{what} of {len(expected)} entries, got {len(found)}")
        for one, other in zip(found, expected, strict=True):
            _require_equal(one, other, what)
        return
    if isinstance(expected, str) or expected is None:
        _require(found == expected, f"{what} to be {expected!r}, got {found!r}")
        return
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{what}: {text}")
