"""Models, data and a Trainer small enough for a conformance check: see :mod:`lightning_fedsparse.testing`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from lightning_fedsparse.quiet import QUIET_TRAINER, quiet_lightning

__all__ = ["EPOCHS", "Classifier", "ConvNet", "Mlp", "fit", "loader", "make"]

EPOCHS = 4
"""Epochs of every fit, of 32 examples each."""


class Classifier(pl.LightningModule):
    """Cross-entropy under SGD with momentum and decay; keeps the losses."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []
        self.example_input_array = torch.zeros(1, 1, 4, 4)

    @override
    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.losses.append(float(loss.detach()))
        return loss

    @override
    def configure_optimizers(self) -> SGD:
        return SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


class ConvNet(Classifier):
    """A convolution, BatchNorm and a linear layer over 4x4 images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(64, 3)

    @override
    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.conv(x))).flatten(1))  # type: ignore[no-any-return]


class Mlp(Classifier):
    """Two linear layers; nothing in it depends on the batch size."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 12)
        self.second = nn.Linear(12, 3)

    @override
    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x.flatten(1))))  # type: ignore[no-any-return]


Kind = TypeVar("Kind", bound=Classifier)


def make(kind: type[Kind]) -> Kind:
    """A module with the same initial weights at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return kind()


def loader(batch_size: int) -> DataLoader[Any]:
    """32 random images (float32, 1x4x4) and their classes (0 to 2), in batches; the same at every call."""
    generator = torch.Generator().manual_seed(5)
    count = 32
    x = torch.randn(count, 1, 4, 4, generator=generator)
    y = torch.randint(0, 3, (count,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=batch_size)


def fit(
    module: pl.LightningModule,
    callbacks: Sequence[pl.Callback],
    *,
    batch_size: int = 8,
    ckpt_path: Path | None = None,
    accumulate_grad_batches: int = 1,
) -> pl.Trainer:
    """Fit quietly on the CPU, from fixed generators; the global ones are as before afterwards."""
    with quiet_lightning(), torch.random.fork_rng():
        torch.manual_seed(9)
        trainer = pl.Trainer(
            **QUIET_TRAINER,
            max_epochs=EPOCHS,
            accelerator="cpu",
            accumulate_grad_batches=accumulate_grad_batches,
            callbacks=list(callbacks),
        )
        trainer.fit(module, loader(batch_size), ckpt_path=ckpt_path)
    return trainer
