"""``FederatedLoop``, a round at a time, so that others' rounds stand between its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import lightning.pytorch as pl
import torch
from speed_work import SEED, Work
from torch import Tensor

from lightning_fedsparse import FederatedDataModule, FederatedLoop
from lightning_fedsparse.aggregation import WeightedMean
from lightning_fedsparse.evaluation import Evaluation
from lightning_fedsparse.executors import Executor, ProcessExecutor
from lightning_fedsparse.ranks import Alone
from lightning_fedsparse.run import Run

__all__ = ["Ours", "SentAs", "two_workers"]

SentAs: TypeAlias = Literal["count"] | None
"""Real payloads by None, nothing encoded by ``"count"``."""


class Ours:
    """A federation that is trained and never evaluated.

    Args:
        model: The LightningModule.
        data: The clients.
        cohort: Clients per round.
        rounds: Rounds of the run, for the schedules of methods; more may not be asked for.
        callbacks: The method.
        trainer: Arguments of the clients' Trainer.
        executor: Where clients train.
        wire: What they send.
    """

    def __init__(
        self,
        model: pl.LightningModule,
        data: FederatedDataModule,
        cohort: int,
        rounds: int,
        callbacks: Sequence[pl.Callback] = (),
        trainer: dict[str, Any] | None = None,
        executor: Executor | None = None,
        wire: SentAs = None,
    ) -> None:
        self.model = model
        self.loop = FederatedLoop(
            rounds,
            cohort,
            callbacks,
            trainer,
            executor=executor,
            wire=wire,
            aggregator=WeightedMean(dtype="float32"),  # as everybody here adds
            evaluation=Evaluation(split="none"),
            seed=SEED,
            console=False,
        )
        # what fit() does before its first round
        self.loop._run = Run(self.loop, model, data, Alone())
        self.loop.history = self.loop._run.restore(None)

    @classmethod
    def of(
        cls,
        work: Work,
        data: FederatedDataModule,
        rounds: int,
        callbacks: Sequence[pl.Callback] = (),
        *,
        executor: Executor | None = None,
        wire: SentAs = None,
        channels_last: bool = False,
        **trainer: Any,
    ) -> Ours:
        """A federation of a workload."""
        model = work.model(channels_last=channels_last)
        arguments = {"max_epochs": work.epochs, "accelerator": "cpu", **trainer}
        return cls(model, data, work.cohort, rounds, callbacks, arguments, executor, wire)

    def round(self, index: int) -> float:
        """Run a round, the next one; its seconds by the record."""
        self.loop._round(index)
        return self.loop.history[-1].seconds

    @property
    def weights(self) -> list[Tensor]:
        """The global model."""
        return list(self.loop.state.weights.values())

    def is_channels_last(self) -> bool:
        """Whether the weights that clients train are still laid out like that."""
        convolutions = [weight for weight in self.model.parameters() if weight.ndim == 4]
        return all(weight.is_contiguous(memory_format=torch.channels_last) for weight in convolutions)


def two_workers() -> ProcessExecutor:
    return ProcessExecutor(workers=2, pin=True)
