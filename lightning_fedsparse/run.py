"""What a run of a ``FederatedLoop`` is made of, each part after those that it needs, and how it goes on from a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import lightning.pytorch as pl

from lightning_fedsparse.broadcasting import Broadcaster
from lightning_fedsparse.callbacks.base import SparsityCallback
from lightning_fedsparse.client import ClientWorker
from lightning_fedsparse.data import FederatedDataModule
from lightning_fedsparse.evaluation import Evaluator
from lightning_fedsparse.federation import Federation
from lightning_fedsparse.global_model import GlobalModel
from lightning_fedsparse.loop_arguments import require_model_and_data
from lightning_fedsparse.rank_rules import start_alike, with_own_device
from lightning_fedsparse.ranks import Ranks
from lightning_fedsparse.recording import Recorder
from lightning_fedsparse.records import RoundRecord
from lightning_fedsparse.resuming import recipe_of
from lightning_fedsparse.schedules import Progress
from lightning_fedsparse.server import ServerOptimizer, ServerState
from lightning_fedsparse.sharding import Shards

if TYPE_CHECKING:
    from lightning_fedsparse.loop import FederatedLoop

__all__ = ["Run"]


class Run:
    """The parts of one run.

    Args:
        loop: What to run.
        model: Where the federation starts.
        data: The clients.
        ranks: The processes that share the run.

    Attributes:
        data: The clients.
        ranks: The processes that share the run.
        methods: The callbacks that have a part on the server.
        federation: Everything that a round changes.
        shards: Which clients this process trains.
        recorder: Where rounds are told and kept.
        model: The global model in the user's module.
        evaluator: Measures it.
        worker: Trains clients in this process.
        recipe: What a checkpoint has to agree with.

    Raises:
        TypeError: See :meth:`FederatedLoop.fit`.
        ValueError: See :meth:`FederatedLoop.fit`.
    """

    def __init__(self, loop: FederatedLoop, model: pl.LightningModule, data: FederatedDataModule, ranks: Ranks) -> None:
        require_model_and_data(model, data)
        model.configure_model()
        start_alike(ranks, model, data)
        data.start_round(Progress(0, loop.rounds))
        self._loop = loop
        self.data = data
        self.ranks = ranks
        self.methods = [callback for callback in loop.callbacks if isinstance(callback, SparsityCallback)]
        self.federation = Federation(
            replace(ServerState.of(model), capacities=data.capacities),
            ServerOptimizer(loop.server_optimizer),
            Broadcaster(loop.wire),
            self.methods,
            loop.memories,
        )
        self.shards = Shards(ranks, loop.memories)
        self.recorder = Recorder(loop.folder, loop.loggers, loop.console, loop.memories, ranks, self.shards)
        trainer = with_own_device(loop.trainer)
        measured = loop.buffers == "recalibrate"
        self.model = GlobalModel(model, self.federation, data, trainer, measured=measured, seed=loop.seed, ranks=ranks)
        # a cohort larger than the population is an error now, not after the first evaluation
        loop.faults.check_population(loop.clients_per_round, len(data.client_ids))
        self.evaluator = Evaluator(model, data, loop.evaluation, trainer, seed=loop.seed)
        loop.wire.check(self.methods, data.client_ids)
        self.worker = ClientWorker(
            model,
            data,
            loop.callbacks,
            trainer,
            wire=loop.wire,
            local_buffers=loop.buffers == "local",
            fresh_trainer=loop.fresh_trainer,
        )
        self.federation.start(model, loop.seed)
        self.recipe = recipe_of(loop, data)
        ranks.require_same("the same recipe and clients", lambda: (self.recipe, data.client_ids, loop.rounds))

    def restore(self, ckpt_path: str | Path | None) -> list[RoundRecord]:
        """Go on from a checkpoint, if one is given; the records of the rounds done so far."""
        rounds = self._loop.rounds
        history = self.recorder.restore(ckpt_path, self.federation, self.recipe, rounds)
        done = history[-1].round if history else 0
        versions = self.federation.broadcaster.versions
        self.worker.hold(versions, kept=len(versions))
        self.data.start_round(Progress(done, rounds))
        if self._loop.recipe is not None and done < rounds:
            self.recorder.folder.keep_recipe(self._loop.recipe)
        return history
