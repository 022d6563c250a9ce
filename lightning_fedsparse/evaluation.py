"""Evaluation of the global model through the user's own ``validation_step`` and ``test_step``."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_fedsparse.data import Client, FederatedDataModule
from lightning_fedsparse.quiet import QUIET_TRAINER, quiet_lightning

__all__ = ["Evaluation", "Evaluator", "evaluate", "evaluate_clients", "recalibrate"]


@dataclass(frozen=True)
class Evaluation:
    """When and on what the global model is evaluated.

    Args:
        split: ``"validation"`` or ``"test"``: the data module's loaders of that name; ``"none"``: never.
        every: Rounds between evaluations; the first and the last round are always evaluated.
        clients: Also evaluate on every client's own validation data, and report mean and minimum over clients.
    """

    split: Literal["validation", "test", "none"] = "validation"
    every: int = 1
    clients: bool = False

    def __post_init__(self) -> None:
        """Check the period."""
        if self.every < 1:
            raise ValueError(f"expected evaluation every 1 or more rounds, got every={self.every}")

    def is_due(self, done: int, total: int) -> bool:
        """Whether to evaluate after ``done`` of ``total`` rounds."""
        return self.split != "none" and (done % self.every == 0 or done == total)


class Evaluator:
    """Evaluates the global model when it is due.

    Args:
        module: Where the global weights are written for it.
        data: The federation's data; its own loaders are for the global model.
        evaluation: When and on what.
        trainer: Keyword arguments of the clients' Trainer, for its accelerator, precision and the like.
    """

    def __init__(
        self, module: pl.LightningModule, data: FederatedDataModule, evaluation: Evaluation, trainer: Mapping[str, Any]
    ) -> None:
        self._module = module
        self._data = data
        self._evaluation = evaluation
        self._trainer = trainer
        self._possible = evaluation.split != "validation" or bool(data.val_dataloader())
        if not self._possible:
            warnings.warn(
                "the global model is not evaluated: evaluation has split='validation' and there is no validation data; give "
                "the data module a val_dataloader or set split='test' or split='none'",
                stacklevel=4,
            )

    def is_due(self, done: int, total: int) -> bool:
        """Whether to evaluate after ``done`` of ``total`` rounds."""
        return self._possible and self._evaluation.is_due(done, total)

    def run(self) -> dict[str, float]:
        """Metrics of what the module holds."""
        assert self._evaluation.split != "none"
        metrics = evaluate(self._module, self._data, self._evaluation.split, self._trainer)
        if self._evaluation.clients:
            metrics |= evaluate_clients(self._module, self._data, self._trainer)
        return metrics


def evaluate(
    module: pl.LightningModule,
    data: pl.LightningDataModule,
    split: Literal["validation", "test"],
    trainer: Mapping[str, Any],
) -> dict[str, float]:
    """Run ``validation_step`` or ``test_step`` over the data module's global loaders.

    Returns:
        The metrics that the module logged.
    """
    with quiet_lightning():
        runner = _trainer(trainer)
        run = runner.validate if split == "validation" else runner.test
        run(module, datamodule=data, verbose=False)
    return _scalars(runner.callback_metrics)


def evaluate_clients(
    module: pl.LightningModule, data: FederatedDataModule, trainer: Mapping[str, Any]
) -> dict[str, float]:
    """Run ``validation_step`` over every client's own validation data.

    Returns:
        For each metric that the module logs its mean and its minimum over the clients, as ``clients/NAME/mean`` and
        ``clients/NAME/min``.

    Raises:
        ValueError: If a client has no validation data.
    """
    rows = []
    for client_id in data.client_ids:
        loader = data.client(client_id).val_loader()
        if loader is None:
            raise ValueError(
                f"expected validation data of every client, client {client_id!r} has none: set validation_fraction"
            )
        rows.append(_validate(module, loader, trainer, []))
    return {
        f"clients/{name}/{kind}": value
        for name in rows[0]
        for kind, value in (
            ("mean", sum(row[name] for row in rows) / len(rows)),
            ("min", min(row[name] for row in rows)),
        )
    }


def recalibrate(module: pl.LightningModule, clients: Sequence[Client], trainer: Mapping[str, Any]) -> None:
    """Replace the running statistics of every BatchNorm layer by those of the module's weights on clients' data.

    The averages are cumulative over all batches (static BatchNorm: Diao et al., "HeteroFL", ICLR 2021, section 3), and
    the batches go through the user's own ``validation_step``, so that any batch layout works.
    """
    _validate(module, _TrainingData(clients), trainer, [_Recalibration()])


class _TrainingData:
    """The clients' training batches, one client after the other."""

    def __init__(self, clients: Sequence[Client]) -> None:
        self._clients = clients

    def __iter__(self) -> Iterator[Any]:
        return chain.from_iterable(client.train_loader() for client in self._clients)


class _Recalibration(pl.Callback):
    """BatchNorm layers gather statistics, everything else evaluates."""

    def __init__(self) -> None:
        self._momenta: dict[str, float | None] = {}

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for name, layer in _batch_norms(pl_module).items():
            self._momenta[name] = layer.momentum
            layer.reset_running_stats()
            layer.momentum = None
            layer.train()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for name, layer in _batch_norms(pl_module).items():
            layer.momentum = self._momenta[name]
            layer.eval()


def _batch_norms(module: nn.Module) -> dict[str, nn.modules.batchnorm._BatchNorm]:
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.track_running_stats
    }


def _validate(
    module: pl.LightningModule, loader: Iterable[Any], trainer: Mapping[str, Any], callbacks: list[pl.Callback]
) -> dict[str, float]:
    with quiet_lightning():
        runner = _trainer(trainer, callbacks)
        runner.validate(module, dataloaders=loader, verbose=False)
    return _scalars(runner.callback_metrics)


def _trainer(trainer: Mapping[str, Any], callbacks: list[pl.Callback] | None = None) -> pl.Trainer:
    # the clients' own callbacks act on clients; a limit of 0 there means that clients skip validation
    arguments = {**QUIET_TRAINER, **trainer, "callbacks": callbacks, "logger": False}
    if arguments["limit_val_batches"] == 0:
        del arguments["limit_val_batches"]
    return pl.Trainer(**arguments)


def _scalars(metrics: Mapping[str, Tensor]) -> dict[str, float]:
    values = {name: float(torch.as_tensor(value)) for name, value in metrics.items()}
    return {name: value for name, value in values.items() if math.isfinite(value)}
