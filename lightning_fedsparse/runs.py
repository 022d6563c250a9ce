"""A recipe in a run folder: built, saved beside its results, run or continued."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_fedsparse.durable import TEMPORARY
from lightning_fedsparse.launching import environment_rank, may_restart
from lightning_fedsparse.locking import LOCK_NAME, locked
from lightning_fedsparse.loop import FederatedLoop
from lightning_fedsparse.quiet import quiet_lightning
from lightning_fedsparse.recipe import RECIPE_NAME, Recipe, RecipeError
from lightning_fedsparse.run_folder import RunFolder

__all__ = ["FederatedRun", "PlainRun", "Run", "fresh_folder", "make_run"]


class Run(ABC):
    """A recipe's objects, built, with the folder where they leave their results.

    Args:
        recipe: What to run.
        folder: The run folder.
    """

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.recipe = recipe
        self.folder = folder

    @property
    def checkpoint(self) -> Path:
        """Where the run's last checkpoint is, once there is one."""
        return self.folder / "checkpoints" / "last.ckpt"

    @abstractmethod
    def fit(self, *, resume: bool) -> dict[str, float]:
        """Train, from the start or from the last checkpoint, and write the resolved recipe as soon as that is known to fit.

        Returns:
            What is left to report: metrics that were not shown on the way.

        Raises:
            KeyboardInterrupt: On Ctrl-C, after what was done is saved.
        """


class FederatedRun(Run):
    """A run of ``FederatedLoop``, which shows and records its rounds itself."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        super().__init__(recipe, folder)
        built = recipe.build()
        self._model, self._data = built["model"], built["data"]
        try:
            self.loop = FederatedLoop(**{**built["loop"], "default_root_dir": folder})
        except (ValueError, TypeError) as error:
            raise RecipeError(str(error)) from error
        self.loop.recipe = recipe.resolved

    def fit(self, *, resume: bool) -> dict[str, float]:
        """See :meth:`Run.fit`."""
        self.loop.fit(self._model, self._data, ckpt_path="last" if resume else None)
        return {}


class PlainRun(Run):
    """A run of ``lightning.pytorch.Trainer``: the same callbacks without federation."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        super().__init__(recipe, folder)
        built = recipe.build()
        self._model, self._data = built["model"], built["data"]
        with quiet_lightning():
            self.trainer = pl.Trainer(**self._arguments(built["trainer"]))

    def fit(self, *, resume: bool) -> dict[str, float]:
        """See :meth:`Run.fit`; also tests, where there is a test set."""
        last = self.checkpoint if resume and self.checkpoint.is_file() else None
        with locked(self.folder), quiet_lightning():
            try:
                self.trainer.fit(self._model, datamodule=self._data, ckpt_path=last)
            except SystemExit as stop:
                # what Lightning makes of Ctrl-C
                raise KeyboardInterrupt from stop
            metrics = dict(self.trainer.callback_metrics)
            if is_overridden("test_step", self._model) and is_overridden("test_dataloader", self._data):
                self.trainer.test(self._model, datamodule=self._data, verbose=False)
                metrics |= self.trainer.callback_metrics
        return {name: float(torch.as_tensor(value)) for name, value in metrics.items()}

    def _arguments(self, given: Mapping[str, Any]) -> dict[str, Any]:
        # with a recipe's own words over these, all that a run writes is in its folder
        arguments = {
            "logger": CSVLogger(self.folder, name="logs"),
            "enable_progress_bar": sys.stderr.isatty(),
            "enable_model_summary": False,
            **given,
            "default_root_dir": self.folder,
        }
        if arguments.get("enable_checkpointing", True):
            last = ModelCheckpoint(self.folder / "checkpoints", save_top_k=0, save_last=True)
            arguments["callbacks"] = [*(arguments.get("callbacks") or []), last]
        arguments["callbacks"] = [*(arguments.get("callbacks") or []), _KeepRecipe(self.folder, self.recipe.resolved)]
        return arguments


class _KeepRecipe(pl.Callback):
    """Writes the recipe when training starts: a checkpoint that does not fit, and a run that is finished, come before."""

    def __init__(self, folder: Path, text: str) -> None:
        self._folder = RunFolder(folder)
        self._text = text

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._folder.keep_recipe(self._text)


def make_run(recipe: Recipe, folder: Path) -> Run:
    """Build a recipe: all that can be wrong in its values is found here."""
    return FederatedRun(recipe, folder) if recipe.section == "loop" else PlainRun(recipe, folder)


def fresh_folder(recipe: Recipe) -> Path:
    """Return where a new run goes: what the recipe says, else ``runs/NAME``, ``runs/NAME-2``, ...

    Under ``torchrun`` it is the first rank's folder that counts, and a restarted run goes on in it.

    Raises:
        RecipeError: If the recipe asks for a folder that holds a run, or does not say which a restart is to find.
    """
    restarts = recipe.section == "loop" and may_restart()
    if recipe.folder is None and restarts:
        raise RecipeError(
            "expected the run folder with torchrun --max-restarts, for a restart to find it, got none: add "
            "--loop.default_root_dir=FOLDER"
        )
    if recipe.folder is not None:
        # where it may be a restart, the loop knows whether it is one
        if environment_rank() == 0 and not restarts and _is_taken(recipe.folder):
            raise RecipeError(
                f"expected an empty or new run folder, found a run in {recipe.folder}: continue it with "
                f"`fedsparse resume {recipe.folder}` or name another"
            )
        return recipe.folder
    folder, number = Path("runs", recipe.name), 1
    while _is_taken(folder):
        number += 1
        folder = Path("runs", f"{recipe.name}-{number}")
    return folder


def _is_taken(folder: Path) -> bool:
    # what a run leaves that failed before its first record
    start = {RECIPE_NAME, LOCK_NAME}
    return folder.is_dir() and any(path.name not in start and path.suffix != TEMPORARY for path in folder.iterdir())
