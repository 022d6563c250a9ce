"""What a round leaves behind: one :class:`RoundRecord`, one line of JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from lightning_fedsparse.accounting import ClientTraffic, Traffic
from lightning_fedsparse.durable import append_line, replace_file
from lightning_fedsparse.failures import ClientFailure, FailureReason
from lightning_fedsparse.faults import Accept

__all__ = ["RoundRecord", "append_record", "read_history", "rewrite_history", "whole_lines"]


@dataclass(frozen=True)
class RoundRecord:
    """One round of a federation; round 0 is the evaluation before any training.

    Args:
        round: Rounds done.
        clients_sampled: Clients asked in this round.
        clients_returned: Clients whose update was merged.
        clients_failed: Clients that failed, in whatever way.
        train_loss: Mean training loss over the returned clients, weighted by examples; None when no client gave one.
        sparsity: Fraction of zeros in the masks in force after the round, over the masked parameters.
        bytes_down: Encoded broadcasts of this round, bytes, summed over the clients.
        bytes_up: Encoded uploads of this round, bytes, summed over the clients.
        total_bytes_down: Broadcasts of the run so far, bytes.
        total_bytes_up: Uploads of the run so far, bytes.
        dense_bytes_down: What this round's broadcasts would be as raw dense tensors, bytes.
        dense_bytes_up: What this round's uploads would be as raw dense tensors, bytes.
        seconds: Wall time of the round, evaluation included.
        metrics: Evaluation of the global model and what the methods report, by name.
        failures: Why clients failed, by client id. Versions that only knew uploads that can't be read left a sentence alone.
        traffic_down: The broadcasts' bytes, by what they carry, beside their dense equivalent and their bound; None in
            records of versions that did not count them, like the three fields below.
        traffic_up: The same for the uploads.
        transfer_seconds: Time that the round's slowest client spends sending and receiving; None without links.
        clients: The same for each client of the round.
        clients_unused: Clients whose valid update was not needed: over-sampling, or a round that was skipped.
        stray_results: Results that belong to no client of the round, or that came a second time; ignored.
        tries: How many times the round asked clients.
        accept: Which valid updates are merged where there are too many: ``"sampled"`` or ``"first"``.
        skipped: Too few clients returned and the global model is as before the round.
        evicted_memories: Clients whose memory was given up after the round, for the quota of ``SpilledMemories``.
    """

    round: int
    clients_sampled: int
    clients_returned: int
    clients_failed: int
    train_loss: float | None
    sparsity: float
    bytes_down: int
    bytes_up: int
    total_bytes_down: int
    total_bytes_up: int
    dense_bytes_down: int
    dense_bytes_up: int
    seconds: float
    metrics: dict[str, float] = field(default_factory=dict)
    failures: dict[str, ClientFailure] = field(default_factory=dict)
    traffic_down: Traffic | None = None
    traffic_up: Traffic | None = None
    transfer_seconds: float | None = None
    clients: dict[str, ClientTraffic] = field(default_factory=dict)
    clients_unused: int = 0
    stray_results: int = 0
    tries: int = 1
    accept: Accept = "sampled"
    skipped: bool = False
    evicted_memories: list[str] = field(default_factory=list)

    @classmethod
    def from_json(cls, line: str) -> RoundRecord:
        """Read what :meth:`to_json` wrote, now or in an earlier version.

        Raises:
            TypeError: If a field is missing or unknown.
            ValueError: If it is no JSON.
        """
        row = json.loads(line)
        for name in ("traffic_down", "traffic_up"):
            row[name] = _traffic(row.get(name))
        row["clients"] = {
            client_id: ClientTraffic(Traffic(**part["down"]), _traffic(part["up"]), part["transfer_seconds"])
            for client_id, part in row.get("clients", {}).items()
        }
        row["failures"] = {client_id: _failure(part) for client_id, part in row.get("failures", {}).items()}
        return cls(**row)

    def to_json(self) -> str:
        """One line of JSON, metrics nested under ``metrics``.

        Raises:
            ValueError: If a number is not finite, which JSON can't hold.
        """
        return json.dumps(asdict(self), allow_nan=False)

    @property
    def scalars(self) -> dict[str, float]:
        """Everything that a logger can plot, flat; metrics under their own names."""
        values = {part.name: getattr(self, part.name) for part in fields(self)}
        own = {name: value for name, value in values.items() if isinstance(value, int | float)}
        own.pop("round")
        own["skipped"] = int(self.skipped)
        for direction, traffic in (("down", self.traffic_down), ("up", self.traffic_up)):
            if traffic is not None:
                for part in ("positions", "values", "header", "bound"):
                    own[f"{part}_bytes_{direction}"] = getattr(traffic, part)
        return {**own, **self.metrics}


def append_record(path: Path, record: RoundRecord) -> None:
    """Append one line and make it durable before returning.

    Raises:
        OSError: If it can't be written; the history is then as it was.
    """
    append_line(path, record.to_json())


def whole_lines(path: Path) -> list[str]:
    """The lines of a history file; what comes after the last line's end is being written, or was when its run ended."""
    return path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]


def read_history(path: Path) -> list[RoundRecord]:
    """Read a history file, of a run that is at work too.

    Raises:
        ValueError: Naming the line that is no record.
    """
    records = []
    for number, line in enumerate(whole_lines(path), start=1):
        try:
            records.append(RoundRecord.from_json(line))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"expected one round record per line, got something else in line {number} of {path}"
            ) from error
    return records


def _traffic(row: dict[str, Any] | None) -> Traffic | None:
    return None if row is None else Traffic(**row)


def _failure(part: dict[str, str] | str) -> ClientFailure:
    if isinstance(part, str):
        return ClientFailure(FailureReason.INVALID_UPLOAD, part)
    return ClientFailure(FailureReason(part["reason"]), part["sentence"])


def rewrite_history(path: Path, records: Iterable[RoundRecord]) -> None:
    """Replace a history file as a whole.

    Raises:
        OSError: If it can't be written; the history is then as it was.
    """
    replace_file(path, lambda file: file.writelines(f"{record.to_json()}\n".encode() for record in records))
