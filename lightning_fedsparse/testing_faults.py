"""Faults on purpose: an executor around any other that makes clients fail, the same ones in every run.

To see what a policy, a screen or a method does when clients fail::

    faulty = FaultyExecutor(LocalExecutor(), RandomFaults(rate=0.3, seed=0))
    loop = FederatedLoop(20, 10, feddip(), executor=faulty, faults=FaultPolicy(min_clients=5, tries=3))

Clients really train: an exception comes when the module holds what nobody will get, a damaged upload was a good one before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, TypeAlias

import torch
from torch import Tensor
from typing_extensions import override

from lightning_fedsparse.client import ClientJob, ClientResult, ClientWorker
from lightning_fedsparse.executors.local import Executor, Outcome
from lightning_fedsparse.failures import ClientFailure, FailedClient, FailureReason
from lightning_fedsparse.payload import decode, encode
from lightning_fedsparse.schema import Schema
from lightning_fedsparse.seeding import derive_seed
from lightning_fedsparse.update import MaskSet, SparseUpdate
from lightning_fedsparse.wire import Message

__all__ = ["Fault", "FaultPlan", "FaultyExecutor", "InjectedError", "ListedFaults", "RandomFaults"]

FaultPlan: TypeAlias = Callable[[int, str], "Fault | None"]
"""What goes wrong with a client in a round (from 0), if anything does."""

_FACTOR = 1000.0  # by which an upload explodes
_DELAY = 3600.0  # seconds that a straggler seems to take longer


class Fault(str, Enum):
    """What can go wrong with one client's round."""

    RAISES = "raises"
    """Its training raises :class:`InjectedError`."""
    OUT_OF_MEMORY = "out_of_memory"
    """Its training raises ``MemoryError``."""
    DIES = "dies"
    """Reported as by an executor whose workers died of it."""
    TIMES_OUT = "times_out"
    """Reported as by an executor that ended it."""
    STRAGGLES = "straggles"
    """It takes an hour longer, as its result says."""
    DROPPED = "dropped"
    """Its result never comes."""
    CORRUPTED = "corrupted"
    """One bit of its upload is another."""
    NOT_FINITE = "not_finite"
    """Its upload holds a NaN."""
    EXPLODES = "explodes"
    """Its change is a thousand times as large."""
    REVERSED = "reversed"
    """Its change has the other sign."""
    TWICE = "twice"
    """Its result comes twice."""
    NEXT_ROUND = "next_round"
    """Its result comes when clients are asked the next time."""


class InjectedError(RuntimeError):
    """Raised in a client's training, on purpose."""


@dataclass(frozen=True)
class ListedFaults:
    """Faults by round (from 0) and client.

    Args:
        faults: ``{(round, client id): fault}``.
    """

    faults: Mapping[tuple[int, str], Fault]

    def __call__(self, index: int, client_id: str) -> Fault | None:
        """The fault of one client in one round."""
        return self.faults.get((index, client_id))


@dataclass(frozen=True)
class RandomFaults:
    """Each client round fails by chance, independently of all others and in the same way in every run.

    Args:
        rate: Share of client rounds with a fault, in [0, 1].
        seed: Of the draws.
        kinds: Each as likely as any other; by default all.
    """

    rate: float
    seed: int = 0
    kinds: Sequence[Fault] = field(default_factory=lambda: tuple(Fault))

    def __call__(self, index: int, client_id: str) -> Fault | None:
        """The fault of one client in one round."""
        draw = derive_seed(self.seed, "fault", index, client_id) / 2**63
        if draw >= self.rate:
            return None
        return self.kinds[derive_seed(self.seed, "kind", index, client_id) % len(self.kinds)]


