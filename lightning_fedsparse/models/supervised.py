"""What the recipes' LightningModules have in common: a network and its optimizer."""

from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

__all__ = ["Batch", "Supervised", "plain_sgd"]

Batch = tuple[Tensor, Tensor]


def plain_sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """SGD with learning rate 0.1; a function, not a lambda, so that a model holding it pickles."""
    return torch.optim.SGD(parameters, lr=0.1)


class Supervised(LightningModule, ABC):
    """A network that learns from inputs and targets.

    Training logs nothing, for a log call costs a good part of a small step.

    Args:
        network: Maps inputs to outputs.
        optimizer: Makes the optimizer from the parameters; SGD with learning rate 0.1 by default.
        lr_scheduler: Makes a learning rate schedule from the optimizer, stepped after each epoch; None for none.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: OptimizerCallable = plain_sgd,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler

    @abstractmethod
    def training_step(self, batch: Batch) -> Tensor:
        """Return the loss of a batch."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Map inputs to outputs."""
        outputs: Tensor = self.network(inputs)
        return outputs

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimizer, and the schedule if there is one."""
        optimizer = self.optimizer(self.parameters())
        if self.lr_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self.lr_scheduler(optimizer)}
