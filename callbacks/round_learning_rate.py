"""A learning rate per round: every optimizer's rate times a factor that depends on the round.

FedDIP's released code runs plain SGD at ``0.1 * 0.998**round``. Clients build their optimizers anew in every round, so
a scheduler of the LightningModule sees local steps only; this callback is what acts over rounds. In a plain Trainer an
epoch plays the part of a round. A scheduler of the user's own goes on working: its base rates are scaled too.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from typing_extensions import override

from lightning_fedsparse.callbacks.base import SparsityCallback
from lightning_fedsparse.schedules import ExponentialSchedule, Progress, Schedule

__all__ = ["RoundLearningRate"]


class RoundLearningRate(SparsityCallback):
    """Multiply the learning rate of every optimizer by a factor per round (per epoch in a plain Trainer).

    Args:
        schedule: Factor over the rounds, positive; ``ExponentialSchedule(1.0, 0.998)`` if None.
    """

    def __init__(self, schedule: Schedule | None = None) -> None:
        super().__init__()
        self.schedule = schedule or ExponentialSchedule(1.0, 0.998)
        self._applied = 1.0

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._applied = 1.0

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.client_round is not None:
            progress = self.client_round.progress
        else:
            epochs = trainer.max_epochs
            progress = Progress(trainer.current_epoch, epochs if epochs and epochs > 0 else float("inf"))
        factor = self.schedule(progress)
        if factor <= 0:
            raise ValueError(f"expected a positive learning rate factor, got {factor} from {self.schedule}")
        # a ratio, because schedulers derive the next rate from the present one
        ratio = factor / self._applied
        if ratio != 1:
            for optimizer in trainer.optimizers:
                for group in optimizer.param_groups:
                    # beside the rate itself, the rates that schedulers keep in the group
                    for key in ("lr", "initial_lr", "max_lr", "min_lr"):
                        if key in group:
                            group[key] *= ratio
            for config in trainer.lr_scheduler_configs:
                for key in ("base_lrs", "max_lrs"):
                    if hasattr(config.scheduler, key):
                        setattr(config.scheduler, key, [rate * ratio for rate in getattr(config.scheduler, key)])
        self._applied = factor

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"applied": self._applied}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._applied = state_dict["applied"]
