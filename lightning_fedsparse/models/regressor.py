"""A LightningModule that trains any network to predict one number."""

from typing import Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics import MeanSquaredError

from lightning_fedsparse.models.supervised import Batch, Supervised, plain_sgd

__all__ = ["Regressor"]


class Regressor(Supervised):
    """Mean squared error on the output of a network.

    Validation and test log ``val_rmse`` and ``test_rmse``, the root of the mean squared error over all examples, in the
    targets' own unit.

    Args:
        network: Maps inputs to numbers of shape (n, 1).
        optimizer: Makes the optimizer from the parameters; SGD with learning rate 0.1 by default.
        lr_scheduler: Makes a learning rate schedule from the optimizer, stepped after each epoch; None for none.
        scale: What an output of 1 means in the targets' unit, so that the network sees numbers of the order of 1.

    Raises:
        ValueError: If ``scale`` is not positive.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: OptimizerCallable = plain_sgd,
        lr_scheduler: LRSchedulerCallable | None = None,
        *,
        scale: float = 1.0,
    ) -> None:
        super().__init__(network, optimizer, lr_scheduler)
        if not scale > 0:
            raise ValueError(f"expected a positive scale of the targets, got {scale}")
        self.scale = scale
        # of this process alone: one that synchronises hangs where one process evaluates alone
        self._error = MeanSquaredError(squared=False, sync_on_compute=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map inputs to numbers of shape (n,), in the targets' unit."""
        return super().forward(inputs).squeeze(1) * self.scale

    def training_step(self, batch: Batch) -> Tensor:
        """Return the mean squared error of a batch, in squares of ``scale``."""
        inputs, targets = batch
        return F.mse_loss(self(inputs) / self.scale, targets / self.scale)

    def validation_step(self, batch: Batch) -> None:
        """Add a batch to the error of the epoch."""
        inputs, targets = batch
        self._error.update(self(inputs), targets)

    def test_step(self, batch: Batch) -> None:
        """Add a batch to the error of the epoch."""
        self.validation_step(batch)

    def on_validation_epoch_end(self) -> None:
        """Log ``val_rmse``."""
        self._log("val")

    def on_test_epoch_end(self) -> None:
        """Log ``test_rmse``."""
        self._log("test")

    @torch.no_grad()
    def _log(self, part: Literal["val", "test"]) -> None:
        self.log(f"{part}_rmse", self._error.compute(), sync_dist=True)
        self._error.reset()
