"""What the sparsity monitor logs, and when."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger

from lightning_fedsparse.callbacks import ErrorFeedback, MagnitudePruning, SparsityMonitor
from lightning_fedsparse.callbacks.sparsity_monitor import zero_fractions
from lightning_fedsparse.schedules import ConstantSchedule, LinearSchedule
from tests.effective_reference import Net, loader, quiet_trainer, seeded

NAMES = {"sparsity", "sparsity/first.weight", "sparsity/second.weight"}


class Memory(Logger):
    """Keeps what it is told."""

    name = "memory"
    version = 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        row = {name: value for name, value in metrics.items() if name.startswith("sparsity")}
        if row:
            self.rows.append(row)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...


def logged(callbacks: list[pl.Callback], **options: Any) -> list[dict[str, float]]:
    memory = Memory()
    quiet_trainer(callbacks, logger=memory, **options).fit(seeded(Net), loader())
    return memory.rows


def test_zero_fractions_of_four_weights() -> None:
    weights = {"a": torch.tensor([0.0, 1.0, -0.0]), "b": torch.tensor([0.5])}
    assert zero_fractions(weights) == {"sparsity": 0.5, "sparsity/a": pytest.approx(2 / 3), "sparsity/b": 0.0}


def test_the_effective_sparsity_is_logged_once_while_it_stays() -> None:
    # the masks never move after step 0; feedback keeps the stored weights dense all the while
    pruning = MagnitudePruning(ConstantSchedule(0.25), every=1000, end=1.0, include=["first.weight"])
    rows = logged([pruning, ErrorFeedback(), SparsityMonitor()], max_epochs=3)
    first, *later = rows
    assert first.keys() == NAMES
    assert first["sparsity"] == pytest.approx(12 / 72)
    assert first["sparsity/first.weight"] == 0.25
    assert first["sparsity/second.weight"] == 0.0
    assert later == []


def test_what_changes_is_logged_again() -> None:
    pruning = MagnitudePruning(LinearSchedule(0.25, 0.75), every=5, end=1.0, include=["first.weight"])
    rows = logged([pruning, ErrorFeedback(), SparsityMonitor()], max_epochs=3)
    # masks of steps 0, 5 and 10; the last epoch ends after the final pruning
    assert [row["sparsity/first.weight"] for row in rows] == pytest.approx([12 / 48, 20 / 48, 36 / 48])
    assert [sorted(row) for row in rows[1:]] == [["sparsity", "sparsity/first.weight"]] * 2


@pytest.mark.parametrize("position", [0, 1, 2])
def test_the_place_in_the_list_does_not_matter_in_a_trainer(position: int) -> None:
    callbacks: list[pl.Callback] = [MagnitudePruning(LinearSchedule(0.25, 0.75), every=5, end=1.0), ErrorFeedback()]
    callbacks.insert(position, SparsityMonitor())
    assert [row["sparsity"] for row in logged(callbacks)] == pytest.approx([18 / 72, 54 / 72])


def test_a_dense_model_is_logged_as_dense() -> None:
    (row,) = logged([SparsityMonitor()])
    assert row == dict.fromkeys(NAMES, 0.0)


def test_the_selection_is_what_is_watched() -> None:
    (row,) = logged([SparsityMonitor(exclude=["second*"])])
    assert row == {"sparsity": 0.0, "sparsity/first.weight": 0.0}


def test_a_second_fit_logs_again() -> None:
    monitor = SparsityMonitor()
    assert logged([monitor]) == logged([monitor])


def test_other_callbacks_can_monitor_it(tmp_path: Path) -> None:
    pruning = MagnitudePruning(LinearSchedule(0.25, 0.75), every=5, end=1.0)
    saver = ModelCheckpoint(tmp_path, monitor="sparsity", mode="max")
    quiet_trainer([pruning, SparsityMonitor(), saver], enable_checkpointing=True).fit(seeded(Net), loader())
    assert saver.best_model_score == pytest.approx(0.75)


def test_a_glob_that_matches_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="conv"):
        logged([SparsityMonitor(include=["conv*"])])
