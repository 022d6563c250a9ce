"""From stored weights to a servable model: at the end of fit, in place, and from a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

import lightning_fedsparse
from lightning_fedsparse.callbacks import ErrorFeedback, MagnitudePruning, feddip
from lightning_fedsparse.folding import fold, load_folded
from lightning_fedsparse.masks import pack_mask
from lightning_fedsparse.schedules import ConstantSchedule
from tests.effective_reference import WEIGHTS, Net, loader, quiet_trainer, seeded, weights_of


def prune_half(*, fold: bool, **selection: Any) -> list[pl.Callback]:
    return [MagnitudePruning(ConstantSchedule(0.5), every=3, end=1.0, fold=fold, **selection), ErrorFeedback()]


def zeros(module: nn.Module) -> int:
    return sum(int((module.get_parameter(name) == 0).sum()) for name in WEIGHTS)


def plain_module() -> nn.Module:
    """No callback, no Lightning: what a server would load."""
    return nn.ModuleDict({"first": nn.Linear(6, 8), "second": nn.Linear(8, 3)})


class SavesAtEnd(Net):
    folder: Path

    def on_train_epoch_end(self) -> None:
        if self.current_epoch == self.trainer.max_epochs - 1:
            self.trainer.save_checkpoint(self.folder / "end.ckpt")


def trained(callbacks: Sequence[pl.Callback], folder: Path) -> Net:
    module = seeded(SavesAtEnd)
    module.folder = folder
    quiet_trainer(callbacks).fit(module, loader())
    return module


# -- at the end of fit -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("folds", "expected"), [(True, 36), (False, 0)])
def test_what_the_module_holds_after_fit(folds: bool, expected: int) -> None:
    module = seeded(Net)
    quiet_trainer(prune_half(fold=folds)).fit(module, loader())
    assert zeros(module) == expected


def test_folding_only_changes_pruned_weights() -> None:
    folded, stored = seeded(Net), seeded(Net)
    callbacks = prune_half(fold=True)
    quiet_trainer(callbacks).fit(folded, loader())
    quiet_trainer(prune_half(fold=False)).fit(stored, loader())
    (pruning, _) = callbacks
    assert isinstance(pruning, MagnitudePruning)
    for name, weight in weights_of(stored).items():
        expected = weight * pruning.masks[name] if name in pruning.masks else weight
        assert torch.equal(folded.get_parameter(name), expected)


# -- in place ----------------------------------------------------------------------------------------------------------


def test_fold_inside_a_fit_writes_the_effective_weights() -> None:
    class FoldsAtEnd(Net):
        def on_train_end(self) -> None:
            assert fold(self) is self

    module = seeded(FoldsAtEnd)
    quiet_trainer(prune_half(fold=False)).fit(module, loader())
    assert zeros(module) == 36


def test_fold_without_an_engine_changes_nothing() -> None:
    module = nn.Linear(2, 2)
    before = weights_of(module)
    assert fold(module) is module
    assert all(torch.equal(weights_of(module)[name], before[name]) for name in before)


# -- from a checkpoint -------------------------------------------------------------------------------------------------


def test_a_checkpoint_holds_stored_weights_and_loads_folded(tmp_path: Path) -> None:
    module = trained(prune_half(fold=True), tmp_path)
    content = torch.load(tmp_path / "end.ckpt", weights_only=True)
    assert all(bool((content["state_dict"][name] != 0).all()) for name in WEIGHTS)
    served = plain_module()
    assert load_folded(tmp_path / "end.ckpt", served) is served
    for name, weight in weights_of(module).items():
        assert torch.equal(served.get_parameter(name), weight)


def test_a_path_as_text_and_a_mapping(tmp_path: Path) -> None:
    module = trained(prune_half(fold=True), tmp_path)
    content = torch.load(tmp_path / "end.ckpt", weights_only=True)
    for source in (str(tmp_path / "end.ckpt"), content):
        served = lightning_fedsparse.load_folded(source, plain_module())
        assert torch.equal(served.get_parameter("first.weight"), module.first.weight)
    # the mapping is as it was
    assert bool((content["state_dict"]["first.weight"] != 0).all())


def test_the_masks_of_all_callbacks_are_folded(tmp_path: Path) -> None:
    callbacks = [
        *prune_half(fold=True, include=["first.weight"]),
        MagnitudePruning(ConstantSchedule(0.25), every=1, end=1.0, include=["second.weight"]),
    ]
    trained(callbacks, tmp_path)
    served = load_folded(tmp_path / "end.ckpt", plain_module())
    assert int((served.get_parameter("first.weight") == 0).sum()) == 24
    assert int((served.get_parameter("second.weight") == 0).sum()) == 6


def test_a_composed_method_loads_folded(tmp_path: Path) -> None:
    module = trained(feddip(sparsity=0.75), tmp_path)
    served = load_folded(tmp_path / "end.ckpt", plain_module())
    assert zeros(module) == zeros(served) == 54


def test_a_checkpoint_without_our_callbacks_loads_as_it_is(tmp_path: Path) -> None:
    module = trained([], tmp_path)
    served = load_folded(tmp_path / "end.ckpt", plain_module())
    assert torch.equal(served.get_parameter("first.weight"), module.first.weight)


def test_states_of_other_callbacks_are_left_alone() -> None:
    module = nn.Linear(2, 1, bias=False)
    content = {
        "state_dict": {"weight": torch.ones(1, 2)},
        "callbacks": {
            "ModelCheckpoint": {"best_model_path": "", "masks": None},
            "Other": {"masks": "painted"},
            "Pruning": {"masks": {"weight": pack_mask(torch.tensor([[True, False]]))}},
        },
    }
    assert load_folded(content, module).weight.tolist() == [[1.0, 0.0]]


def test_tied_weights_may_be_there_once() -> None:
    module = nn.ModuleDict({"one": nn.Linear(2, 2, bias=False), "two": nn.Linear(2, 2, bias=False)})
    with pytest.raises(ValueError, match=r"'two.weight' has shape \(2, 2\) in the module and None in the checkpoint"):
        load_folded({"state_dict": {"one.weight": torch.eye(2)}}, module)
    module["two"].weight = module["one"].weight
    load_folded({"state_dict": {"one.weight": torch.eye(2)}}, module)
    assert module["two"].weight.tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert module["two"].weight is module["one"].weight


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_no_state_dict_is_refused(tmp_path: Path) -> None:
    torch.save({"weights": torch.ones(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"expected a Trainer's checkpoint with a 'state_dict', found \['weights'\]"):
        load_folded(tmp_path / "other.pt", plain_module())


@pytest.mark.parametrize(
    "state_dict",
    [{"first.weight": torch.ones(8, 6)}, {"layer.weight": torch.ones(1)}, {"first.weight": torch.ones(2, 2)}],
)
def test_another_model_is_refused(state_dict: dict[str, Tensor]) -> None:
    module = plain_module()
    before = weights_of(module)
    with pytest.raises(ValueError, match="expected a checkpoint of ModuleDict, got another in the checkpoint: 'first."):
        load_folded({"state_dict": state_dict}, module)
    # the weights that would have fitted are not written either
    assert all(torch.equal(weights_of(module)[name], before[name]) for name in before)


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    (tmp_path / "empty.ckpt").touch()
    for name in ("text.ckpt", "empty.ckpt"):
        with pytest.raises(ValueError, match=f"expected a checkpoint that loads with weights_only=True, got .*{name}"):
            load_folded(tmp_path / name, plain_module())
    torch.save(torch.ones(1), tmp_path / "tensor.ckpt")
    with pytest.raises(ValueError, match="expected a Trainer's checkpoint, got a Tensor"):
        load_folded(tmp_path / "tensor.ckpt", plain_module())


@pytest.mark.parametrize("part", [0.01, 0.3, 0.5, 0.9])
def test_a_checkpoint_that_is_cut_off_is_refused(part: float, tmp_path: Path) -> None:
    trained([], tmp_path)
    content = (tmp_path / "end.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(content[: int(part * len(content))])
    with pytest.raises(ValueError, match="expected a checkpoint that loads with weights_only=True, got .*cut.ckpt"):
        load_folded(tmp_path / "cut.ckpt", plain_module())


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="gone.ckpt"):
        load_folded(tmp_path / "gone.ckpt", plain_module())


def test_hyperparameters_load_too(tmp_path: Path) -> None:
    class WithHyperparameters(SavesAtEnd):
        def __init__(self, width: int = 8, names: tuple[str, ...] = ("a",)) -> None:
            super().__init__()
            self.save_hyperparameters()

    module = seeded(WithHyperparameters)
    module.folder = tmp_path
    quiet_trainer(prune_half(fold=True)).fit(module, loader())
    served = load_folded(tmp_path / "end.ckpt", plain_module())
    assert torch.equal(served.get_parameter("first.weight"), module.first.weight)
