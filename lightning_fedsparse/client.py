"""One client's round: state in, ``Trainer.fit``, update out.

A :class:`ClientWorker` is the client's side of the wire. It sees bytes, the client's data and the client's memory, and
nothing of the server: masks arrive with the broadcast only.
"""

from __future__ import annotations

import copy
import sys
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from lightning_fedsparse.callbacks.base import SparsityCallback
from lightning_fedsparse.data import FederatedDataModule
from lightning_fedsparse.generators import own_generators
from lightning_fedsparse.last_few import LastFew
from lightning_fedsparse.quiet import quiet_lightning
from lightning_fedsparse.resident import ResidentTrainer, restored
from lightning_fedsparse.rounds import ClientRound
from lightning_fedsparse.schedules import Progress
from lightning_fedsparse.schema import Schema
from lightning_fedsparse.seeding import derive_seed
from lightning_fedsparse.training_loss import TrainingLoss
from lightning_fedsparse.update import MaskSet, SparseUpdate, gather, scatter_
from lightning_fedsparse.wire import Message, Wire

__all__ = ["KEPT_MASK_VERSIONS", "ClientJob", "ClientResult", "ClientWorker"]

# For each capacity in the cohort; a client that missed more versions gets full positions again.
KEPT_MASK_VERSIONS = 4

_KEPT_BROADCASTS = 4  # read ones; in a round clients of one capacity mostly get the same


@dataclass(frozen=True)
class ClientJob:
    """What a worker needs to run one client's round.

    Args:
        client_id: Id of the client.
        index: Round, from 0.
        total: Rounds of the federation.
        seed: Seed of this client in this round.
        payload: Broadcast, as the wire carries it.
        reference_id: Id of the masks that the broadcast leans on, if it leans on any.
        memory: What the client's callbacks remember, by their state key.
        kept_versions: How many mask versions to hold from now on.
        deadline: Seconds after which the round has no use for it any more; None if it waits.
    """

    client_id: str
    index: int
    total: int
    seed: int
    payload: Message
    reference_id: str | None
    memory: Mapping[str, Any] = field(default_factory=dict)
    kept_versions: int = KEPT_MASK_VERSIONS
    deadline: float | None = None


@dataclass(frozen=True)
class ClientResult:
    """What came back from one client's round.

    Args:
        client_id: Id of the client.
        payload: Upload, as the wire carries it.
        memory: What the client's callbacks remember until its next round, by their state key.
        seconds: Wall time of the client's round.
        index: The round, from 0.
    """

    client_id: str
    payload: Message
    memory: Mapping[str, Any]
    seconds: float
    index: int


