"""Aggregating 100 updates, against bare index_add_ calls and beside Flower's dense aggregation: a part of payload.py."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lightning_fedsparse.aggregation import Aggregator, MaskedMean, SumType, WeightedMean
from lightning_fedsparse.payload import MaskSet
from lightning_fedsparse.update import SparseUpdate

SIZE = 11_170_000
CLIENTS = 100
DIFFERENT = 10  # updates that take turns: more of them than a cache holds
SUM_TYPES: tuple[SumType, ...] = ("float32", "float64")
# name -> (densities of masks that are nested in each other, or None for independent ones of 5 %; what absence means)
CASES = {
    "one mask": ((0.05,), "zero"),
    "independent masks, sums": (None, "zero"),
    "independent masks, sums and counts": (None, "unheld"),
    "nested masks of .04, .16, .64, sums and counts": ((0.04, 0.16, 0.64), "unheld"),
}

FLOWER = """
import resource, sys, time
import numpy as np
from flwr.server.strategy.aggregate import aggregate
size, clients = int(sys.argv[1]), int(sys.argv[2])
generator = np.random.default_rng(0)
results = [([generator.standard_normal(size, dtype=np.float32)], 600) for _ in range(clients)]
held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
times = []
for _ in range(2):
    started = time.process_time()
    aggregate(results)
    times.append(1e3 * (time.process_time() - started) / clients)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(f"{times[0]:.1f} {times[1]:.1f} {held / 1e6:.2f} {peak / 1e6:.2f}")
"""


def updates_of(case: str) -> list[SparseUpdate]:
    nested, absent = CASES[case]
    generator = torch.Generator().manual_seed(0)
    importance = torch.rand(SIZE, generator=generator)
    if nested is None:
        masks = [torch.rand(SIZE, generator=generator) < 0.05 for _ in range(DIFFERENT)]
    else:
        masks = [importance < density for density in nested]
    updates = []
    for number, mask in enumerate(masks):
        held = MaskSet(str(number), {"w": mask})
        values = torch.randn(len(held.positions("w")), generator=generator) * 0.02
        kind = "delta" if absent == "unheld" else "weights"
        updates.append(SparseUpdate({"w": values}, held, num_examples=600 + number, kind=kind, absent=absent))
    return updates


def is_counting(case: str) -> bool:
    return CASES[case][1] == "unheld"


def bare(updates: Sequence[SparseUpdate], dtype: torch.dtype, *, counts: bool) -> None:
    """The same sums by index_add_ alone, with the same weights; one sum of weights per entry where they are needed."""
    sums = torch.zeros(SIZE, dtype=dtype)
    held = torch.zeros(SIZE, dtype=dtype) if counts else None
    for client in range(CLIENTS):
        update = updates[client % len(updates)]
        where, weight = update.positions("w"), update.num_examples
        sums.index_add_(0, where, update.values["w"].to(dtype) * weight)
        if held is not None:
            held.index_add_(0, where, held.new_full((len(where),), weight))


def merged(aggregator: Aggregator, template: Tensor, updates: Sequence[SparseUpdate]) -> None:
    aggregator.start({"w": template})
    for client in range(CLIENTS):
        aggregator.add(updates[client % len(updates)])
    aggregator.result()


def aggregator_for(case: str, dtype: SumType) -> Aggregator:
    return MaskedMean("examples", dtype=dtype) if is_counting(case) else WeightedMean(dtype=dtype)


def per_client(function: Callable[[], None]) -> float:
    """Milliseconds of CPU time."""
    started = time.process_time()
    function()
    return 1e3 * (time.process_time() - started) / CLIENTS


def peak_megabytes(case: str, dtype: SumType) -> float:
    """What a round adds to a process at its peak, beside the server's weights and the updates themselves."""
    torch.set_num_threads(1)
    updates, template = updates_of(case), torch.ones(SIZE)
    merged(aggregator_for(case, dtype), template, updates[:1])  # what a first call loads is not the question
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = status("VmRSS")
    merged(aggregator_for(case, dtype), template, updates)
    return status("VmHWM") - before


def status(name: str) -> float:
    """A figure of this process in megabytes, as Linux keeps it."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024 / 1e6


def in_a_process_of_its_own(case: str, dtype: SumType) -> float:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(peak_megabytes, (case, dtype))


def aggregation() -> list[list[str]]:
    heading = "updates | sums | index_add_, ms per client | here | ratio | peak, MB | model + counts + one update, MB"
    rows = [[*heading.split(" | "), "peak / that"]]
    template = torch.ones(SIZE)
    for case in CASES:
        updates = updates_of(case)
        counts = is_counting(case)
        largest = max(12 * update.num_values for update in updates)  # positions and values
        for name in SUM_TYPES:
            dtype = getattr(torch, name)
            least = ours = float("inf")
            for _ in range(2):
                least = min(least, per_client(lambda: bare(updates, dtype, counts=counts)))  # noqa: B023
                ours = min(ours, per_client(lambda: merged(aggregator_for(case, name), template, updates)))  # noqa: B023
            peak = in_a_process_of_its_own(case, name)
            model = (SIZE * (dtype.itemsize + (4 if counts else 0)) + largest) / 1e6
            times = [f"{least:.1f}", f"{ours:.1f}", f"{ours / least:.2f}"]
            rows.append([case, name, *times, f"{peak:.0f}", f"{model:.0f}", f"{peak / model:.2f}"])
    return rows


def flower() -> list[list[str]]:
    """Flower's dense aggregation, and ours of sparse updates in the same run."""
    with tempfile.TemporaryDirectory() as folder:
        python = Path(folder, "bin", "python")
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "flwr"], check=True)
        version = output(python, "from importlib.metadata import version; print(version('flwr'))")
        first, second, held, peak = output(python, FLOWER, str(SIZE), str(CLIENTS)).split()
    rows = [
        ["aggregation", "first call, ms per client", "second call", "the updates, GB", "peak, GB"],
        [f"Flower {version}, dense arrays", first, second, held, peak],
    ]
    for case in ("one mask", "independent masks, sums", "independent masks, sums and counts"):
        updates, template = updates_of(case), torch.ones(SIZE)
        times = [per_client(lambda: merged(aggregator_for(case, "float64"), template, updates)) for _ in range(2)]  # noqa: B023
        one = 12 * updates[0].num_values / 1e9
        # the server's weights, what a round adds to them, and the update at hand
        peak_gb = (4 * SIZE / 1e6 + in_a_process_of_its_own(case, "float64")) / 1e3 + one
        rows.append([f"here, 5 %, {case}", *(f"{time:.1f}" for time in times), f"{one:.3f}", f"{peak_gb:.2f}"])
    return rows


def output(python: Path, code: str, *arguments: str) -> str:
    """What a program prints that runs in one thread."""
    environment = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    command = [python, "-c", code, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.strip()
