"""A run of interleaved rounds: measured, kept as lines of JSON, and shown as ratios of medians beside their aims."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import pages
import torch

__all__ = [
    "Aim",
    "Measured",
    "Rounds",
    "busy_cores",
    "comparison",
    "interleaved",
    "largest_difference",
    "machine",
    "notes",
    "read",
    "write",
]

WARM_UP = 1  # rounds that are not counted: processes start, memory is claimed


class Rounds(Protocol):
    """Whatever runs rounds."""

    def round(self, index: int) -> float:
        """Run a round, from 0 and one after the other; its seconds."""


@dataclass
class Measured:
    """One run.

    Args:
        seconds: Of each counted round, by variant.
        remarks: Sentences that belong to it.
        machine: What it ran on.
        busy: Cores that others kept busy just before.
    """

    seconds: dict[str, list[float]]
    remarks: list[str] = field(default_factory=list)
    machine: str = ""
    busy: float = 0.0

    def __getitem__(self, variant: str) -> float:
        """Median of a variant's seconds."""
        return statistics.median(self.seconds[variant])


@dataclass(frozen=True)
class Aim:
    """A ratio of medians and what it should be.

    Args:
        text: What it is.
        ratio: Finds it.
        bound: Where it should end.
        at_least: Whether it should be above the bound.
    """

    text: str
    ratio: Callable[[Measured], float]
    bound: float
    at_least: bool = False

    def row(self, measured: Measured) -> list[str]:
        ratio = self.ratio(measured)
        holds = ratio >= self.bound if self.at_least else ratio <= self.bound
        words = "at least" if self.at_least else "at most"
        return [self.text, f"{ratio:.3f}x", f"{words} {self.bound:g}x", "holds" if holds else "misses"]


def interleaved(variants: Mapping[str, Rounds], rounds: int) -> dict[str, list[float]]:
    """Have all variants run a round each in turn, and drop the first turns."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for index in range(WARM_UP + rounds):
        for name, variant in variants.items():
            seconds[name].append(variant.round(index))
    return {name: values[WARM_UP:] for name, values in seconds.items()}


def comparison(measured: Measured, aims: Sequence[Aim]) -> list[str]:
    """Each variant beside the first, then the aims."""
    first = next(iter(measured.seconds))
    rows = [
        [
            name,
            f"{measured[name]:.3f}",
            f"{min(values):.3f} .. {max(values):.3f}",
            f"{measured[name] / measured[first]:.3f}x",
        ]
        for name, values in measured.seconds.items()
    ]
    lines = pages.table(["per round", "median, s", "all rounds, s", f"to the {first}"], rows)
    if aims:
        lines += ["", *pages.table(["aim", "measured", "wanted", ""], [aim.row(measured) for aim in aims])]
    return [*lines, "", *notes(measured)]


def notes(measured: Measured) -> list[str]:
    """What belongs to a run beside its figures."""
    rounds = {len(values) for values in measured.seconds.values()}
    counted = f"Medians of {min(rounds)} rounds; {measured.busy:.2f} cores were busy just before."
    return [" ".join([counted, *measured.remarks])]


def machine() -> str:
    """What everything ran on, in a line."""
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next((line.split(":")[1].strip() for line in cpuinfo if line.startswith("model name")), platform.machine())
    cores = len(os.sched_getaffinity(0))
    versions = f"torch {torch.__version__}, lightning {version('lightning')}, Python {platform.python_version()}"
    wide = [flag for flag in ("avx512f", "avx512_bf16", "amx_bf16") if any(flag in line.split() for line in cpuinfo)]
    return f"{model} ({', '.join(wide)}), {cores} cores, one torch thread per process; {versions}."


def busy_cores(seconds: float = 2.0) -> float:
    """How many cores work while this process waits."""
    before = _ticks()
    time.sleep(seconds)
    idle, total = (now - then for now, then in zip(_ticks(), before, strict=True))
    return (os.cpu_count() or 1) * (1 - idle / total)


def _ticks() -> tuple[int, int]:
    """Idle time and all time of all cores since the start of the machine, as Linux counts it."""
    counts = [int(count) for count in Path("/proc/stat").read_text(encoding="utf-8").split()[1:9]]
    return counts[3] + counts[4], sum(counts)


def write(path: Path, measured: Measured) -> None:
    """Keep a run: a line about it, then a line per variant."""
    about: dict[str, Any] = {"machine": measured.machine, "busy": measured.busy, "remarks": measured.remarks}
    rows = [about, *({"variant": name, "seconds": values} for name, values in measured.seconds.items())]
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def read(path: Path) -> Measured | None:
    """A run that was kept; None where there is none."""
    if not path.exists():
        return None
    about, *rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return Measured({row["variant"]: row["seconds"] for row in rows}, **about)


def largest_difference(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> float:
    """The largest distance between two models' weights."""
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))
