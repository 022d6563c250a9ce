"""Which rank trains which clients of a cohort: the same answer on every rank, without asking."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_fedsparse.clients import Client
from lightning_fedsparse.memories import ClientMemories
from lightning_fedsparse.ranks import Ranks

__all__ = ["Shards"]


class Shards:
    """Divides cohorts over ranks.

    A client whose memory is in a rank's process goes there, for its memory does not travel. The others go, one after the other,
    to the rank that has the fewest examples to train on so far.

    Args:
        ranks: The processes.
        memories: What clients remember, of those that are with this rank.
    """

    def __init__(self, ranks: Ranks, memories: ClientMemories) -> None:
        self._ranks = ranks
        self._memories = memories
        self._homes: dict[str, int] = {}

    def start(self) -> None:
        """See where every memory is, when a run begins or goes on."""
        if self._ranks.size > 1:
            for rank, references in enumerate(self._ranks.share(self.references(list(self._memories)))):
                self.learn(rank, references)

    def mine(self, cohort: Sequence[Client]) -> set[str]:
        """Those of a cohort that this rank trains."""
        loads = [0] * self._ranks.size
        places = {client.id: self._homes[client.id] for client in cohort if client.id in self._homes}
        for client in cohort:
            if client.id in places:
                loads[places[client.id]] += client.num_examples
        for client in cohort:
            if client.id not in places:
                places[client.id] = rank = loads.index(min(loads))
                loads[rank] += client.num_examples
        return {client_id for client_id, rank in places.items() if rank == self._ranks.rank}

    def references(self, client_ids: Sequence[str]) -> dict[str, Any]:
        """Where the memories of clients are, as far as this rank has put them somewhere."""
        return {
            client_id: self._memories.reference(client_id) for client_id in client_ids if client_id in self._memories
        }

    def learn(self, rank: int, references: Mapping[str, Any]) -> None:
        """Take in a rank's :meth:`references`."""
        for client_id, reference in references.items():
            if reference is None:
                self._homes[client_id] = rank
            else:
                self._memories.refer(client_id, reference)

    def part(self, memories: Mapping[str, Any], rank: int) -> dict[str, Any]:
        """A rank's part of all clients' memories, which a checkpoint holds together."""
        return {client_id: memories[client_id] for client_id in list(memories)[rank :: self._ranks.size]}