class FaultyExecutor(Executor):
    """Run client rounds elsewhere, and let some go wrong.

    Args:
        executor: Where they run.
        plan: Which go wrong, and how; must pickle where the executor starts processes.
    """

    def __init__(self, executor: Executor, plan: FaultPlan) -> None:
        self.executor = executor
        self.plan = plan
        self._worker: _FaultyWorker | None = None
        self._late: list[Outcome] = []

    @override
    def check(self, clients: int) -> None:
        self.executor.check(clients)

    @override
    def stop(self) -> None:
        self.executor.stop()
        self._worker, self._late = None, []

    @override
    def run(self, worker: ClientWorker, jobs: Iterable[ClientJob]) -> Iterator[Outcome]:
        if self._worker is None or self._worker.worker is not worker:
            self._worker = _FaultyWorker(worker, self.plan)
        late, self._late = self._late, []
        yield from late
        for outcome in self.executor.run(self._worker, jobs):
            yield from self._pass_on(outcome)

    def _pass_on(self, outcome: Outcome) -> list[Outcome]:
        fault = self.plan(outcome.index, outcome.client_id)
        if fault == Fault.DROPPED:
            return []
        if fault == Fault.NEXT_ROUND:
            self._late.append(outcome)
            return []
        if fault == Fault.TWICE:
            return [outcome, outcome]
        if fault == Fault.STRAGGLES and isinstance(outcome, ClientResult):
            return [replace(outcome, seconds=outcome.seconds + _DELAY)]
        if fault == Fault.DIES:
            return [_failed(outcome, FailureReason.WORKER_DIED, "a worker that lives")]
        if fault == Fault.TIMES_OUT:
            return [_failed(outcome, FailureReason.TIMED_OUT, "a client in time")]
        return [outcome]


class _FaultyWorker(ClientWorker):
    """A worker whose training goes wrong where the plan says so."""

    def __init__(self, worker: ClientWorker, plan: FaultPlan) -> None:
        # not ClientWorker's: everything but what goes wrong is the other worker's
        self.worker = worker
        self._plan = plan

    @property
    @override
    def parts(self) -> dict[str, Any]:
        return {**self.worker.parts, "the plan of faults": self._plan}

    @override
    def receive(self, job: ClientJob) -> SparseUpdate:
        return self.worker.receive(job)

    @override
    def train(self, job: ClientJob, broadcast: SparseUpdate) -> ClientResult:
        result = self.worker.train(job, broadcast)
        fault = self._plan(job.index, job.client_id)
        if fault == Fault.RAISES:
            raise InjectedError(f"client {job.client_id!r} raises in round {job.index + 1}, as planned")
        if fault == Fault.OUT_OF_MEMORY:
            raise MemoryError(f"client {job.client_id!r} has no more memory in round {job.index + 1}, as planned")
        if fault == Fault.CORRUPTED:
            return replace(result, payload=_flip_a_bit(_bytes(result.payload)))
        if fault in (Fault.NOT_FINITE, Fault.EXPLODES, Fault.REVERSED):
            return replace(result, payload=_damaged(_bytes(result.payload), broadcast, self.worker.schema, fault))
        return result


def _failed(outcome: Outcome, reason: FailureReason, expected: str) -> FailedClient:
    sentence = f"expected {expected} in round {outcome.index + 1}, as planned there is none"
    return FailedClient(outcome.client_id, outcome.index, ClientFailure(reason, sentence))


def _bytes(payload: Message) -> bytes:
    if not isinstance(payload, bytes):
        raise TypeError(
            f"expected a wire that encodes, for a fault in an upload, got one that sends {type(payload).__name__}"
        )
    return payload


def _flip_a_bit(payload: bytes) -> bytes:
    middle = len(payload) // 2
    return payload[:middle] + bytes([payload[middle] ^ 1]) + payload[middle + 1 :]


def _damaged(payload: bytes, broadcast: SparseUpdate, schema: Schema, fault: Fault) -> bytes:
    """The same upload with other values, well-formed."""
    masks = broadcast.masks
    assert isinstance(masks, MaskSet), "a broadcast's masks have an id"
    update = decode(payload, schema=schema, reference=masks)
    values = {}
    for name, value in update.values.items():
        old = torch.zeros_like(value) if update.kind == "delta" else _at(broadcast, name, update)
        factor = {Fault.NOT_FINITE: float("nan"), Fault.EXPLODES: _FACTOR}.get(fault, -1.0)
        values[name] = old + factor * (value - old)
    return encode(replace(update, values=values), schema=schema, reference=masks)


def _at(broadcast: SparseUpdate, name: str, update: SparseUpdate) -> Tensor:
    """What the broadcast has at an upload's positions; zero where it has nothing."""
    mask, theirs = broadcast.masks[name], update.masks[name]
    value = broadcast.values[name]
    if mask is None:
        dense = value.reshape(-1)
    else:
        dense = torch.zeros(mask.numel(), dtype=value.dtype)
        dense[broadcast.positions(name)] = value
    return dense.view_as(update.values[name]) if theirs is None else dense[update.positions(name)]
