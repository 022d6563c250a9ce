"""FederatedLoop: the eight steps of a round, and nothing else.

::

    for round in 0..rounds-1:
        1 sample       clients of this round, from (seed, round)
        2 broadcast    state -> bytes, per client
        3 train        Trainer.fit with the client's callbacks
        4 update       what changed, on its mask; callbacks may transform it
        5 upload       update -> bytes
        6 aggregate    streaming, in cohort order
        7 server step  optimizer on the mean update; masks move
        8 record       RoundRecord -> JSONL, loggers, table; checkpoint

Steps 3 to 5 are the client's (:mod:`lightning_fedsparse.client`): what crosses between is bytes. Under ``torchrun`` every rank
runs all of this, but for 3 to 5 only with its part of the cohort (:mod:`lightning_fedsparse.ranks`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger
from torch import Tensor

from lightning_fedsparse.aggregation import Aggregator, MaskedMean, WeightedMean
from lightning_fedsparse.callbacks.base import CallbackList
from lightning_fedsparse.capacities import require_capacity
from lightning_fedsparse.checkpointing import Checkpointing
from lightning_fedsparse.checks import require_at_least_one
from lightning_fedsparse.client import ClientJob
from lightning_fedsparse.clients import Client
from lightning_fedsparse.console import Console
from lightning_fedsparse.counting_wire import CountingWire
from lightning_fedsparse.data import FederatedDataModule
from lightning_fedsparse.evaluation import Evaluation, evaluate
from lightning_fedsparse.executors.local import Executor, LocalExecutor
from lightning_fedsparse.faults import FaultPolicy
from lightning_fedsparse.intake import Intake, UploadReader
from lightning_fedsparse.launching import environment_size
from lightning_fedsparse.loop_arguments import fault_policy, require_parts, trainer_arguments
from lightning_fedsparse.meeting import joined_ranks
from lightning_fedsparse.memories import ClientMemories, HeldMemories
from lightning_fedsparse.rank_rules import require_ranks_can_share, with_own_device
from lightning_fedsparse.receiving import Receiver
from lightning_fedsparse.records import RoundRecord
from lightning_fedsparse.rounds import ServerRound, UploadRule
from lightning_fedsparse.run import Run
from lightning_fedsparse.run_folder import RunFolder
from lightning_fedsparse.sampling import sample_cohort
from lightning_fedsparse.screening import Screen
from lightning_fedsparse.seeding import derive_seed
from lightning_fedsparse.server import OptimizerFactory, ServerState
from lightning_fedsparse.tally import RoundTally
from lightning_fedsparse.threads import torch_threads
from lightning_fedsparse.update import SparseUpdate
from lightning_fedsparse.wire import Wire

__all__ = ["FederatedLoop"]


class FederatedLoop:
    """Federated training of a LightningModule over many clients, with real sparse bytes between them.

    Args:
        rounds: Rounds to run, at least 1.
        clients_per_round: Clients that take part in each round.
        callbacks: Methods, such as ``feddip()``; none is dense FedAvg.
        trainer: Keyword arguments of the clients' ``lightning.pytorch.Trainer``, such as ``{"max_epochs": 5}`` (local
            epochs, 1 if neither epochs nor steps are given). Plain Lightning callbacks go here; every client round gets
            pristine copies of them.
        aggregator: How updates are merged; if None, ``MaskedMean`` where the method's clients hold different parts of
            the model, else ``WeightedMean()`` (FedAvg).
        server_optimizer: Makes the server's optimizer on the pseudo-gradient; SGD with learning rate 1 if None.
        executor: Where client rounds run; in this process if None.
        wire: How values travel each way, and over what links; without loss and without times if None. ``"count"`` encodes
            nothing and counts bytes: :class:`~lightning_fedsparse.counting_wire.CountingWire`.
        logger: Lightning loggers that get every round's scalars, with rounds as steps.
        faults: What becomes of a round when clients fail; if None, it counts while one client returns.
        screen: Bounds on an upload beside those of the cohort; none if None.
        evaluation: When and on what the global model is evaluated.
        buffers: BatchNorm statistics and other buffers: ``"average"`` over the clients; ``"local"``, each client keeps
            its own and the global ones stay as they were initialized; ``"recalibrate"``, averaged, then BatchNorm
            statistics measured anew with the aggregated weights over the cohort's training data.
        seed: All randomness follows from (seed, round, client).
        fresh_trainer: Build a new Trainer for every client round, for callbacks that change the Trainer for good; the
            result is the same, each client round takes about 3 ms longer.
        threads: Torch threads of the run; part of what makes results repeatable to the bit.
        memories: Where clients' memories are kept between rounds; in this process if None, else ``SpilledMemories``.
        checkpointing: When the federation is saved and which checkpoints stay; after every round and the latest if None.
        default_root_dir: Run folder for ``history.jsonl`` and ``checkpoints/``; nothing is written if None.
        console: Show a progress bar, one row per round and a closing summary.
        rank_timeout: Under ``torchrun``, seconds that a rank waits for the others: for the longest part of a cohort, or for an
            evaluation.

    Attributes:
        history: The records so far.
        recipe: The resolved recipe that the loop was made from, as YAML, for its folder and its checkpoints; None without.
    """

    def __init__(
        self,
        rounds: int,
        clients_per_round: int,
        callbacks: CallbackList | Sequence[pl.Callback] | None = None,
        trainer: Mapping[str, Any] | None = None,
        *,
        aggregator: Aggregator | None = None,
        server_optimizer: OptimizerFactory | None = None,
        executor: Executor | None = None,
        wire: Wire | Literal["count"] | None = None,
        logger: Logger | Sequence[Logger] | None = None,
        faults: FaultPolicy | None = None,
        screen: Screen | None = None,
        evaluation: Evaluation | None = None,
        buffers: Literal["average", "local", "recalibrate"] = "average",
        seed: int = 0,
        fresh_trainer: bool = False,
        threads: int = 1,
        memories: ClientMemories | None = None,
        checkpointing: Checkpointing | None = None,
        default_root_dir: str | Path | None = None,
        console: bool = True,
        rank_timeout: float = 3600.0,
    ) -> None:
        require_at_least_one(rounds=rounds, clients_per_round=clients_per_round, threads=threads)
        if buffers not in ("average", "local", "recalibrate"):
            raise ValueError(f"expected buffers to be 'average', 'local' or 'recalibrate', got {buffers!r}")
        if not 0 < rank_timeout < math.inf:
            raise ValueError(f"expected a rank_timeout above 0 seconds, got {rank_timeout}")
        wire = CountingWire() if wire == "count" else wire
        require_parts(
            trainer=trainer,
            callbacks=callbacks,
            aggregator=aggregator,
            executor=executor,
            wire=wire,
            faults=faults,
            screen=screen,
            evaluation=evaluation,
            memories=memories,
            checkpointing=checkpointing,
        )
        self.rounds = rounds
        self.clients_per_round = clients_per_round
        self.callbacks, self.trainer = trainer_arguments(callbacks, trainer)
        self.aggregator = aggregator
        self.executor = executor or LocalExecutor()
        self.faults = fault_policy(faults, aggregator, clients_per_round)
        self.screen = screen
        self.executor.check(clients_per_round + self.faults.oversample)
        self.wire = wire or Wire()
        self.loggers = [logger] if isinstance(logger, Logger) else list(logger or [])
        self.evaluation = evaluation or Evaluation()
        self.buffers = buffers
        self.seed = seed
        self.fresh_trainer = fresh_trainer
        self.threads = threads
        self.memories = HeldMemories() if memories is None else memories
        self.folder = RunFolder(default_root_dir, checkpointing)
        self.console = Console(rounds, quiet=not console)
        self.history: list[RoundRecord] = []
        self.recipe: str | None = None
        self.server_optimizer = server_optimizer
        self.rank_timeout = rank_timeout

    def fit(
        self,
        model: pl.LightningModule,
        data: FederatedDataModule,
        ckpt_path: str | Path | None = None,
    ) -> list[RoundRecord]:
        """Run the rounds; afterwards ``model`` holds the global weights.

        Args:
            model: The user's module: its weights are where the federation starts.
            data: The clients.
            ckpt_path: A checkpoint of the same federation to go on from; ``"last"`` is the run folder's latest, and what a
                process goes on from that ``torchrun`` has restarted.

        Returns:
            One record per round, round 0 first.

        Raises:
            TypeError: If ``model`` is no ``lightning.pytorch`` module or ``data`` is no ``FederatedDataModule``.
            ValueError: If the cohort is larger than the population, a method finds nothing to do, or the checkpoint is
                damaged or not of this federation.
            TooFewClientsError: If too few clients of a round return and ``faults`` says to stop; its cause is what the first
                client that raised did raise.
            OSError: If the run folder can't be written; what was saved before is as it was.
            RuntimeError: If another run is at work in the run folder.
            RankLostError: If another rank ended, or was not heard of in time.
        """
        require_ranks_can_share(self, environment_size())
        with joined_ranks(self.rank_timeout) as ranks:
            self.history = []
            self._run = run = Run(self, model, data, ranks)
            with run.recorder.locked(), torch_threads(self.threads):
                self.history = run.restore(ckpt_path)
                self._rounds()
        run.recorder.console.summary(self.history)
        return self.history

    def _rounds(self) -> None:
        run = self._run
        done = self.history[-1].round if self.history else 0
        try:
            run.recorder.console.start(self.history)
            if not self.history:
                self._record(done, RoundTally(), {}, time.perf_counter())
            for index in range(done, self.rounds):
                self._round(index)
        except (KeyboardInterrupt, SystemExit) as stop:
            # Lightning turns Ctrl-C inside a fit into SystemExit; the last whole round is what counts
            run.recorder.console.interrupted(self.folder.saved)
            raise KeyboardInterrupt from stop
        finally:
            self.executor.stop()
            run.recorder.console.stop()
            run.worker.release()
            run.model.load()

    @property
    def state(self) -> ServerState:
        """The server's state, once ``fit`` has begun.

        Raises:
            RuntimeError: Before.
        """
        return self._begun().federation.state

    def load_submodel(self, model: pl.LightningModule, capacity: float) -> None:
        """After ``fit``: write the global model's submodel of a capacity into a module, as a client of it uses it.

        With ``buffers="recalibrate"`` it gets BatchNorm statistics of its own, over the last cohort's data, as it is evaluated.
        """
        require_capacity(capacity, "of the submodel")
        with torch_threads(self.threads):
            self._begun().model.load_into(model, capacity)

    def _begun(self) -> Run:
        if not hasattr(self, "_run"):
            raise RuntimeError(
                "expected fit() before the global model is asked for, got a FederatedLoop that never ran"
            )
        return self._run

    def validate(self, model: pl.LightningModule, data: pl.LightningDataModule) -> dict[str, float]:
        """Evaluate a module on the data module's global validation loaders."""
        return evaluate(model, data, "validation", with_own_device(self.trainer))

    def test(self, model: pl.LightningModule, data: pl.LightningDataModule) -> dict[str, float]:
        """Evaluate a module on the data module's global test loaders."""
        return evaluate(model, data, "test", with_own_device(self.trainer))

    # -- one round -------------------------------------------------------------------------------------------------

    def _round(self, index: int) -> None:
        started = time.perf_counter()
        run = self._run
        run.ranks.moment = f"round {index + 1}"
        tally = RoundTally(accept=self.faults.accept)
        server_round = ServerRound(index, self.rounds, derive_seed(self.seed, "server", index))
        run.data.start_round(server_round.progress)
        rule = self._upload_rule(server_round)
        updates = self._collect(server_round, rule, tally)
        mean = self._aggregate(updates, rule, index + 1, tally)
        if mean is not None:
            self._server_step(mean, server_round, tally.merged)
        tally.evicted_memories = self.memories.end_round(index + 1, tally.down)
        self._record(index + 1, tally, server_round.metrics, started)

    def _upload_rule(self, server_round: ServerRound) -> UploadRule:
        rules = [
            (type(method).__name__, rule)
            for method in self._run.methods
            if (rule := method.upload_rule(self._run.federation.state, server_round)) is not None
        ]
        if len({rule for _, rule in rules}) > 1:
            raise ValueError(f"expected methods that agree on what an upload holds, got {rules}")
        return rules[0][1] if rules else UploadRule()

    def _collect(self, server_round: ServerRound, rule: UploadRule, tally: RoundTally) -> Iterator[SparseUpdate]:
        """Steps 1 to 5: ask clients, and others if too few return; give the updates that count, in the order asked."""
        run = self._run
        reader = UploadReader(run.federation.state, self.wire, rule)
        intake = Intake(self.faults, self.clients_per_round, reader, self.screen, run.ranks)
        show = run.recorder.console.failure
        receiver = Receiver(run.federation, run.methods, intake, server_round, tally, show, run.ranks, run.shards)
        asked: dict[str, Client] = {}
        while not intake.enough and tally.tries < self.faults.tries:
            cohort = sample_cohort(
                run.data.client_ids,
                (intake.missing, self.faults.oversample),
                seed=self.seed,
                round_index=server_round.index,
                attempt=tally.tries,
                asked=asked,
            )
            if not cohort:  # nobody is left to ask
                break
            asked |= {client_id: run.data.client(client_id) for client_id in cohort}
            tally.tries += 1
            mine = run.shards.mine([asked[client_id] for client_id in cohort])
            jobs = self._broadcast(server_round.index, cohort, mine, asked, tally)
            yield from receiver.receive(self.executor.run(run.worker, jobs), filter(mine.__contains__, cohort))
        receiver.close()

    def _broadcast(
        self, index: int, cohort: Sequence[str], mine: Collection[str], asked: Mapping[str, Client], tally: RoundTally
    ) -> Iterator[ClientJob]:
        """What every client of the cohort is sent; jobs for those that are trained here."""
        run = self._run
        broadcaster = run.federation.broadcaster
        seed = derive_seed(self.seed, "broadcast", index)
        broadcaster.start(run.federation.state, list(asked.values()), run.methods, seed)
        for client_id in cohort:
            sent = broadcaster.send(asked[client_id])
            tally.down[client_id] = sent.traffic
            if client_id not in mine:
                # its client may be another rank's today and this one's tomorrow
                run.worker.hold([broadcaster.support(client_id)], broadcaster.kept_versions)
                continue
            yield ClientJob(
                client_id,
                index,
                self.rounds,
                derive_seed(self.seed, "client", index, client_id),
                sent.payload,
                sent.reference_id,
                self.memories.get(client_id, {}),
                broadcaster.kept_versions,
                self.faults.deadline,
            )

    def _aggregate(
        self, updates: Iterable[SparseUpdate], rule: UploadRule, number: int, tally: RoundTally
    ) -> dict[str, Tensor] | None:
        """The mean of the updates; None if there are too few and the round is skipped."""
        run = self._run
        aggregator = self.aggregator or (MaskedMean(rule.weighting) if rule.absent == "unheld" else WeightedMean())
        aggregator.start(run.federation.state.tensors)
        for update in updates:
            aggregator.add(update)
        if len(tally.merged) >= self.faults.min_clients:
            if run.ranks.size > 1:
                aggregator.reduce(run.ranks)
            return aggregator.result()
        ever = any(record.clients_returned for record in self.history)
        if self.faults.when_fewer == "stop" or not (ever or tally.unused):
            raise tally.too_few(self.faults.min_clients, number) from tally.error
        tally.skipped = True
        return None

    def _server_step(self, mean: Mapping[str, Tensor], server_round: ServerRound, cohort: Sequence[str]) -> None:
        run = self._run
        for method in run.methods:
            method.on_server_received(run.federation.state, server_round, run.ranks.total)
        run.federation.optimizer.step(run.federation.state, mean)
        for method in run.methods:
            run.federation.state = method.on_server_round_end(run.federation.state, server_round)
        run.model.end_round(cohort)

    def _record(self, done: int, tally: RoundTally, metrics: Mapping[str, float], started: float) -> None:
        run = self._run
        # else other builds of torch, or other kinds of processors, would drift apart unseen
        run.ranks.require_same("the same weights and masks", run.federation.digest)
        evaluated = {}
        if run.ranks.rank == 0 and run.evaluator.is_due(done, self.rounds):
            evaluated = run.evaluator.run(run.model.load, done)
        evaluated, seconds = run.ranks.share((evaluated, time.perf_counter() - started))[0]
        record = tally.record(
            done,
            last=self.history[-1] if self.history else None,
            sparsity=run.federation.state.prunable_sparsity,
            seconds=seconds,
            metrics={**metrics, **evaluated},
            wire=self.wire,
        )
        self.history.append(record)
        run.recorder.keep(self.history, self.rounds, lambda: {"recipe": run.recipe, **run.federation.state_dict()})
        if done and (evaluated or not run.evaluator.is_due(self.rounds, self.rounds)):
            self.folder.checkpointing.require_monitor(self.history)
