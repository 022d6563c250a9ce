"""The console: columns from the records, a plain log without a bar, a summary that adds up."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console as RichConsole

from lightning_fedsparse.console import Console
from lightning_fedsparse.failures import ClientFailure, FailureReason
from lightning_fedsparse.records import RoundRecord


def record(index: int, *, accuracy: float | None = None, loss: float = 1.0, **fields: object) -> RoundRecord:
    trained = index > 0
    values: dict[str, object] = {
        "round": index,
        "clients_sampled": 5 if trained else 0,
        "clients_returned": 5 if trained else 0,
        "clients_failed": 0,
        "train_loss": 0.5 if trained else None,
        "sparsity": 0.9,
        "bytes_down": 20_000 if trained else 0,
        "bytes_up": 10_000 if trained else 0,
        "total_bytes_down": 20_000 * index,
        "total_bytes_up": 10_000 * index,
        "dense_bytes_down": 100_000 if trained else 0,
        "dense_bytes_up": 100_000 if trained else 0,
        "seconds": 30.0,
        "metrics": {} if accuracy is None else {"test_loss": loss, "test_accuracy": accuracy},
    }
    return RoundRecord(**{**values, **fields})  # type: ignore[arg-type]


HISTORY = [record(0, accuracy=0.1, loss=2.3), record(1, accuracy=0.9, loss=0.4), record(2, accuracy=0.85, loss=0.3)]


def shown(console: Console, history: list[RoundRecord]) -> None:
    console.start([])
    for row in history:
        console.row(row)
    console.stop()
    console.summary(history)


def test_rows_are_aligned_under_one_header(capsys: pytest.CaptureFixture[str]) -> None:
    shown(Console(2), HISTORY)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == [
        "round",
        "train",
        "loss",
        "test_loss",
        "test_accuracy",
        "sparsity",
        "down",
        "up",
        "seconds",
    ]
    assert lines[1].split() == ["0/2", "-", "2.3000", "10.00", "%", "90.00", "%", "-", "-", "30.0"]
    assert lines[2].split() == [
        "1/2",
        "0.5000",
        "0.4000",
        "90.00",
        "%",
        "90.00",
        "%",
        "20.0",
        "kB",
        "10.0",
        "kB",
        "30.0",
    ]
    assert {len(line) for line in lines[:4]} == {len(lines[0])}
    assert len(lines[0]) <= 100
    assert sum("train loss" in line for line in lines) == 1


def test_the_summary_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    shown(Console(2), HISTORY)
    summary = capsys.readouterr().out.split("\n\n")[1]
    rows = {line[:14].strip(): line[14:].strip() for line in summary.splitlines()}
    assert rows["done"] == "2 rounds in 1 min 30 s"
    assert rows["test_accuracy"] == "85.00 % after round 2, best 90.00 % after round 1"
    assert rows["test_loss"] == "0.3000 after round 2, best 0.3000 after round 2"
    assert rows["sent down"] == "40.0 kB, as raw dense tensors 200.0 kB: 5.0x less"
    assert rows["sent up"] == "20.0 kB, as raw dense tensors 200.0 kB: 10.0x less"
    assert rows["both ways"] == "60.0 kB, as raw dense tensors 400.0 kB: 6.7x less"
    assert "failures" not in rows


def test_a_run_without_evaluation_and_masks_shows_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    shown(Console(1), [record(0, sparsity=0.0), record(1, sparsity=0.0, total_bytes_up=110_000)])
    out = capsys.readouterr().out
    assert out.splitlines()[0].split() == ["round", "train", "loss", "sparsity", "down", "up", "seconds"]
    assert "masked weights" not in out
    assert "1.10x more" in out


def test_failures_are_shown_as_they_come_with_their_round_and_in_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    late, cut = ClientFailure(FailureReason.LATE, "a day late"), ClientFailure(FailureReason.INVALID_UPLOAD, "cut off")
    first = record(1, clients_failed=3, failures={"07": late, "11": cut, "12": late})
    second = record(2, clients_failed=2, failures={"12": late, "03": cut}, skipped=True)
    console = Console(2)
    console.start([])
    console.row(HISTORY[0])
    for number, (client_id, failure) in enumerate(first.failures.items(), start=1):
        console.failure(client_id, failure, number)
    console.row(first)
    console.row(second)
    console.stop()
    console.summary([HISTORY[0], first, second])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:5] == [
        "       client '07' failed, late: a day late",
        "       client '11' failed, invalid upload: cut off",
        "       client '12' failed, late: a day late",
    ]
    assert lines[6] == "       3 of 5 clients failed: 2 late, 1 invalid upload"
    assert lines[9] == "       too few clients returned: the global model stays as it was"
    assert [" ".join(line.split()) for line in lines[-3:]] == [
        "failures 5 of 10 client rounds; 1 of 2 rounds skipped",
        "late 3, most of client '12' 2, '07' 1",
        "invalid upload 2, most of client '11' 1, '03' 1",
    ]


def test_of_many_failures_the_first_few_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(1)
    for number in range(1, 100):
        console.failure(str(number), ClientFailure(FailureReason.EXCEPTION, "ValueError: no"), number)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert lines[-1].strip() == "more clients failed: the record has them all"


def test_a_resumed_run_says_where_it_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(3)
    console.start(HISTORY)
    console.row(record(3, accuracy=0.9))
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "going on after round 2 of 3, which ended with"
    assert [line.split()[0] for line in (lines[2], lines[3])] == ["2/3", "3/3"]


def test_a_finished_run_says_that_nothing_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    Console(2).start(HISTORY)
    assert "nothing left to do: 2 of 2 rounds are done" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("checkpoint", "words"),
    [(None, "no checkpoint was written"), (Path("runs/x/last.ckpt"), f"last checkpoint: {Path('runs/x/last.ckpt')}")],
)
def test_an_interrupted_run_says_what_is_left(
    checkpoint: Path | None, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    console = Console(5)
    console.start([])
    console.row(HISTORY[0])
    console.row(HISTORY[1])
    console.interrupted(checkpoint)
    assert capsys.readouterr().out.splitlines()[-1] == f"interrupted after 1 of 5 rounds; {words}"


def test_metrics_that_do_not_fit_the_terminal_are_left_out() -> None:
    console, out = on_a_terminal(Console(2), width=70)
    console.start([])
    console.row(HISTORY[0])
    console.stop()
    assert "test_loss" in out.getvalue()
    assert "test_accuracy" not in out.getvalue()


def test_a_terminal_has_a_bar_and_the_rows_above_it() -> None:
    console, out = on_a_terminal(Console(2), width=100)
    console.start([])
    for row in HISTORY:
        console.row(row)
    console.stop()
    console.stop()  # safe a second time
    assert re.search(r"2/2\S* rounds", out.getvalue())
    assert "90.00 %" in out.getvalue()


def test_a_log_file_has_no_bar_and_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    shown(Console(2), HISTORY)
    out = capsys.readouterr().out
    assert "rounds <" not in out
    assert "\x1b" not in out


def on_a_terminal(console: Console, *, width: int) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    console._out = RichConsole(file=out, force_terminal=True, width=width, highlight=False)
    return console, out
