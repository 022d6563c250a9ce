"""The user's module as the federation's global model: what is evaluated between rounds and returned at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl

from lightning_fedsparse.data import FederatedDataModule
from lightning_fedsparse.evaluation import recalibrate
from lightning_fedsparse.federation import Federation
from lightning_fedsparse.ranks import Ranks
from lightning_fedsparse.seeding import derive_seed
from lightning_fedsparse.server import ServerState

__all__ = ["GlobalModel"]


class GlobalModel:
    """Writes the server's state into the user's module, as forward uses it.

    Where statistics are measured anew, a submodel gets its own, which are not the whole model's, over the same clients' data.

    Args:
        module: The user's.
        federation: Whose state it is, and whose methods make effective weights of it.
        data: The clients, for statistics that are measured anew.
        trainer: Keyword arguments of the clients' Trainer.
        measured: Whether BatchNorm statistics are measured anew over the cohort's data after each round.
        seed: Of the federation.
        ranks: Of whom the first one measures.
    """

    def __init__(
        self,
        module: pl.LightningModule,
        federation: Federation,
        data: FederatedDataModule,
        trainer: Mapping[str, Any],
        *,
        measured: bool,
        seed: int,
        ranks: Ranks,
    ) -> None:
        self._module = module
        self._federation = federation
        self._data = data
        self._trainer = trainer
        self._measured = measured
        self._seed = seed
        self._ranks = ranks

    def end_round(self, cohort: Sequence[str]) -> None:
        """Take in which clients trained it last, and measure its statistics over their data where that is asked for."""
        self._federation.cohort = list(cohort)
        if self._measured:
            if self._ranks.rank == 0:
                self.load()
                self._measure(self._module)
            buffers = ServerState.of(self._module).buffers
            self._federation.state.buffers = self._ranks.deal([buffers] * self._ranks.size)

    def load(self, capacity: float | None = None) -> None:
        """Write the global model, or its submodel of a capacity, into the user's module."""
        self.load_into(self._module, capacity)

    def load_into(self, module: pl.LightningModule, capacity: float | None) -> None:
        """Write the global model, or its submodel of a capacity, into a module of the same names."""
        self._federation.state.load_into(module)
        for method in self._federation.methods:
            method.to_effective_(dict(module.named_parameters()), capacity)
        if capacity is not None and self._measured and self._federation.cohort:
            self._measure(module)

    def _measure(self, module: pl.LightningModule) -> None:
        cohort = self._federation.cohort
        clients = [self._data.client(client_id) for client_id in cohort]
        recalibrate(module, clients, self._trainer, seed=derive_seed(self._seed, "statistics", *cohort))
