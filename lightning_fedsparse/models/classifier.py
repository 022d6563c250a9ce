"""LightningModules that train any network to classify: images, or the next character of a text."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_accuracy

from lightning_fedsparse.models.supervised import Batch, Supervised, plain_sgd

__all__ = ["ImageClassifier", "NextCharacter"]


class _Classifier(Supervised):
    """Cross entropy and accuracy, where classes are the second dimension of what forward returns."""

    def training_step(self, batch: Batch) -> Tensor:
        """Return the mean cross entropy of a batch of inputs and their int64 classes."""
        inputs, classes = batch
        return F.cross_entropy(self(inputs), classes)

    def validation_step(self, batch: Batch, batch_idx: int = 0, dataloader_idx: int = 0) -> None:
        """Log loss and accuracy under ``val_``; Lightning adds the number of the loader where there are several."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int = 0, dataloader_idx: int = 0) -> None:
        """Log loss and accuracy under ``test_``; Lightning adds the number of the loader where there are several."""
        self._evaluate(batch, "test")

    def _evaluate(self, batch: Batch, part: Literal["val", "test"]) -> None:
        inputs, classes = batch
        logits = self(inputs)
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


class ImageClassifier(_Classifier):
    """Cross entropy on the logits of a network.

    Training logs nothing, for a log call costs a good part of a small step. Validation and test log ``val_loss``,
    ``val_accuracy``, ``test_loss`` and ``test_accuracy``, means over all images.

    Args:
        network: Maps images to logits of shape (n, classes).
        optimizer: Makes the optimizer from the parameters; SGD with learning rate 0.1 by default.
        lr_scheduler: Makes a learning rate schedule from the optimizer, stepped after each epoch; None for none.
        image_shape: Channels, height and width, for what looks at the network by running it once: Lightning's
            ``example_input_array`` is then such an image of zeros.
        channels_last: Keep weights and images with their channels innermost, which convolutions on GPUs, and on CPUs in
            bfloat16, prefer; the result differs by rounding alone.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: OptimizerCallable = plain_sgd,
        lr_scheduler: LRSchedulerCallable | None = None,
        image_shape: Sequence[int] | None = None,
        channels_last: bool = False,
    ) -> None:
        super().__init__(network, optimizer, lr_scheduler)
        if image_shape is not None:
            self.example_input_array = torch.zeros(1, *image_shape)
        self._layout = torch.channels_last if channels_last else torch.contiguous_format
        self.network.to(memory_format=self._layout)  # type: ignore[call-overload]  # torch's hints lack it

    def forward(self, inputs: Tensor) -> Tensor:
        """Map images of shape (n, channels, height, width) to logits of shape (n, classes)."""
        return super().forward(inputs.contiguous(memory_format=self._layout))


class NextCharacter(_Classifier):
    """Cross entropy for text: at each position of a window the class is the character that follows.

    Validation and test log loss and accuracy as ``ImageClassifier`` does, means over all characters of windows of equal
    length.

    Args:
        network: Maps characters, int64 of shape (n, length), to logits of shape (n, length, symbols).
        optimizer: Makes the optimizer from the parameters; SGD with learning rate 0.1 by default.
        lr_scheduler: Makes a learning rate schedule from the optimizer, stepped after each epoch; None for none.
    """

    def forward(self, inputs: Tensor) -> Tensor:
        """Map characters of shape (n, length) to logits of shape (n, symbols, length), classes where torch has them."""
        return super().forward(inputs).movedim(2, 1)
