"""Which of a round's uploads count: those that can be read, came in time and stand beside the others, in the order asked.

Where nothing needs the whole cohort, uploads are merged as they come and forgotten. What has to wait (until it is known that
the round has enough of them, until the last is there to choose the first, until there is a cohort to hold each against)
waits encoded, which for a sparse model is a small part of it.

Where several ranks take in a round's uploads, each its own, they tell each other whose they have and choose alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning_fedsparse.faults import FaultPolicy
from lightning_fedsparse.ranks import Alone, Ranks
from lightning_fedsparse.rounds import UploadRule
from lightning_fedsparse.screening import Screen, Screening
from lightning_fedsparse.server import ServerState
from lightning_fedsparse.update import MaskSet, SparseUpdate
from lightning_fedsparse.validation import check_update
from lightning_fedsparse.wire import Message, Wire

__all__ = ["Intake", "Upload", "UploadReader"]


@dataclass(frozen=True)
class Upload:
    """A valid upload.

    Args:
        client_id: Whose.
        payload: As it came.
        support: The masks that the client was sent.
        memory: What its callbacks remember if it is merged.
        seconds: From being asked to having sent.
        update: What it means; None once it waits.
    """

    client_id: str
    payload: Message
    support: MaskSet
    memory: Mapping[str, Any]
    seconds: float
    update: SparseUpdate | None = None


class UploadReader:
    """Decodes and checks a round's uploads.

    Args:
        state: The server's, as broadcast.
        wire: How values travel.
        rule: What uploads mean.
    """

    def __init__(self, state: ServerState, wire: Wire, rule: UploadRule) -> None:
        self.state = state
        self.wire = wire
        self._rule = rule
        self._travels = wire.rule_for(rule)
        self.schema = state.schema

    def decode(self, payload: Message, support: MaskSet) -> SparseUpdate:
        """What travelled.

        Raises:
            PayloadError: If it is not what the round expects.
        """
        update = self.wire.decode(payload, schema=self.schema, reference=support)
        check_update(update, self.state.weights, buffers=self.state.buffers, support=support, rule=self._travels)
        return update

    def meaning(self, update: SparseUpdate) -> SparseUpdate:
        """What a decoded update means."""
        return self.wire.read_upload(update, self.state.weights, self._rule)

    def read(self, upload: Upload) -> SparseUpdate:
        """What a valid upload means."""
        return upload.update or self.meaning(self.decode(upload.payload, upload.support))


class Intake:
    """Takes a round's valid uploads one by one and gives those that are to be merged.

    Args:
        policy: How few are enough and which are preferred.
        wanted: At most so many are merged.
        reader: Reads what has waited.
        screen: Bounds against the cohort; None for none.
        ranks: Who else takes in uploads of the round; nobody if None. Then there can be no screen.

    Attributes:
        refused: Why uploads were screened out, by client id.
        unused: Clients whose valid uploads are not needed.
    """

    def __init__(
        self,
        policy: FaultPolicy,
        wanted: int,
        reader: UploadReader,
        screen: Screen | None,
        ranks: Ranks | None = None,
    ) -> None:
        self.policy = policy
        self.reader = reader
        self._wanted = wanted
        self._screening = None if screen is None else Screening(screen, reader.state.weights)
        self._ranks = ranks or Alone()
        self._streams = screen is None and policy.accept == "sampled"
        self._least = policy.min_clients
        if self._ranks.size > 1:
            # nobody knows how many the others have; if they are too few in the end, what was merged is lost with the run
            self._least = 1
            stops = policy.min_clients == 1 or policy.when_fewer == "stop"
            self._streams = self._streams and not policy.oversample and stops
        self._waiting: list[Upload] = []
        self._candidates: list[str] = []
        self._merged = 0
        self._usable = 0
        self.refused: dict[str, str] = {}
        self.unused: list[str] = []

    @property
    def enough(self) -> bool:
        """Whether the round counts."""
        return self._merged >= self.policy.min_clients

    @property
    def missing(self) -> int:
        """How many more would be merged."""
        return self._wanted - self._usable

    def add(self, upload: Upload) -> Iterator[Upload]:
        """Take one; give those that are to be merged by now."""
        if not self._streams:
            if self._screening is not None:
                self._screening.see(upload.client_id, self.reader.read(upload))
            self._waiting.append(replace(upload, update=None))
        elif self._usable == self._wanted:
            self.unused.append(upload.client_id)
        else:
            self._usable += 1
            if self._usable < self._least:
                self._waiting.append(replace(upload, update=None))
            else:
                yield from self._give([*self._waiting, upload])
                self._waiting = []

    def settle(self, asked: Sequence[str] = ()) -> Iterator[Upload]:
        """All that were asked have answered or failed: give those that waited for this, if they are enough.

        Args:
            asked: The round's clients so far, in the order asked; where ranks have to agree on it.
        """
        if self._streams:
            return
        self.refused = self._screened()
        waiting = {upload.client_id: upload for upload in self._waiting if upload.client_id not in self.refused}
        seconds: dict[str, float] = {}
        for part in self._ranks.share({client_id: upload.seconds for client_id, upload in waiting.items()}):
            seconds |= part
        self._candidates = list(seconds)
        if self._ranks.size > 1:
            self._candidates = [client_id for client_id in asked if client_id in seconds]
        self._usable = min(len(self._candidates), self._wanted)
        if len(self._candidates) < self.policy.min_clients:
            return
        by_preference = self._candidates
        if self.policy.accept == "first":
            by_preference = sorted(self._candidates, key=lambda client_id: seconds[client_id])
        chosen = set(by_preference[: self._wanted])
        self.unused = [client_id for client_id in self._candidates if client_id not in chosen]
        # merged in the order asked, whoever was first: that order decides the last bits of a sum
        mine = [waiting[one] for one in self._candidates if one in chosen and one in waiting]
        self._waiting, self._candidates = [], []
        yield from self._give(mine)

    def count(self, merged: int) -> None:
        """Take in how many all ranks together have merged."""
        self._merged = merged
        self._usable = max(self._usable, merged)

    def close(self) -> None:
        """The round has ended: what still waits is not needed."""
        self.unused += [upload.client_id for upload in self._waiting] if self._streams else self._candidates
        self._waiting, self._candidates = [], []

    def _give(self, uploads: list[Upload]) -> Iterator[Upload]:
        self._merged += len(uploads)
        yield from uploads

    def _screened(self) -> dict[str, str]:
        if self._screening is None:
            return {}
        return self._screening.refused((upload.client_id, self.reader.read(upload)) for upload in self._waiting)
