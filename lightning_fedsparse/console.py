"""What a run shows while it goes: one table row per round, a progress bar on a terminal, a closing summary.

Rows are plain aligned text, so that a log file reads like the screen; only the bar needs a terminal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console as RichConsole
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from lightning_fedsparse.accounting import Traffic
from lightning_fedsparse.failures import ClientFailure, FailureReason, count_reasons
from lightning_fedsparse.records import RoundRecord

__all__ = ["Console"]

# What tells the reader that higher, or lower, is better, in the metric names that Lightning users choose.
_HIGHER = ("acc", "f1", "auroc", "precision", "recall", "iou", "dice")
_LOWER = ("loss", "error", "mse", "mae", "perplexity")
_MISSING = "-"

_SHOWN_FAILURES = 5  # of one round, as they come
_NAMED_CLIENTS = 3  # of those that failed most


@dataclass(frozen=True)
class _Column:
    title: str
    width: int
    cell: Callable[[RoundRecord], str]


class Console:
    """Shows one run of a federation.

    Args:
        rounds: Rounds of the whole run.
        quiet: Show nothing at all.
    """

    def __init__(self, rounds: int, *, quiet: bool = False) -> None:
        self._rounds = rounds
        self._out = RichConsole(highlight=False, quiet=quiet)
        self._columns: list[_Column] = []
        self._bar: Progress | None = None
        self._last: RoundRecord | None = None

    def start(self, history: Sequence[RoundRecord]) -> None:
        """Begin: say where a resumed run goes on, and show the bar if this is a terminal."""
        self._columns = []
        self._last = None
        done = history[-1].round if history else 0
        if history:
            self._start_table(next((record for record in history if record.metrics), history[-1]))
            if done < self._rounds:
                self._line(f"going on after round {done} of {self._rounds}, which ended with", "dim")
            else:
                self._line(f"nothing left to do: {done} of {self._rounds} rounds are done", "dim")
            self._line(self._format(history[-1]), "dim")
            self._last = history[-1]
        if self._out.is_terminal and done < self._rounds:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("rounds"), TimeElapsedColumn(), TextColumn("<"))
            self._bar = Progress(*columns, TimeRemainingColumn(), console=self._out, transient=True)
            self._bar.add_task("rounds", total=self._rounds, completed=done)
            self._bar.start()

    def row(self, record: RoundRecord) -> None:
        """Show one round."""
        if not self._columns:
            self._start_table(record)
        self._line(self._format(record))
        if record.failures:
            reasons = count_reasons(record.failures.values())
            self._note(f"{record.clients_failed} of {record.clients_sampled} clients failed: {reasons}")
        if record.skipped:
            self._note("too few clients returned: the global model stays as it was")
        self._last = record
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=record.round)

    def failure(self, client_id: str, failure: ClientFailure, number: int) -> None:
        """Show a client's failure as it comes; of a round's many the first few."""
        if number <= _SHOWN_FAILURES:
            self._note(f"client {client_id!r} failed, {failure.reason.words}: {failure.sentence}")
        elif number == _SHOWN_FAILURES + 1:
            self._note("more clients failed: the record has them all")

    def interrupted(self, checkpoint: Path | None) -> None:
        """Say what an interrupted run leaves behind."""
        self.stop()
        done = 0 if self._last is None else self._last.round
        where = "no checkpoint was written" if checkpoint is None else f"last checkpoint: {checkpoint}"
        self._line(f"interrupted after {done} of {self._rounds} rounds; {where}", "yellow")

    def stop(self) -> None:
        """Take the bar away; safe to call more than once."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def summary(self, history: Sequence[RoundRecord]) -> None:
        """Show what the whole run reached and what it cost."""
        rounds = f"{history[-1].round} rounds in {_duration(sum(record.seconds for record in history))}"
        lines = [("done", rounds), *_learned(history), *_cost(history), *_failed(history)]
        width = max(len(label) for label, _ in lines)
        self._line("")
        for label, value in lines:
            self._line(f"{label:<{width}}  {value}", "bold" if label == "done" else "")

    def _start_table(self, first: RoundRecord) -> None:
        # a log file has no width of its own: there the table is what fits on most screens
        limit = self._out.width if self._out.is_terminal else 100
        self._columns = _fitting_columns(first, self._rounds, limit)
        self._line("  ".join(f"{column.title:>{column.width}}" for column in self._columns), "bold")

    def _note(self, text: str) -> None:
        """A line that belongs to a row."""
        self._line(f"{'':>{self._columns[0].width if self._columns else 0}}  {text}", "yellow")

    def _format(self, record: RoundRecord) -> str:
        return "  ".join(f"{column.cell(record):>{column.width}}" for column in self._columns)

    def _line(self, text: str, style: str = "") -> None:
        # soft_wrap: a row that is wider than a log's assumed 80 columns stays one line
        self._out.print(Text(text, style=style), soft_wrap=True)


