"""Evaluation of the global model through the user's own ``validation_step`` and ``test_step``."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, TypeAlias

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_fedsparse.capacities import require_capacity
from lightning_fedsparse.clients import Client
from lightning_fedsparse.data import FederatedDataModule
from lightning_fedsparse.generators import own_generators
from lightning_fedsparse.quiet import QUIET_TRAINER, quiet_lightning
from lightning_fedsparse.seeding import derive_seed

__all__ = ["Evaluation", "Evaluator", "evaluate", "evaluate_clients", "recalibrate"]

Load: TypeAlias = Callable[[float | None], None]
"""Writes the global model into the module: its submodel of a capacity, or what clients without one hold."""


@dataclass(frozen=True)
class Evaluation:
    """When and on what the global model is evaluated.

    Args:
        split: ``"validation"`` or ``"test"``: the data module's loaders of that name; ``"none"``: on no data of all.
        every: Rounds between evaluations; the first and the last round are always evaluated.
        clients: Also evaluate on every client's own validation data, with the submodel of its capacity, and report mean
            and minimum over clients.
        capacities: Also evaluate the submodels of these capacities, trained or not, as ``NAME@CAPACITY``.

    The limits among the clients' Trainer arguments hold here too: ``limit_val_batches`` and ``limit_test_batches`` cap what is
    evaluated, of all data as of each client's. But with a ``limit_val_batches`` of 0, which keeps clients from validating
    while they train, all is evaluated.
    """

    split: Literal["validation", "test", "none"] = "validation"
    every: int = 1
    clients: bool = False
    capacities: Sequence[float] = ()

    def __post_init__(self) -> None:
        """Check the values."""
        if self.split not in ("validation", "test", "none"):
            raise ValueError(f"expected split 'validation', 'test' or 'none', got {self.split!r}")
        if self.every < 1:
            raise ValueError(f"expected evaluation every 1 or more rounds, got every={self.every}")
        # a list from a recipe and a tuple from Python are the same
        capacities = tuple(require_capacity(capacity, "to evaluate at") for capacity in self.capacities)
        object.__setattr__(self, "capacities", capacities)

    def is_due(self, done: int, total: int) -> bool:
        """Whether to evaluate after ``done`` of ``total`` rounds."""
        return (self.split != "none" or self.clients) and (done % self.every == 0 or done == total)


class Evaluator:
    """Evaluates the global model when it is due.

    Args:
        module: Where ``load`` writes the global model.
        data: The federation's data; its own loaders are for the global model.
        evaluation: When and on what.
        trainer: Keyword arguments of the clients' Trainer, for its accelerator, precision and the like.
        seed: Of the federation.
    """

    def __init__(
        self,
        module: pl.LightningModule,
        data: FederatedDataModule,
        evaluation: Evaluation,
        trainer: Mapping[str, Any],
        *,
        seed: int,
    ) -> None:
        self._module = module
        self._data = data
        self._evaluation = evaluation
        self._trainer = trainer
        self._seed = seed
        # a loader itself is not asked: it need not have a length
        self._on_all = evaluation.split == "test" or (
            evaluation.split == "validation" and data.val_dataloader() not in (None, [])
        )
        if evaluation.split == "validation" and not self._on_all and not evaluation.clients:
            warnings.warn(
                "the global model is not evaluated: evaluation has split='validation' and there is no validation data; give "
                "the data module a val_dataloader or set split='test' or split='none'",
                stacklevel=4,
            )

    def is_due(self, done: int, total: int) -> bool:
        """Whether to evaluate after ``done`` of ``total`` rounds."""
        return (self._on_all or self._evaluation.clients) and self._evaluation.is_due(done, total)

    def run(self, load: Load, done: int) -> dict[str, float]:
        """Metrics of the global model after ``done`` rounds; the module then holds whatever was evaluated last.

        What a step or a loader draws follows from the seed and the round, and is the same for every capacity.
        """
        metrics: dict[str, float] = {}
        seed = derive_seed(self._seed, "evaluation", done)
        for capacity in (None, *self._evaluation.capacities) if self._on_all else ():
            assert self._evaluation.split != "none"
            load(capacity)
            with own_generators(seed):
                found = evaluate(self._module, self._data, self._evaluation.split, self._trainer)
            metrics |= {f"{name}{_at(capacity)}": value for name, value in found.items()}
        if self._evaluation.clients:
            with own_generators(seed):
                metrics |= evaluate_clients(self._module, self._data, self._trainer, load)
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
    runner = _trainer(trainer)
    run = runner.validate if split == "validation" else runner.test
    with quiet_lightning():
        run(module, datamodule=data, verbose=False)
    data.trainer = None  # it would travel to worker processes with the data
    return _scalars(runner.callback_metrics)


def evaluate_clients(
    module: pl.LightningModule, data: FederatedDataModule, trainer: Mapping[str, Any], load: Load
) -> dict[str, float]:
    """Run ``validation_step`` over every client's own validation data, with the submodel of its capacity.

    Returns:
        For each metric that the module logs its mean and its minimum over the clients for which it is finite, as
        ``clients/NAME/mean`` and ``clients/NAME/min``; where capacities differ, also over the clients of each:
        ``clients/NAME/mean@CAPACITY``.

    Raises:
        ValueError: If a client has no validation data.
    """
    runner = _trainer(trainer)  # to build one takes longer than many a client's evaluation
    members: dict[float | None, list[str]] = {}
    for client_id in data.client_ids:
        members.setdefault(data.client(client_id).capacity, []).append(client_id)
    rows: dict[float | None, list[dict[str, float]]] = {}
    for capacity, client_ids in members.items():
        load(capacity)
        rows[capacity] = [_validate_client(runner, module, data.client(client_id)) for client_id in client_ids]
    summary = _over_clients([row for level in rows.values() for row in level])
    if len(rows) > 1:
        for capacity, level in rows.items():
            summary |= {f"{name}{_at(capacity)}": value for name, value in _over_clients(level).items()}
    return summary


def recalibrate(
    module: pl.LightningModule, clients: Sequence[Client], trainer: Mapping[str, Any], *, seed: int = 0
) -> None:
    """Replace the running statistics of every BatchNorm layer by those of the module's weights on clients' data.

    The averages are cumulative over all batches (static BatchNorm: Diao et al., "HeteroFL", ICLR 2021, section 3), and
    the batches go through the user's own ``validation_step``, so that any batch layout works; ``seed`` fixes their order.
    No limit of the Trainer arguments leaves any out.
    """
    runner = _trainer({**trainer, **_ALL_BATCHES}, [_Recalibration()])
    with own_generators(seed), _cumulative(_batch_norms(module)):
        _validate(runner, module, _TrainingData(clients))


_ALL_BATCHES = {"limit_val_batches": 1.0, "overfit_batches": 0.0}  # the clients' limits are for validation data


class _TrainingData:
    """The clients' training batches, one client after the other."""

    def __init__(self, clients: Sequence[Client]) -> None:
        self._clients = clients

    def __iter__(self) -> Iterator[Any]:
        return chain.from_iterable(client.train_loader() for client in self._clients)


