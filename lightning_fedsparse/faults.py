"""How a federation lives with clients that fail: how many it asks, how long it waits, and how few are enough."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

__all__ = ["Accept", "FaultPolicy"]

Accept = Literal["sampled", "first"]


@dataclass(frozen=True)
class FaultPolicy:
    """What becomes of a round when clients fail.

    A client whose training raises, whose worker dies again and again, who takes too long, or whose upload does not come, can't
    be read or is screened out, costs the round that one client. Its failure is shown as it comes and kept in the record,
    with its reason. Errors of the program, which hit every client, are not hidden by this: by default a round in which no
    client returns ends the run, with what the first client raised as the cause; and whatever the policy, a run in which no
    client has ever returned ends at its first round.

    A client's round counts as a whole or not at all. What it remembers (residuals, its own BatchNorm statistics) is as before
    the round unless its update was merged. Masks that it was sent count as held once a readable upload has shown that they
    arrived; until then it gets full positions again.

    Args:
        min_clients: Valid updates that a round needs, at least 1 and at most ``clients_per_round``. The first
            ``min_clients - 1`` wait, encoded, until it is known that the round counts.
        tries: How many times a round may ask, at least 1. Each further time it asks other clients, from another draw, as many
            as are missing from ``clients_per_round``; valid updates of the times before stay.
        when_fewer: What happens if there are too few after that: ``"stop"`` ends the run; ``"skip"`` leaves the global model as
            it is and goes on with the next round. Masks do not move in a round that is skipped.
        oversample: Clients asked beyond ``clients_per_round``. All of them train and send; what that costs is in the record.
        accept: Which valid updates are merged where there are more than ``clients_per_round``. ``"sampled"``: those that come
            first in the order in which clients were sampled, so results depend on the seed alone and a run without failures
            is the run without over-sampling, bit for bit. ``"first"``: those whose clients are done first, all taken to start
            at once, by the measured time of their training and the transfer times of their links. Results then depend on
            measured times and no two runs need be equal; every upload of the round waits, encoded, until the last is there.
        deadline: Seconds that a client has for its training and, where it has a link, its transfers; who takes longer is
            late. None sets no limit. All clients are taken to start at once: waiting for a worker does not count. Worker
            processes are ended at the deadline; in this process a client that is late runs to its end. As times are
            measured, who is late near the deadline may differ from run to run.

    Raises:
        ValueError: For a value out of range.
    """

    min_clients: int = 1
    tries: int = 1
    when_fewer: Literal["stop", "skip"] = "stop"
    oversample: int = 0
    accept: Accept = "sampled"
    deadline: float | None = None

    def __post_init__(self) -> None:
        for name, value, least in (
            ("min_clients", self.min_clients, 1),
            ("tries", self.tries, 1),
            ("oversample", self.oversample, 0),
        ):
            if value < least:
                raise ValueError(f"expected {name} to be at least {least}, got {value}")
        if self.when_fewer not in ("stop", "skip"):
            raise ValueError(f"expected when_fewer to be 'stop' or 'skip', got {self.when_fewer!r}")
        if self.accept not in get_args(Accept):
            raise ValueError(f"expected accept to be one of {get_args(Accept)}, got {self.accept!r}")
        if self.deadline is not None and not 0 < self.deadline < math.inf:
            raise ValueError(f"expected a deadline above 0 seconds, got {self.deadline}")

    def check(self, clients_per_round: int) -> None:
        """See that it suits a cohort.

        Raises:
            ValueError: If it asks for more updates than clients.
        """
        if self.min_clients > clients_per_round:
            raise ValueError(
                f"expected min_clients of at most {clients_per_round}, the clients per round, got {self.min_clients}"
            )

    def check_population(self, clients_per_round: int, clients: int) -> None:
        """See that there are clients enough to ask.

        Raises:
            ValueError: If over-sampling asks for more than there are, or further tries find nobody who was not asked yet.
        """
        asked = clients_per_round + self.oversample
        if asked > clients:
            beyond = f" and oversample={self.oversample}" if self.oversample else ""
            raise ValueError(
                f"expected at most {clients} clients per round, as many as there are, got {clients_per_round}{beyond}"
            )
        if self.tries > 1 and asked == clients:
            raise ValueError(
                f"expected tries=1 where a round asks all {clients} clients, got {self.tries}: a further try asks others"
            )