class ClientWorker:
    """Runs client rounds one after the other on one resident module and Trainer.

    Args:
        module: The user's LightningModule; its weights are overwritten at each round's start.
        data: The clients' data.
        callbacks: Sparsity and plain Lightning callbacks; every client round gets pristine copies.
        trainer: Keyword arguments of the clients' ``Trainer``.
        wire: How values travel; without loss if None.
        local_buffers: Keep each client's buffers (BatchNorm statistics) on the client instead of sending them.
        fresh_trainer: Build a new Trainer for every client round.

    Attributes:
        schema: The module's tensors, which payloads leave unsaid.
    """

    def __init__(
        self,
        module: pl.LightningModule,
        data: FederatedDataModule,
        callbacks: Sequence[pl.Callback],
        trainer: Mapping[str, Any],
        *,
        wire: Wire | None = None,
        local_buffers: bool = False,
        fresh_trainer: bool = False,
    ) -> None:
        self.module = module
        self.data = data
        # it copies them now: what the server's own instances gather during the run stays with the server
        self._trainers = ResidentTrainer(trainer, [*callbacks, TrainingLoss()], fresh=fresh_trainer)
        self._wire = wire or Wire()
        self._local_buffers = local_buffers
        self._persistent = frozenset(module.state_dict())
        self.schema = Schema.of(dict(module.named_parameters()), self._buffers())
        self._masks: OrderedDict[str, MaskSet] = OrderedDict()
        self._received = LastFew[SparseUpdate](_KEPT_BROADCASTS)
        # beside what was moved what it was made of, which keeps its id from being given to another object
        self._moved = LastFew[tuple[SparseUpdate, SparseUpdate]](_KEPT_BROADCASTS)

    @property
    def parts(self) -> dict[str, Any]:
        """What it is made of, by what a user calls it."""
        trainers = self._trainers
        return {
            "the model": self.module,
            "the data": self.data,
            "callbacks": trainers.callbacks,
            "the Trainer's arguments": trainers.arguments,
        }

    def hold(self, versions: Iterable[MaskSet], kept: int) -> None:
        """Take mask versions that the clients are known to hold, oldest first, and keep the last of all."""
        for masks in versions:
            self._masks[masks.id] = masks
            self._masks.move_to_end(masks.id)
        while len(self._masks) > kept:
            self._masks.popitem(last=False)

    def run(self, job: ClientJob) -> ClientResult:
        """Run one client's round: :meth:`receive`, then :meth:`train`."""
        return self.train(job, self.receive(job))

    def receive(self, job: ClientJob) -> SparseUpdate:
        """Read a broadcast and hold its masks; clients of a round that get the same bytes read them once."""

        def decoded() -> SparseUpdate:
            reference = None if job.reference_id is None else self._masks[job.reference_id]
            return self._wire.decode(job.payload, schema=self.schema, reference=reference)

        broadcast = self._received.get((job.payload, job.reference_id), decoded)
        self.hold([_masks_of(broadcast)], job.kept_versions)
        return broadcast

    def train(self, job: ClientJob, broadcast: SparseUpdate) -> ClientResult:
        """Train a client on what it received; whatever that raises, the worker is ready for the next client.

        Raises:
            NoStepError: If an epoch has no batch, or the fit took no optimizer step.
            LossNotFiniteError: If its loss is not finite.
        """
        started = time.perf_counter()
        self.data.start_round(Progress(job.index, job.total))
        client = self.data.client(job.client_id)
        where = f"client {job.client_id!r} in round {job.index + 1}"
        with own_generators(job.seed), quiet_lightning(), self._cleared(where):
            trainer = self._trainers.next()
            methods = _methods_of(trainer)
            # from here on all tensors of this client's round are on the Trainer's device, until they are to leave it
            masks = self._load(job, broadcast)
            before = self._copy_weights() if self._wire.rounds_uploads else {}
            client_round = ClientRound(job.index, job.total, job.client_id, job.seed, masks, client.capacity)
            losses = next(callback for callback in trainer.callbacks if isinstance(callback, TrainingLoss))  # type: ignore[attr-defined]
            losses.where = where
            self._start_round(trainer, methods, client_round, job.memory)
            trainer.fit(self.module, train_dataloaders=client.train_loader(), val_dataloaders=client.val_loader())
            loss = losses.mean(trainer)
            update = self._make_update(job, masks, client.num_examples, loss)
            for method in methods:
                update = method.on_client_round_end(trainer, self.module, update)
            payload, read = self._wire.encode_upload(
                update.to(_HOST),
                before,
                schema=self.schema,
                reference=_masks_of(broadcast),
                seed=derive_seed(job.seed, "upload"),
            )
            read = read.to(self._trainers.device)
            for method in methods:
                method.on_client_upload(trainer, self.module, read)
        memory = {method.state_key: state for method in methods if (state := method.client_state_dict())}
        if self._local_buffers:
            memory[_BUFFERS] = {name: tensor.clone() for name, tensor in self._buffers().items()}
        memory = move_data_to_device(memory, _HOST)
        return ClientResult(job.client_id, payload, memory, time.perf_counter() - started, job.index)

    def release(self) -> None:
        """Take everything off the device on which clients train."""
        self._trainers.drop()
        self._received.clear()
        self._moved.clear()
        self.module.to(_HOST)

    @contextmanager
    def _cleared(self, where: str) -> Iterator[None]:
        """Leave nothing behind of a fit in the module, nor in the Trainer if it was cut off; name the client in what is raised."""
        try:
            with restored(self.module):
                yield
        except BaseException as error:
            trainer = self._trainers.drop()
            if trainer is not None:
                for method in _methods_of(trainer):
                    # once more: Lightning has not told it if the on_exception of a callback before it raises
                    with suppress(Exception):
                        method.on_exception(trainer, self.module, error)
            if sys.version_info >= (3, 11):  # the traceback then names the client
                error.add_note(f"raised in the training of {where}")
            raise

    def _load(self, job: ClientJob, broadcast: SparseUpdate) -> MaskSet:
        """Write what a client starts from into the module, on the Trainer's device; give the masks there."""
        device = self._trainers.device
        if device != _HOST:
            self.module.to(device)
            broadcast = self._on(device, broadcast)
        scatter_(dict(self.module.named_parameters()), broadcast)
        buffers = job.memory.get(_BUFFERS, broadcast.buffers) if self._local_buffers else broadcast.buffers
        with torch.no_grad():
            for name, buffer in self._buffers().items():
                buffer.copy_(buffers[name])
        return _masks_of(broadcast)

    def _on(self, device: torch.device, broadcast: SparseUpdate) -> SparseUpdate:
        """A broadcast on a device; clients of a round that get the same move it once."""
        return self._moved.get(id(broadcast), lambda: (broadcast, broadcast.to(device)))[1]

    def _start_round(
        self,
        trainer: pl.Trainer,
        methods: Sequence[SparsityCallback],
        client_round: ClientRound,
        memory: Mapping[str, Any],
    ) -> None:
        for method in methods:
            method.client_round = client_round
            if method.state_key in memory:
                # a copy: if the round fails, the client remembers what it did before
                state = copy.deepcopy(memory[method.state_key])
                method.load_client_state_dict(move_data_to_device(state, self._trainers.device))
        for method in methods:
            method.on_client_round_start(trainer, self.module, client_round)

    def _make_update(self, job: ClientJob, masks: MaskSet, num_examples: int, loss: float | None) -> SparseUpdate:
        return SparseUpdate(
            values=gather(dict(self.module.named_parameters()), masks),
            masks=masks,
            num_examples=num_examples,
            buffers={} if self._local_buffers else {name: b.detach().clone() for name, b in self._buffers().items()},
            metrics={} if loss is None else {"train_loss": loss},
            mask_id=None if masks.is_dense else masks.id,
        )

    def _copy_weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach().to(_HOST, copy=True) for name, parameter in self.module.named_parameters()}

    def _buffers(self) -> dict[str, Tensor]:
        return {name: buffer for name, buffer in self.module.named_buffers() if name in self._persistent}


_BUFFERS = "buffers"
_HOST = torch.device("cpu")


def _masks_of(broadcast: SparseUpdate) -> MaskSet:
    assert isinstance(broadcast.masks, MaskSet), "what was decoded has masks with an id"
    return broadcast.masks


def _methods_of(trainer: pl.Trainer) -> list[SparsityCallback]:
    return [callback for callback in trainer.callbacks if isinstance(callback, SparsityCallback)]  # type: ignore[attr-defined]
