"""What comes back from a round's clients: held against what was asked, read, checked, and merged if it counts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from lightning_fedsparse.accounting import Traffic, size_in_bytes
from lightning_fedsparse.callbacks.base import SparsityCallback
from lightning_fedsparse.client import ClientResult
from lightning_fedsparse.executors.local import Outcome
from lightning_fedsparse.failures import ClientFailure, FailedClient, FailureReason
from lightning_fedsparse.federation import Federation
from lightning_fedsparse.intake import Intake, Upload
from lightning_fedsparse.payload import PayloadError
from lightning_fedsparse.ranks import Ranks
from lightning_fedsparse.rounds import ServerRound
from lightning_fedsparse.sharding import Shards
from lightning_fedsparse.tally import RoundTally
from lightning_fedsparse.update import SparseUpdate

__all__ = ["Receiver"]


class Receiver:
    """Takes what becomes of a round's clients, and gives the updates that are to be merged, in the order asked.

    A client's round happens when its update is merged, for its memory as for the model. One whose upload can't be read is
    taken to hold no masks: nobody knows what has arrived there.

    Where several ranks have a part of the cohort each, they tell each other, whenever all that were asked have been heard, what
    they have counted: every rank then knows the whole round.

    Args:
        federation: The server's memory.
        methods: They see every update that is merged.
        intake: Decides which uploads count.
        server_round: The round.
        tally: Counts.
        show: Called with each failed client's id, its failure and how many have failed by now.
        ranks: The processes that take part.
        shards: Who of them has which client's memory.
    """

    def __init__(
        self,
        federation: Federation,
        methods: Sequence[SparsityCallback],
        intake: Intake,
        server_round: ServerRound,
        tally: RoundTally,
        show: Callable[[str, ClientFailure, int], None],
        ranks: Ranks,
        shards: Shards,
    ) -> None:
        self._federation = federation
        self._methods = methods
        self._intake = intake
        self._reader = intake.reader
        self._round = server_round
        self._tally = tally
        self._show = show
        self._ranks = ranks
        self._shards = shards
        self._part = RoundTally()

    def receive(self, outcomes: Iterable[Outcome], clients: Iterable[str]) -> Iterator[SparseUpdate]:
        """Take what becomes of the clients that were just asked, on this rank."""
        self._part = RoundTally()
        silent = dict.fromkeys(clients)
        for outcome in outcomes:
            if outcome.index != self._round.index or outcome.client_id not in silent:
                self._part.strays += 1
                continue
            del silent[outcome.client_id]
            if isinstance(outcome, FailedClient):
                self._lose(outcome.client_id, outcome.failure)
                self._part.error = self._part.error or outcome.error
            elif (upload := self._check(outcome)) is not None:
                yield from map(self._merge, self._intake.add(upload))
        for client_id in silent:
            self._lose(client_id, ClientFailure(FailureReason.NO_UPLOAD, "expected an upload, nothing came"))
        yield from map(self._merge, self._intake.settle(list(self._tally.down)))
        self._tell()

    def close(self) -> None:
        """The round's last client has been heard: count what is not merged."""
        self._intake.close()
        self._part = RoundTally()
        for client_id, sentence in self._intake.refused.items():
            self._fail(client_id, ClientFailure(FailureReason.SCREENED, sentence))
        self._tally.add([self._part])
        self._tally.unused = self._intake.unused

    def _tell(self) -> None:
        """Count what all ranks have counted."""
        self._part.references = self._shards.references(self._part.merged)
        # an error can't always be sent: it stays with its rank, whose own the traceback is
        self._tally.error = self._tally.error or self._part.error
        parts = self._ranks.share(replace(self._part, error=None))
        number = len(self._tally.failures) + len(self._part.failures)
        for rank, part in enumerate(parts):
            self._shards.learn(rank, part.references)
            for client_id in part.lost:
                self._federation.broadcaster.forget(client_id)
            if rank != self._ranks.rank:
                for client_id, failure in part.failures.items():
                    number += 1
                    self._show(client_id, failure, number)
        self._tally.add(parts)
        self._intake.count(len(self._tally.merged))

    def _check(self, result: ClientResult) -> Upload | None:
        """An upload that can be read and is in time."""
        client_id, payload = result.client_id, result.payload
        support = self._federation.broadcaster.support(client_id)
        dense = size_in_bytes(self._federation.state.tensors)
        try:
            update = self._reader.decode(payload, support)
        except PayloadError as error:
            self._part.up[client_id] = Traffic.of_refused(
                len(payload) if isinstance(payload, bytes) else 0, dense=dense
            )
            self._lose(client_id, ClientFailure(FailureReason.INVALID_UPLOAD, str(error)))
            return None
        self._part.up[client_id] = up = self._reader.wire.measure(
            payload, update, schema=self._reader.schema, reference=support, dense=dense
        )
        transfer = self._reader.wire.transfer(client_id, self._tally.down[client_id], up).transfer_seconds
        seconds = result.seconds + (transfer or 0.0)
        deadline = self._intake.policy.deadline
        if deadline is not None and seconds > deadline:
            sentence = f"expected its upload within {deadline:g} seconds, it took {seconds:.4g}"
            self._fail(client_id, ClientFailure(FailureReason.LATE, sentence))
            return None
        return Upload(client_id, payload, support, result.memory, seconds, self._reader.meaning(update))

    def _merge(self, upload: Upload) -> SparseUpdate:
        update = self._reader.read(upload)
        if upload.memory:
            self._federation.memories.put(upload.client_id, upload.memory)
        self._part.merged.append(upload.client_id)
        self._part.add_loss(update)
        for method in self._methods:
            method.on_server_receive(self._federation.state, self._round, update)
        return update

    def _fail(self, client_id: str, failure: ClientFailure) -> None:
        self._part.failures[client_id] = failure
        self._show(client_id, failure, len(self._tally.failures) + len(self._part.failures))

    def _lose(self, client_id: str, failure: ClientFailure) -> None:
        """Fail a client of which nothing readable came."""
        self._part.lost.append(client_id)
        self._fail(client_id, failure)
