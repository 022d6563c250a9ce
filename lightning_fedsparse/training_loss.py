"""A client's mean training loss, and whether its fit was one."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Any

import lightning.pytorch as pl
from torch import Tensor
from typing_extensions import override

from lightning_fedsparse.failures import LossNotFiniteError, NoStepError

__all__ = ["TrainingLoss"]


class TrainingLoss(pl.Callback):
    """Adds up the training loss on its device and reads it once, at the end.

    Attributes:
        where: Client and round, for errors.
    """

    def __init__(self) -> None:
        self.where = ""
        self._empty = True
        self._sum: Tensor | None = None
        self._batches = 0

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._empty = True

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._empty = False

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._empty:
            # a fit that ends after a number of steps, or after a time, would wait for a batch for ever
            raise NoStepError(
                f"expected a batch in every epoch, got none in epoch {trainer.current_epoch + 1} of {self.where}: look at "
                "its loader, or its batch sampler"
            )

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):
            loss = loss.detach()
            if trainer.accumulate_grad_batches > 1:
                # Lightning has divided it for the backward pass
                loss = loss * trainer.accumulate_grad_batches
            self._sum = loss if self._sum is None else self._sum + loss
            self._batches += 1

    def mean(self, trainer: pl.Trainer) -> float | None:
        """The mean over the batches of the fit; None if no step returned a loss.

        Raises:
            NoStepError: If the fit took no optimizer step.
            LossNotFiniteError: If the mean is not finite.
        """
        if trainer.global_step == 0:
            raise NoStepError(
                f"expected at least one optimizer step, got none from {self.where}: its loader gave no batch, or the "
                "Trainer's limits (max_epochs, max_steps, limit_train_batches) allow none"
            )
        if self._sum is None:
            return None
        mean = float(self._sum) / self._batches
        if not isfinite(mean):
            raise LossNotFiniteError(
                f"expected a finite training loss, got {mean} from {self.where}: look for NaN in its data, or lower the learning rate"
            )
        return mean
