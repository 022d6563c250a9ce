"""A LightningModule that trains any network to classify."""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_accuracy

__all__ = ["ImageClassifier", "plain_sgd"]

Batch = tuple[Tensor, Tensor]


def plain_sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """SGD with learning rate 0.1; a function, not a lambda, so that a model holding it pickles."""
    return torch.optim.SGD(parameters, lr=0.1)


class ImageClassifier(LightningModule):
    """Cross entropy on the logits of a network.

    Training logs nothing, for a log call costs a good part of a small step. Validation and test log ``val_loss``,
    ``val_accuracy``, ``test_loss`` and ``test_accuracy``, means over all images.

    Args:
        network: Maps images to logits of shape (n, classes).
        optimizer: Makes the optimizer from the parameters; SGD with learning rate 0.1 by default.
        lr_scheduler: Makes a learning rate schedule from the optimizer, stepped after each epoch; None for none.
        image_shape: Channels, height and width, for what looks at the network by running it once: Lightning's
            ``example_input_array`` is then such an image of zeros.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: OptimizerCallable = plain_sgd,
        lr_scheduler: LRSchedulerCallable | None = None,
        image_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        if image_shape is not None:
            self.example_input_array = torch.zeros(1, *image_shape)

    def forward(self, images: Tensor) -> Tensor:
        """Map images to logits of shape (n, classes)."""
        logits: Tensor = self.network(images)
        return logits

    def training_step(self, batch: Batch) -> Tensor:
        """Return the mean cross entropy of a batch of images and int64 classes of shape (n,)."""
        images, classes = batch
        return F.cross_entropy(self(images), classes)

    def validation_step(self, batch: Batch) -> None:
        """Log loss and accuracy under ``val_``."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Batch) -> None:
        """Log loss and accuracy under ``test_``."""
        self._evaluate(batch, "test")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimizer, and the schedule if there is one."""
        optimizer = self.optimizer(self.parameters())
        if self.lr_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self.lr_scheduler(optimizer)}

    def _evaluate(self, batch: Batch, part: str) -> None:
        images, classes = batch
        logits = self(images)
        # functional, not a metric object: those synchronise by themselves wherever torch.distributed runs, and hang
        # where one process evaluates alone
        accuracy = multiclass_accuracy(
            logits, classes, num_classes=logits.shape[1], average="micro", validate_args=False
        )
        # weighted by batch size, so a smaller last batch does not distort the mean
        self.log_dict(
            {f"{part}_loss": F.cross_entropy(logits, classes), f"{part}_accuracy": accuracy},
            batch_size=len(classes),
            sync_dist=True,
        )
