"""The methods beside each other: accuracy, bytes, regrowth and seconds on two data sets and two networks.

    python docs/benchmarks/methods.py run                     # every cell that is not complete yet, in order of worth
    python docs/benchmarks/methods.py run --jobs 2            # the same on two cores
    python docs/benchmarks/methods.py run mnist-cnn-topk      # some of them
    python docs/benchmarks/methods.py report                  # the tables of methods.md

A cell is one federation, 10 clients per round and batches of 20: of 120 rounds of 10 local steps for the CNN, of 60 rounds of
50 for LeNet-5, which needs more steps and for which they are cheap. SGD without momentum, weight decay 5e-4, a learning rate
that falls to a tenth over the rounds. Where it starts is each method's own: the best of four on images held out of the
training set, in runs of 20 rounds under another seed, 100. A run that has the training loss of chance in most of its rounds is
repeated once, at the next smaller rate. Interrupted cells go on where they stopped, from ``runs/methods/``; a complete one leaves its rows in
``methods/CELL.jsonl``, without the bytes of single clients. FEDSPARSE_DATA names the folder that holds the data sets.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pages
import torch

from lightning_fedsparse import FederatedDataModule, FederatedLoop, RoundRecord
from lightning_fedsparse.callbacks import (
    MaskMonitor,
    RoundLearningRate,
    TopKAfterTraining,
    WidthMasking,
    feddip,
    fiarse,
    sparsyfed,
    zerofl,
)
from lightning_fedsparse.capacities import CapacityShares
from lightning_fedsparse.checkpointing import Checkpointing
from lightning_fedsparse.datasets import FashionMNISTDataModule, MNISTWritersDataModule
from lightning_fedsparse.evaluation import Evaluation
from lightning_fedsparse.models import FedAvgCNN, ImageClassifier, LeNet5
from lightning_fedsparse.partition import DirichletPartition, NaturalPartition
from lightning_fedsparse.records import read_history, rewrite_history
from lightning_fedsparse.schedules import ConstantSchedule, ExponentialSchedule

SEARCH_ROUNDS, SEARCH_SEED = 20, 100
COHORT, BATCH = 10, 20
EVALUATIONS = 12
LAST = 4  # evaluations that make an accuracy: over the last quarter of the rounds
CHANCE = 0.98 * math.log(10)  # what a model that tells ten classes apart by nothing loses, closely
RATES = (0.05, 0.15, 0.5, 1.5)
SPARSITY = 0.95
CAPACITIES = (1.0, 1 / 4, 1 / 16, 1 / 64)
SEEDS = (0, 1, 2)
FOLDER = Path(__file__).with_suffix("")
RUNS = Path("runs", "methods")

DATA = {
    "fashion": (FashionMNISTDataModule, DirichletPartition(100, alpha=0.1, min_examples=20)),
    "mnist": (MNISTWritersDataModule, NaturalPartition()),
}
NETWORKS = {"cnn": FedAvgCNN, "lenet": LeNet5}
ROUNDS = {"cnn": 120, "lenet": 60}
LOCAL_STEPS = {"cnn": 10, "lenet": 50}


def decaying(rounds: int) -> RoundLearningRate:
    return RoundLearningRate(ExponentialSchedule(1.0, _decay(rounds)))


def _decay(rounds: int) -> float:
    return 0.1 ** (1 / rounds)


# what each method is, given the number of rounds
METHODS: dict[str, Callable[[int], list[pl.Callback]]] = {
    "dense": lambda rounds: [decaying(rounds)],
    "feddip": lambda rounds: [*feddip(SPARSITY, learning_rate_decay=_decay(rounds)), MaskMonitor()],
    "sparsyfed": lambda rounds: sparsyfed(SPARSITY, learning_rate_decay=_decay(rounds)),
    "fiarse": lambda rounds: [*fiarse(1 - SPARSITY), decaying(rounds)],
    "topk": lambda rounds: [TopKAfterTraining(ConstantSchedule(SPARSITY)), decaying(rounds), MaskMonitor()],
    "zerofl": lambda rounds: zerofl(SPARSITY, learning_rate_decay=_decay(rounds)),
    "sparsyfed_ramp": lambda rounds: sparsyfed(SPARSITY, ramp=0.5, learning_rate_decay=_decay(rounds)),
}
# clients of four sizes, a quarter of them each
UNEQUAL: dict[str, Callable[[int], list[pl.Callback]]] = {
    "fiarse4": lambda rounds: [*fiarse(), decaying(rounds)],
    "heterofl4": lambda rounds: [WidthMasking(selection="static"), decaying(rounds)],
    "fedrolex4": lambda rounds: [WidthMasking(selection="rolling"), decaying(rounds)],
}


@dataclass(frozen=True)
class Setting:
    """What a learning rate is searched for."""

    data: str
    network: str
    method: str

    def __str__(self) -> str:
        return f"{self.data}-{self.network}-{self.method}"

    @property
    def trials(self) -> list[Cell]:
        """The search."""
        return [Cell(self, SEARCH_SEED, rate) for rate in RATES]

    @property
    def best_rate(self) -> float | None:
        """The rate of the best search run that came to its end; None while one of them is missing."""
        trials = [(trial.rate, trial.history()) for trial in self.trials]
        if not all(history for _, history in trials):
            return None
        return max((accuracy(rows, last=2), rate) for rate, rows in trials if rows[-1].round == SEARCH_ROUNDS)[1]

    def runs(self, seed: int) -> list[Cell]:
        """The run at the best rate, and the one at the next smaller rate in case that it collapses."""
        best = self.best_rate
        tried = [] if best is None else [rate for rate in sorted(RATES, reverse=True) if rate <= best][:2]
        return [Cell(self, seed, rate) for rate in tried]

    def result(self, seed: int) -> Cell | None:
        """The run that counts: the first that did not collapse, if any; None if none was run."""
        done = [cell for cell in self.runs(seed) if cell.history()]
        return next((cell for cell in done if not cell.collapsed), done[0] if done else None)


@dataclass(frozen=True)
class Cell:
    """One federation."""

    setting: Setting
    seed: int
    rate: float

    @property
    def name(self) -> str:
        return f"{self.setting}-s{self.seed}-lr{self.rate:g}"

    @property
    def rows(self) -> Path:
        return FOLDER / f"{self.name}.jsonl"

    @property
    def rounds(self) -> int:
        return SEARCH_ROUNDS if self.seed == SEARCH_SEED else ROUNDS[self.setting.network]

    def history(self) -> list[RoundRecord]:
        """Its rows; none while it is not complete."""
        return read_history(self.rows) if self.rows.exists() else []

    @property
    def collapsed(self) -> bool:
        """Whether it is complete, and came to no end or had the training loss of chance in most of its rounds."""
        losses = [record.train_loss for record in self.history()[1:]]
        learned = sum(loss is not None and loss < CHANCE for loss in losses)
        return bool(losses) and learned < self.rounds / 2


def methods_for(network: str) -> list[str]:
    """What the ramp is for is a network without weights to spare."""
    return [method for method in METHODS if (network, method) != ("cnn", "sparsyfed_ramp")]


def results() -> list[tuple[Setting, int]]:
    """Everything, in the order in which it is worth having."""
    equal = [
        (Setting(data, network, method), seed)
        for network in NETWORKS
        for seed in SEEDS
        for data in DATA
        for method in methods_for(network)
    ]
    unequal = [(Setting("fashion", "cnn", method), seed) for seed in SEEDS for method in UNEQUAL]
    return sorted([*equal, *unequal], key=lambda result: (result[1], result[0].network))


def run_result(setting: Setting, seed: int) -> None:
    """Run what a seed gives at the best rate, and once more at the next smaller one if it collapses."""
    cells = setting.runs(seed)
    if not cells:
        print(f"{setting}: its learning rate is not searched yet", flush=True)
    for cell in cells:
        run(cell)
        if not cell.collapsed:
            break


def run(cell: Cell) -> None:
    """Run one cell to its end, or go on with it."""
    if cell.history():
        return
    torch.set_num_threads(1)
    of = cell.setting
    searching = cell.seed == SEARCH_SEED
    rounds = cell.rounds
    every = rounds // (4 if searching else EVALUATIONS)
    pl.seed_everything(cell.seed, verbose=False)
    optimizer = partial(torch.optim.SGD, lr=cell.rate, weight_decay=5e-4)
    model = ImageClassifier(NETWORKS[of.network](), optimizer, image_shape=(1, 28, 28))
    module, partition = DATA[of.data]
    data = FederatedDataModule(
        module(batch_size=BATCH, validation_fraction=0.1 if searching else 0.0),
        partition,
        capacities=CapacityShares(dict.fromkeys(CAPACITIES, 0.25), shuffle=True) if of.method in UNEQUAL else None,
    )
    split = "validation" if searching else "test"
    folder = RUNS / cell.name
    loop = FederatedLoop(
        rounds,
        COHORT,
        {**METHODS, **UNEQUAL}[of.method](rounds),
        {"max_steps": LOCAL_STEPS[of.network], "max_epochs": -1},
        evaluation=Evaluation(split, every=every, capacities=CAPACITIES[1:] if of.method in UNEQUAL else ()),
        seed=cell.seed,
        checkpointing=Checkpointing(every_n_rounds=10),
        default_root_dir=folder,
        console=False,
    )
    print(f"{cell.name}: started", flush=True)
    try:
        history = loop.fit(model, data, ckpt_path="last" if (folder / "checkpoints" / "last.ckpt").exists() else None)
    except RuntimeError as error:
        # a rate that diverges is a result of the search
        print(f"{cell.name}: {error}", flush=True)
        history = loop.history
    FOLDER.mkdir(exist_ok=True)
    rewrite_history(cell.rows, [dataclasses.replace(record, clients={}) for record in history])
    print(f"{cell.name}: {accuracy(history):.2f} %", flush=True)


def accuracy(history: Sequence[RoundRecord], *, capacity: float = 1.0, last: int = LAST) -> float:
    """Mean of the last evaluations of the whole model, or of a submodel, in %."""
    suffix = "_accuracy" if capacity == 1 else f"_accuracy@{capacity:g}"
    values = [value for record in history for name, value in record.metrics.items() if name.endswith(suffix)]
    return 100 * statistics.mean(values[-last:])


def mean_metric(histories: Iterable[Sequence[RoundRecord]], name: str) -> str:
    """Mean of a metric over the rounds that have it, over all histories; a dash if none has."""
    values = [record.metrics[name] for history in histories for record in history if name in record.metrics]
    return f"{statistics.mean(values):,.0f}" if values else "-"


def bytes_to_dense(history: Sequence[RoundRecord], direction: str) -> float:
    """Encoded bytes of the whole run over those of raw dense tensors."""
    sent, dense = (sum(getattr(record, f"{key}_{direction}") for record in history) for key in ("bytes", "dense_bytes"))
    return sent / dense


def excess(histories: Iterable[Sequence[RoundRecord]]) -> str:
    """Density of the global masks above the target, in points, over the last third; a dash without global masks."""
    values = [
        100 * statistics.mean(SPARSITY - record.sparsity for record in history[-(len(history) // 3) :])
        for history in histories
    ]
    return "-" if min(values) == 100 * SPARSITY else pages.spread(values)


def histories(setting: Setting) -> dict[int, list[RoundRecord]]:
    """The rows that count, by seed."""
    cells = {seed: setting.result(seed) for seed in SEEDS}
    return {seed: cell.history() for seed, cell in cells.items() if cell is not None}


def rates_and_seeds(setting: Setting) -> list[str]:
    """The rate with the seeds whose runs are at another one, and all seeds."""
    cells = [cell for seed in SEEDS if (cell := setting.result(seed)) is not None]
    others = [f"seed {cell.seed}: {cell.rate:g}" for cell in cells if cell.rate != setting.best_rate]
    rate = f"{setting.best_rate:g}"
    return [f"{rate} ({', '.join(others)})" if others else rate, ", ".join(str(cell.seed) for cell in cells)]


def table(data: str, network: str) -> list[str]:
    """One row per method at 95 % sparsity."""
    head = ["method", "rate", "seeds", "accuracy, %", "minus dense, points", "bytes up / down", "back from zero"]
    table_rows = []
    dense = histories(Setting(data, network, "dense"))
    for method in methods_for(network):
        setting = Setting(data, network, method)
        found = histories(setting)
        if not found:
            table_rows.append([method, "not run"])
            continue
        gaps = [accuracy(rows) - accuracy(dense[seed]) for seed, rows in found.items() if seed in dense]
        sent = (statistics.mean(bytes_to_dense(rows, way) for rows in found.values()) for way in ("up", "down"))
        cells = [
            method,
            *rates_and_seeds(setting),
            pages.spread(accuracy(rows) for rows in found.values()),
            pages.spread(gaps) if gaps else "",
            " / ".join(f"{ratio:.3f}x" for ratio in sent),
            mean_metric(found.values(), "regrowth/activated"),
            excess(found.values()),
            f"{statistics.median(record.seconds for rows in found.values() for record in rows[1:]):.1f}",
        ]
        table_rows.append(cells)
    return pages.table([*head, "excess density, points", "seconds per round"], table_rows)


def unequal_table() -> list[str]:
    """One row per way to make submodels, one column per size."""
    sizes = [f"1/{1 / capacity:.0f}" if capacity < 1 else "1" for capacity in CAPACITIES]
    table_rows = []
    for method in UNEQUAL:
        setting = Setting("fashion", "cnn", method)
        found = histories(setting)
        if not found:
            table_rows.append([method, "not run"])
            continue
        sent = (statistics.mean(bytes_to_dense(rows, way) for rows in found.values()) for way in ("up", "down"))
        accuracies = [pages.spread(accuracy(rows, capacity=size) for rows in found.values()) for size in CAPACITIES]
        cells = [method, *rates_and_seeds(setting), *accuracies]
        table_rows.append([*cells, " / ".join(f"{ratio:.3f}x" for ratio in sent)])
    head = ["method", "rate", "seeds", *(f"accuracy at {size}, %" for size in sizes), "bytes up / down"]
    return pages.table(head, table_rows)


def report() -> None:
    """Put the tables into the page between its markers."""
    page = Path(__file__).with_suffix(".md")
    parts = {f"{data}-{network}": table(data, network) for data in DATA for network in NETWORKS}
    for name, lines in {**parts, "unequal": unequal_table()}.items():
        pages.put(page, name, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run")
    running.add_argument(
        "cells", nargs="*", help="beginnings of names without rates, such as mnist-cnn-topk-s0; all by default"
    )
    running.add_argument("--jobs", type=int, default=1, help="cells at a time")
    commands.add_parser("report")
    arguments = parser.parse_args()
    if arguments.command == "report":
        report()
        return
    wanted = [
        (setting, seed)
        for setting, seed in results()
        if not arguments.cells or f"{setting}-s{seed}".startswith(tuple(arguments.cells))
    ]
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(arguments.jobs) as pool:
        # the search comes before all that waits for it
        searched = dict.fromkeys(setting for setting, _ in wanted)
        list(pool.map(run, [trial for setting in searched for trial in setting.trials]))
        list(pool.map(run_result, *zip(*wanted, strict=True)))


if __name__ == "__main__":
    main()
