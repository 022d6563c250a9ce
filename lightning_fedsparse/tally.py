"""What one round counts as it goes, and the record made of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from lightning_fedsparse.accounting import Traffic
from lightning_fedsparse.failures import ClientFailure, TooFewClientsError, count_reasons
from lightning_fedsparse.faults import Accept
from lightning_fedsparse.records import RoundRecord
from lightning_fedsparse.update import SparseUpdate
from lightning_fedsparse.wire import Wire

__all__ = ["RoundTally"]


@dataclass
class RoundTally:
    """Counts of one round.

    Args:
        merged: Clients whose update was merged, in that order.
        down: Broadcasts by client id, in the order asked.
        up: Uploads by client id, refused ones included.
        failures: Why clients failed, by client id.
        error: What the first client that raised did raise, of those that this process trained.
        unused: Clients whose valid update is not needed.
        strays: Results that nobody waited for.
        tries: How many times clients were asked.
        accept: Which updates are preferred.
        skipped: Whether there were too few to be merged.
        evicted_memories: Clients whose memory was given up.
        lost: Clients of which nothing readable came.
        references: Where the memories of merged clients are, for other ranks.
    """

    merged: list[str] = field(default_factory=list)
    down: dict[str, Traffic] = field(default_factory=dict)
    up: dict[str, Traffic] = field(default_factory=dict)
    failures: dict[str, ClientFailure] = field(default_factory=dict)
    error: Exception | None = None
    unused: Sequence[str] = ()
    strays: int = 0
    tries: int = 0
    accept: Accept = "sampled"
    skipped: bool = False
    evicted_memories: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    references: dict[str, Any] = field(default_factory=dict)
    _loss_sum: float = 0.0
    _loss_examples: int = 0

    def add(self, parts: Sequence[RoundTally]) -> None:
        """Take in what ranks have counted of the clients that were asked last; several in the order asked."""
        order = {client_id: place for place, client_id in enumerate(self.down)} if len(parts) > 1 else {}
        by_order = partial(sorted, key=lambda client_id: order.get(client_id, 0))
        self.merged += by_order(client_id for part in parts for client_id in part.merged)
        failures = {client_id: failure for part in parts for client_id, failure in part.failures.items()}
        self.failures |= {client_id: failures[client_id] for client_id in by_order(failures)}
        for part in parts:
            self.up |= part.up
            self.strays += part.strays
            self._add_loss(part._loss_sum, part._loss_examples)

    def add_loss(self, update: SparseUpdate) -> None:
        """Take in the training loss that a client reports, if it reports a finite one."""
        self._add_loss(update.metrics.get("train_loss", math.nan) * update.num_examples, update.num_examples)

    def _add_loss(self, loss_sum: float, examples: int) -> None:
        loss_sum += self._loss_sum
        if math.isfinite(loss_sum):  # a client's word, and JSON has no NaN
            self._loss_sum = loss_sum
            self._loss_examples += examples

    def too_few(self, needed: int, number: int) -> TooFewClientsError:
        """The error of a round, by its number, in which too few clients returned."""
        returned, asked = len(self.merged) + len(self.unused), len(self.down)
        text = (
            f"expected at least {needed} of the {asked} clients of round {number} to return, got {returned}"
            f"{f' after asking {self.tries} times' if self.tries > 1 else ''}"
        )
        first = next(iter(self.failures), None)
        if first is not None:
            reasons = count_reasons(self.failures.values())
            text += f" ({reasons}); client {first!r}: {self.failures[first].sentence}"
        return TooFewClientsError(text)

    def record(
        self,
        done: int,
        *,
        last: RoundRecord | None,
        sparsity: float,
        seconds: float,
        metrics: Mapping[str, float],
        wire: Wire,
    ) -> RoundRecord:
        """The round's record, totals continued from the last one."""
        down, up = Traffic.sum(self.down.values()), Traffic.sum(self.up.values())
        clients = {name: wire.transfer(name, sent, self.up.get(name)) for name, sent in self.down.items()}
        return RoundRecord(
            round=done,
            clients_sampled=len(self.down),
            clients_returned=len(self.merged),
            clients_failed=len(self.failures),
            train_loss=self._loss_sum / self._loss_examples if self._loss_examples else None,
            sparsity=sparsity,
            bytes_down=down.total,
            bytes_up=up.total,
            total_bytes_down=down.total + (last.total_bytes_down if last else 0),
            total_bytes_up=up.total + (last.total_bytes_up if last else 0),
            dense_bytes_down=down.dense,
            dense_bytes_up=up.dense,
            seconds=seconds,
            metrics=dict(metrics),
            failures=self.failures,
            traffic_down=down,
            traffic_up=up,
            transfer_seconds=max((c.transfer_seconds for c in clients.values() if c.transfer_seconds), default=None),
            clients=clients,
            clients_unused=len(self.unused),
            stray_results=self.strays,
            tries=self.tries,
            accept=self.accept,
            skipped=self.skipped,
            evicted_memories=self.evicted_memories,
        )
