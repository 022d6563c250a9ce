"""What a callback is told about a round: on the client's side and on the server's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from torch import Tensor

from lightning_fedsparse.schedules import Progress
from lightning_fedsparse.update import Absent, Kind, MaskSet

__all__ = ["ClientRound", "ServerRound", "Total", "UploadRule"]

Total: TypeAlias = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
"""Sums named tensors over all processes that took in uploads of a round; one that a process does not have counts as zero."""


@dataclass(frozen=True)
class ClientRound:
    """One client's part in one round.

    Args:
        index: Round, from 0.
        total: Rounds of the federation.
        client_id: Id of the client.
        seed: Seed of this client in this round, derived from (seed of the run, round, client).
        masks: Masks as broadcast to this client: the support that it and the server share in this round.
        capacity: Share of the weights that the client can hold, in (0, 1]; None if it has none of its own.
    """

    index: int
    total: int
    client_id: str
    seed: int
    masks: MaskSet
    capacity: float | None = None

    @property
    def progress(self) -> Progress:
        """Rounds done before this one, of all rounds."""
        return Progress(self.index, self.total)


@dataclass
class ServerRound:
    """One round as the server sees it.

    Args:
        index: Round, from 0.
        total: Rounds of the federation.
        seed: Seed of the server's own draws in this round.
        metrics: Scalars by name; what a server hook adds here goes into the round's record and to the loggers.
    """

    index: int
    total: int
    seed: int
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def progress(self) -> Progress:
        """Rounds done before this one, of all rounds."""
        return Progress(self.index, self.total)


@dataclass(frozen=True)
class UploadRule:
    """What the server expects of a round's uploads; anything else is refused.

    Args:
        kind: Weights, or deltas against the broadcast.
        absent: What a coordinate that is not sent means.
        extra_values: How many values an upload may hold beyond the broadcast's support.
        weighting: How the holders of a coordinate count where others don't hold it, unless the loop has an aggregator of
            its own.
    """

    kind: Kind = "weights"
    absent: Absent = "unchanged"
    extra_values: int = 0
    weighting: Literal["uniform", "examples"] = "uniform"