class _Recalibration(pl.Callback):
    """BatchNorm layers gather statistics, everything else evaluates."""

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for layer in _batch_norms(pl_module):
            layer.train()  # Lightning puts modes back at the end


@contextmanager
def _cumulative(layers: Sequence[_BatchNorm]) -> Iterator[None]:
    """Have statistics start anew, and average over all batches alike."""
    momenta = [layer.momentum for layer in layers]
    try:
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum


def _batch_norms(module: nn.Module) -> list[_BatchNorm]:
    return [layer for layer in module.modules() if isinstance(layer, _BatchNorm) and layer.track_running_stats]


def _validate_client(runner: pl.Trainer, module: pl.LightningModule, client: Client) -> dict[str, float]:
    loader = client.val_loader()
    if loader is None:
        raise ValueError(
            f"expected validation data of every client, client {client.id!r} has none: set validation_fraction, or give "
            "each client a LightningDataModule with a val_dataloader"
        )
    return _validate(runner, module, loader)


def _over_clients(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            values.setdefault(name, []).append(value)
    return {
        f"clients/{name}/{kind}": value
        for name, found in values.items()
        for kind, value in (("mean", sum(found) / len(found)), ("min", min(found)))
    }


def _at(capacity: float | None) -> str:
    return "" if capacity is None else f"@{capacity:g}"


def _validate(runner: pl.Trainer, module: pl.LightningModule, loader: Iterable[Any]) -> dict[str, float]:
    with quiet_lightning():
        runner.validate(module, dataloaders=loader, verbose=False)
    return _scalars(runner.callback_metrics)


def _trainer(trainer: Mapping[str, Any], callbacks: list[pl.Callback] | None = None) -> pl.Trainer:
    # the clients' own callbacks act on clients; a limit of 0 there means that clients skip validation
    arguments = {**QUIET_TRAINER, **trainer, "callbacks": callbacks, "logger": False}
    if arguments["limit_val_batches"] == 0:
        del arguments["limit_val_batches"]
    with quiet_lightning():
        return pl.Trainer(**arguments)


def _scalars(metrics: Mapping[str, Tensor]) -> dict[str, float]:
    values = {name: float(torch.as_tensor(value)) for name, value in metrics.items()}
    return {name: value for name, value in values.items() if math.isfinite(value)}