def _fitting_columns(first: RoundRecord, rounds: int, limit: int) -> list[_Column]:
    """All columns, less the last metrics where the line would be longer than ``limit``."""
    left = [
        _Column("round", max(5, 2 * len(str(rounds)) + 1), lambda record: f"{record.round}/{rounds}"),
        _Column("train loss", 10, lambda record: _loss(record.train_loss)),
    ]
    right = [
        _Column("sparsity", 8, lambda record: _percent(record.sparsity)),
        _Column("down", 9, lambda record: decimal(record.bytes_down) if record.clients_sampled else _MISSING),
        _Column("up", 9, lambda record: decimal(record.bytes_up) if record.clients_sampled else _MISSING),
        _Column("seconds", 7, lambda record: f"{record.seconds:.1f}"),
    ]
    free = limit - sum(column.width + 2 for column in [*left, *right])
    metrics = []
    for name in first.metrics:
        column = _Column(name, max(len(name), 7), lambda record, name=name: _metric(name, record.metrics.get(name)))  # type: ignore[misc]
        free -= column.width + 2
        if free < -2:
            break
        metrics.append(column)
    return [*left, *metrics, *right]


def _learned(history: Sequence[RoundRecord]) -> list[tuple[str, str]]:
    lines = []
    for name in next((record.metrics for record in history if record.metrics), {}):
        rows = [(record.metrics[name], record.round) for record in history if name in record.metrics]
        value, last = rows[-1]
        text = f"{_metric(name, value)} after round {last}"
        if _is(name, _HIGHER) or _is(name, _LOWER):
            choose = max if _is(name, _HIGHER) else min
            best, when = choose(rows, key=lambda row: row[0])
            text += f", best {_metric(name, best)} after round {when}"
        lines.append((name, text))
    sparsity = history[-1].sparsity
    if sparsity:
        lines.append(("sparsity", f"{_percent(sparsity)} of the masked weights are zero"))
    return lines


def _cost(history: Sequence[RoundRecord]) -> list[tuple[str, str]]:
    down, up = history[-1].total_bytes_down, history[-1].total_bytes_up
    dense_down = sum(record.dense_bytes_down for record in history)
    dense_up = sum(record.dense_bytes_up for record in history)
    lines = [
        ("sent down", _against_dense(down, dense_down)),
        ("sent up", _against_dense(up, dense_up)),
        ("both ways", _against_dense(down + up, dense_down + dense_up)),
    ]
    counted = [(record.traffic_down, record.traffic_up) for record in history if record.traffic_down]
    # records of earlier versions do not say what their bytes were
    if len(counted) == len(history):
        both = Traffic.sum(traffic for pair in counted for traffic in pair if traffic is not None)
        lines.append(("of these", _parts(both)))
        if "counted" in both.codings:
            lines.append(("encoded", "nothing: these bytes are counted"))
    transfers = [record.transfer_seconds for record in history if record.transfer_seconds is not None]
    if transfers:
        lines.append(("transfer", f"{_duration(sum(transfers))} on the clients' links, the slowest of each round"))
    evicted = sum(len(record.evicted_memories) for record in history)
    if evicted:
        lines.append(("memories", f"{evicted} given up for their quota, of the clients not sampled for longest"))
    return lines


def _failed(history: Sequence[RoundRecord]) -> list[tuple[str, str]]:
    """A table: how often each reason came, and the clients that it came to most."""
    failed = sum(record.clients_failed for record in history)
    if not failed:
        return []
    asked = sum(record.clients_sampled for record in history)
    skipped = sum(record.skipped for record in history)
    rounds = f"; {skipped} of {len(history) - 1} rounds skipped" if skipped else ""
    by_reason: dict[FailureReason, Counter[str]] = {}
    for record in history:
        for client_id, failure in record.failures.items():
            by_reason.setdefault(failure.reason, Counter())[client_id] += 1
    lines = [("failures", f"{failed} of {asked} client rounds{rounds}")]
    for reason, clients in sorted(by_reason.items(), key=lambda row: -row[1].total()):
        most = ", ".join(f"{client_id!r} {count}" for client_id, count in clients.most_common(_NAMED_CLIENTS))
        lines.append((f"  {reason.words}", f"{clients.total()}, most of client {most}"))
    return lines


def _against_dense(measured: int, dense: int) -> str:
    if not measured or not dense:
        return "nothing"
    ratio = f"{dense / measured:.1f}x less" if measured <= dense else f"{measured / dense:.2f}x more"
    return f"{decimal(measured)}, as raw dense tensors {decimal(dense)}: {ratio}"


def _parts(both: Traffic) -> str:
    if not both.total:
        return "nothing"
    shares = ", ".join(
        f"{name} {100 * getattr(both, name) / both.total:.1f} %" for name in ("positions", "values", "header")
    )
    return f"{shares}; {both.total / max(1, both.bound):.3f}x the entropy bound of the masks with raw values"


def _metric(name: str, value: float | None) -> str:
    # accuracies come as fractions; a metric that already is in percent stays as it is
    return _percent(value) if value is not None and _is(name, _HIGHER) and 0 <= value <= 1 else _loss(value)


def _is(name: str, words: Sequence[str]) -> bool:
    return any(word in name.lower() for word in words)


def _loss(value: float | None) -> str:
    return _MISSING if value is None else f"{value:.4f}"


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
