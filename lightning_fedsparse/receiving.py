"""What comes back from a round's clients: held against what was asked, read, checked, and merged if it counts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from lightning_fedsparse.accounting import Traffic, size_in_bytes
from lightning_fedsparse.callbacks.base import SparsityCallback
from lightning_fedsparse.client import ClientResult
from lightning_fedsparse.executors.local import Outcome
from lightning_fedsparse.failures import ClientFailure, FailedClient, FailureReason
from lightning_fedsparse.federation import Federation
from lightning_fedsparse.intake import Intake, Upload
from lightning_fedsparse.payload import PayloadError
from lightning_fedsparse.rounds import ServerRound
from lightning_fedsparse.tally import RoundTally
from lightning_fedsparse.update import SparseUpdate

__all__ = ["Receiver"]


class Receiver:
    """Takes what becomes of a round's clients, and gives the updates that are to be merged, in the order asked.

    A client's round happens when its update is merged, for its memory as for the model. One whose upload can't be read is
    taken to hold no masks: nobody knows what has arrived there.

    Args:
        federation: The server's memory.
        methods: They see every update that is merged.
        intake: Decides which uploads count.
        server_round: The round.
        tally: Counts.
        show: Called with each failed client's id, its failure and how many have failed by now.
    """

    def __init__(
        self,
        federation: Federation,
        methods: Sequence[SparsityCallback],
        intake: Intake,
        server_round: ServerRound,
        tally: RoundTally,
        show: Callable[[str, ClientFailure, int], None],
    ) -> None:
        self._federation = federation
        self._methods = methods
        self._intake = intake
        self._reader = intake.reader
        self._round = server_round
        self._tally = tally
        self._show = show

    def receive(self, outcomes: Iterable[Outcome], cohort: Sequence[str]) -> Iterator[SparseUpdate]:
        """Take what becomes of the clients that were just asked."""
        silent = dict.fromkeys(cohort)
        for outcome in outcomes:
            if outcome.index != self._round.index or outcome.client_id not in silent:
                self._tally.strays += 1
                continue
            del silent[outcome.client_id]
            if isinstance(outcome, FailedClient):
                self._lose(outcome.client_id, outcome.failure)
                self._tally.error = self._tally.error or outcome.error
            elif (upload := self._check(outcome)) is not None:
                yield from map(self._merge, self._intake.add(upload))
        for client_id in silent:
            self._lose(client_id, ClientFailure(FailureReason.NO_UPLOAD, "expected an upload, nothing came"))
        yield from map(self._merge, self._intake.settle())

    def close(self) -> None:
        """The round's last client has been heard: count what is not merged."""
        self._intake.close()
        for client_id, sentence in self._intake.refused.items():
            self._fail(client_id, ClientFailure(FailureReason.SCREENED, sentence))
        self._tally.unused = self._intake.unused

    def _check(self, result: ClientResult) -> Upload | None:
        """An upload that can be read and is in time."""
        client_id, payload = result.client_id, result.payload
        support = self._federation.broadcaster.support(client_id)
        dense = size_in_bytes(self._federation.state.tensors)
        try:
            update = self._reader.decode(payload, support)
        except PayloadError as error:
            self._tally.up[client_id] = Traffic.of_refused(
                len(payload) if isinstance(payload, bytes) else 0, dense=dense
            )
            self._lose(client_id, ClientFailure(FailureReason.INVALID_UPLOAD, str(error)))
            return None
        self._tally.up[client_id] = up = self._reader.wire.measure(
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
        self._tally.merged.append(upload.client_id)
        self._tally.add_loss(update)
        for method in self._methods:
            method.on_server_receive(self._federation.state, self._round, update)
        return update

    def _fail(self, client_id: str, failure: ClientFailure) -> None:
        self._tally.failures[client_id] = failure
        self._show(client_id, failure, len(self._tally.failures))

    def _lose(self, client_id: str, failure: ClientFailure) -> None:
        """Fail a client of which nothing readable came."""
        self._federation.broadcaster.forget(client_id)
        self._fail(client_id, failure)
