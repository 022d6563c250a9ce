"""One Trainer for many fits, as good as new before each.

Building a ``lightning.pytorch.Trainer`` takes longer than a short client's training. What a fit leaves behind in one is in
its loops (progress, loaders, limits reached), its callbacks and its gradient scaler. So before every fit the loops are built
anew, which takes a hundredth of the time, the callbacks are pristine copies and the scaler is as it was made; everything else
a fit sets up for itself.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torchmetrics import Metric
from typing_extensions import override

from lightning_fedsparse.quiet import QUIET_TRAINER

__all__ = ["ResidentDevice", "ResidentTrainer", "restored"]


class ResidentDevice(SingleDeviceStrategy):
    """A single device on which the module stays from fit to fit.

    After every fit Lightning's own strategy moves the module and its optimizers to the CPU and empties CUDA's cache, and
    before the next one it empties it again and moves the module back: with many short fits that is most of the time.
    """

    _ready = False

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        assert self.accelerator is not None
        assert self.model is not None
        if not self._ready:
            self.accelerator.setup(trainer)
            self._ready = True
        self.model = self.precision_plugin.convert_module(self.model)
        self.model_to_device()
        # optimizers are made from parameters that are there already
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    @override
    def teardown(self) -> None:
        self.precision_plugin.teardown()
        self.checkpoint_io.teardown()


class ResidentTrainer:
    """Hands out a Trainer that has never fitted anything, as far as any fit can tell.

    Args:
        arguments: Keyword arguments of the Trainer but its callbacks, over those that keep it quiet.
        callbacks: Callbacks of the Trainer; each fit gets copies of them as they are now.
        fresh: Build a Trainer for every fit, for callbacks that change the Trainer itself.

    Unless the arguments choose a strategy, a module stays on the Trainer's device between fits.

    Attributes:
        arguments: Of the Trainer, but for its callbacks.
        callbacks: What every fit gets copies of.
    """

    def __init__(
        self, arguments: Mapping[str, Any], callbacks: Sequence[pl.Callback] = (), *, fresh: bool = False
    ) -> None:
        self.arguments = {**QUIET_TRAINER, **arguments}
        self.callbacks = copy.deepcopy(list(callbacks))
        self._fresh = fresh
        self._trainer: pl.Trainer | None = None
        self._device: torch.device | None = None
        self._accumulate = 1
        self._precision: dict[str, Any] = {}

    @property
    def device(self) -> torch.device:
        """Where the module is between fits, once there was a Trainer."""
        return self._device or torch.device("cpu")

    def next(self) -> pl.Trainer:
        """The Trainer of the next fit; the one handed out before is not to be used any more."""
        if self._trainer is None or self._fresh:
            trainer = self._build()
            if not self._fresh:
                # in the Trainer's order, and with those that it has added by itself (max_time is one)
                self.callbacks = copy.deepcopy(trainer.callbacks)  # type: ignore[attr-defined]
                self._accumulate = trainer.accumulate_grad_batches
                self._precision = copy.deepcopy(trainer.precision_plugin.state_dict())
            self._trainer = trainer
            return trainer
        trainer = self._trainer
        trainer.callbacks = copy.deepcopy(self.callbacks)  # type: ignore[attr-defined]
        trainer.accumulate_grad_batches = self._accumulate  # a GradientAccumulationScheduler leaves its last value
        if self._precision:
            trainer.precision_plugin.load_state_dict(copy.deepcopy(self._precision))
        old = trainer.fit_loop
        trainer.fit_loop = type(old)(trainer, min_epochs=old.min_epochs, max_epochs=old.max_epochs)
        trainer.fit_loop.epoch_loop = type(old.epoch_loop)(
            trainer, min_steps=old.epoch_loop.min_steps, max_steps=old.epoch_loop.max_steps
        )
        return trainer

    def _build(self) -> pl.Trainer:
        resident = {} if self._device is None else {"strategy": ResidentDevice(self._device)}
        trainer = pl.Trainer(**{**self.arguments, **resident}, callbacks=copy.deepcopy(self.callbacks))
        # which device the arguments mean, only a Trainer knows; a strategy that they name is left alone
        chosen = self.arguments.get("strategy", "auto")
        if self._device is None and chosen == "auto" and type(trainer.strategy) is SingleDeviceStrategy:
            self._device = trainer.strategy.root_device
            return self._build()
        return trainer

    def drop(self) -> pl.Trainer | None:
        """Forget the Trainer, if there is one, and give it back: a fit that was cut off may have left anything in it."""
        dropped, self._trainer = self._trainer, None
        return dropped


@contextmanager
def restored(module: pl.LightningModule) -> Iterator[None]:
    """Put back what a fit may leave in a module, apart from its tensors: whether layers train and parameters are frozen.

    Fine-tuning unfreezes a backbone in its second epoch, and the next client begins with the first. A fit that is cut off
    also leaves layers in evaluation mode, a toggled optimizer's parameters frozen and metrics half full. Gradients the next
    fit drops by itself.
    """
    modes = [(layer, layer.training) for layer in module.modules()]
    frozen = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    try:
        yield
    except BaseException:
        for layer in module.modules():
            if isinstance(layer, Metric):
                layer.reset()
        raise
    finally:
        for layer, training in modes:
            if layer.training != training:
                layer.training = training
        for parameter, requires_grad in frozen:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
