"""Pages of measurements: tables between markers, rewritten by the script that measures."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table; a row that is too short is filled up."""
    filled = ([*row, *[""] * (len(head) - len(row))] for row in rows)
    lines = ["| " + " | ".join(row) + " |" for row in (head, *filled)]
    return [lines[0], "|" + "---|" * len(head), *lines[1:]]


def put(page: Path, name: str, lines: Iterable[str]) -> None:
    """Replace what stands between ``<!-- name -->`` and ``<!-- end of name -->``."""
    text = page.read_text(encoding="utf-8")
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    head, rest = text.split(begin)
    page.write_text(head + begin + "\n".join(lines) + "\n" + end + rest.split(end, 1)[1], encoding="utf-8")


def spread(values: Iterable[float]) -> str:
    """Mean and, of more than one value, standard deviation."""
    held = list(values)
    mean = f"{statistics.mean(held):.2f}"
    return f"{mean} ± {statistics.stdev(held):.2f}" if len(held) > 1 else mean
