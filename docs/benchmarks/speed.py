"""How fast rounds are: beside a hand-written loop, pfl-research, Flower, FedDIP's released code, and on two cores.

    python docs/benchmarks/speed.py run                     # every table but those of peers
    python docs/benchmarks/speed.py run cifar10 --rounds 9  # some of them, of more rounds
    python docs/benchmarks/speed.py run gpu                 # CIFAR-10 on a GPU
    python docs/benchmarks/speed.py run pfl flower          # peers, installed into environments of their own, runs/peers
    python docs/benchmarks/speed.py report                  # the tables of speed.md, from the rows
    python docs/benchmarks/speed.py short                   # make bench: the main tables, 3 rounds, nothing is kept

Each table is a run in a process of its own. Its variants take turns, a round each, on one torch thread per process; the first
round of each is dropped, and what counts are ratios of medians. Where several processes work there should be two idle cores.
Rows are kept in ``speed/TABLE.jsonl``. FEDSPARSE_DATA names the folder that holds CIFAR-10 and Fashion-MNIST; without it
images are synthetic, and the table says so.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pages
import speed_overhead
import speed_profile
import torch
from speed_runs import (
    BARE,
    COPIES,
    DIP,
    FLOWER,
    HAND,
    ONE,
    PFL,
    TWO,
    TWO_SENT,
    beside_peer,
    on_gpu,
    precision,
    pruning,
    scaling,
)
from speed_tables import Aim, Measured, busy_cores, comparison, machine, read, write
from speed_work import ALEXNET, CIFAR10, FASHION

PAGE = Path(__file__).with_suffix(".md")
FOLDER = Path(__file__).with_suffix("")
ROUNDS, SHORT_ROUNDS = 5, 3


def efficiency(measured: Measured) -> float:
    """Speed-up by two workers over that by two bare processes."""
    return measured[ONE] / measured[TWO] / (measured[HAND] / measured[BARE])


def ratio(name: str, other: str) -> Callable[[Measured], float]:
    return lambda measured: measured[name] / measured[other]


@dataclass(frozen=True)
class Table:
    """A run and how it is shown."""

    measure: Callable[[int], Measured]
    lines: Callable[[Measured], list[str]]


def compared(measure: Callable[[int], Measured], *aims: Aim) -> Table:
    return Table(measure, partial(comparison, aims=aims))


_ONE = Aim("one worker / hand-written loop", ratio(ONE, HAND), 1.10)
_TWO = Aim("speed-up by two workers / by two bare processes", efficiency, 0.93, at_least=True)
_COPIES = partial(Aim, "FedDIP by deep copies / by callbacks", ratio(COPIES, DIP), at_least=True)
_FLOWER = (
    Aim("Flower / two workers", ratio(FLOWER, TWO), 3.0, at_least=True),
    Aim("Flower / two workers with real payloads", ratio(FLOWER, TWO_SENT), 3.0, at_least=True),
)

TABLES = {
    "overhead": Table(speed_overhead.measure, speed_overhead.lines),
    "cifar10": compared(
        partial(scaling, CIFAR10, "count"), _ONE, Aim("two workers / hand-written loop", ratio(TWO, HAND), 0.58), _TWO
    ),
    "fashion": compared(
        partial(pruning, FASHION, None),
        _ONE,
        Aim("FedDIP's callbacks / hand-written loop", ratio(DIP, HAND), 1.20),
        _COPIES(1.4),
    ),
    "fashion_two": compared(partial(scaling, replace(FASHION, cohort=6), None), _TWO),
    "alexnet_32": compared(partial(pruning, ALEXNET[32], "count"), _COPIES(2.0)),
    "alexnet_128": compared(partial(pruning, ALEXNET[128], "count"), _COPIES(2.0)),
    "precision": compared(precision),
    "gpu": compared(on_gpu, _ONE),
    "profile": Table(speed_profile.measure, speed_profile.lines),
    "pfl": compared(
        partial(beside_peer, PFL, "speed_pfl", (), channels_last=True),
        Aim("one worker / pfl-research", ratio(ONE, PFL), 1.10),
    ),
    "flower": compared(partial(beside_peer, FLOWER, "speed_flower", ()), *_FLOWER),
    "flower_quiet": compared(partial(beside_peer, FLOWER, "speed_flower", ("quiet",)), *_FLOWER),
}
NAMED = ("pfl", "flower", "flower_quiet", "gpu")  # run where they are named: peers, and what needs a GPU
SHORT = ("overhead", "cifar10", "fashion")


def measured_here(name: str, rounds: int) -> Measured:
    """Run a table in this process."""
    torch.set_num_threads(1)
    busy = busy_cores()
    measured = TABLES[name].measure(rounds)
    measured.machine, measured.busy = machine(), busy
    return measured


def run(names: Sequence[str], rounds: int, *, keep: bool) -> None:
    """Run tables one after the other, each in a process of its own."""
    os.environ["OMP_NUM_THREADS"] = "1"
    print(machine(), "", sep="\n", flush=True)
    for name in names:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            measured = pool.submit(measured_here, name, rounds).result()
        print(f"{name}\n", *TABLES[name].lines(measured), "", sep="\n", flush=True)
        if keep:
            write(FOLDER / f"{name}.jsonl", measured)


def report() -> None:
    """Put the tables into the page between its markers."""
    machines = {}
    for name, table in TABLES.items():
        measured = read(FOLDER / f"{name}.jsonl")
        pages.put(PAGE, name, ["not run"] if measured is None else table.lines(measured))
        if measured is not None:
            machines[measured.machine] = None
    pages.put(PAGE, "machine", machines or ["not run"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run")
    running.add_argument(
        "tables", nargs="*", metavar="TABLE", help=f"of {', '.join(TABLES)}; all but peers and gpu if none"
    )
    running.add_argument("--rounds", type=int, default=ROUNDS, help="that count; default: %(default)s")
    commands.add_parser("report")
    commands.add_parser("short")
    arguments = parser.parse_args()
    if arguments.command == "report":
        report()
    elif arguments.command == "short":
        run(SHORT, SHORT_ROUNDS, keep=False)
    else:
        if unknown := set(arguments.tables) - TABLES.keys():
            parser.error(f"expected some of {', '.join(TABLES)}, got {min(unknown)!r}")
        run(arguments.tables or [name for name in TABLES if name not in NAMED], arguments.rounds, keep=True)


if __name__ == "__main__":
    main()
