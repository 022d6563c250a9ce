"""FedDIP against dense FedAvg on Fashion-MNIST with LeNet-5: the runs, and the page made from them.

    python docs/benchmarks/fashion_mnist.py run                 # all cells that are not complete yet, one after the other
    python docs/benchmarks/fashion_mnist.py run iid-dense-s0 ...  # some of them; interrupted runs go on where they stopped
    python docs/benchmarks/fashion_mnist.py report              # tables and picture of fashion_mnist.md

Every cell is one federation: 50 clients, 5 per round, 5 local epochs, batch 128, SGD 0.1 x 0.998 per round with weight
decay 5e-4, 200 rounds, evaluation of the global model on the 10,000 test images after every round. Its history.jsonl is
the raw result. FEDSPARSE_DATA names the folder that holds the data sets.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pages
import torch

from lightning_fedsparse import FederatedDataModule, FederatedLoop
from lightning_fedsparse.callbacks import RoundLearningRate, feddip
from lightning_fedsparse.datasets import FashionMNISTDataModule
from lightning_fedsparse.evaluation import Evaluation
from lightning_fedsparse.models import ImageClassifier, LeNet5
from lightning_fedsparse.partition import DirichletPartition, IidPartition
from lightning_fedsparse.records import RoundRecord, read_history

ROUNDS = 200
LAST = ROUNDS // 10
FOLDER = Path(__file__).parent / "fashion_mnist"

PARTITIONS = {"iid": IidPartition(50), "dirichlet": DirichletPartition(50, alpha=0.5, min_examples=10)}
METHODS = {
    "dense": lambda: [RoundLearningRate()],
    "feddip90": lambda: feddip(sparsity=0.9),
    "feddip95": lambda: feddip(sparsity=0.95),
    "feddip95-nested": lambda: feddip(sparsity=0.95, regrow="nested"),
    "feddip95-regrow_dense": lambda: feddip(sparsity=0.95, regrow="dense"),
    "feddip95-upload_dense": lambda: feddip(sparsity=0.95, regrow="nested", upload="dense"),
    "feddip95-keep": lambda: feddip(sparsity=0.95, residual="keep"),
    "feddip95-released": lambda: feddip(
        sparsity=0.95, erk_positions="random_per_client", regrow="nested", upload="dense", lambda_mode="code"
    ),
    "feddip95-no_penalty": lambda: feddip(sparsity=0.95, lambda_max=0.0),
    "feddip95-settled": lambda: feddip(sparsity=0.95, end=0.75),
}
MAIN = ("dense", "feddip90", "feddip95")
# in the order in which they are worth having
CELLS = (
    *((where, method, 0) for where in PARTITIONS for method in MAIN),
    *(("iid", method, 0) for method in METHODS if method not in MAIN),
    *((where, method, seed) for seed in (1, 2) for where in PARTITIONS for method in MAIN),
)


def name_of(where: str, method: str, seed: int) -> str:
    return f"{where}-{method}-s{seed}"


def is_complete(folder: Path) -> bool:
    history = folder / "history.jsonl"
    return history.exists() and read_history(history)[-1].round == ROUNDS


def run(where: str, method: str, seed: int) -> None:
    folder = FOLDER / name_of(where, method, seed)
    if is_complete(folder):
        return
    torch.set_num_threads(1)
    pl.seed_everything(seed, verbose=False)
    model = ImageClassifier(LeNet5(), partial(torch.optim.SGD, lr=0.1, weight_decay=5e-4))
    data = FederatedDataModule(FashionMNISTDataModule(batch_size=128), PARTITIONS[where], seed=seed)
    loop = FederatedLoop(
        ROUNDS,
        5,
        METHODS[method](),
        {"max_epochs": 5},
        evaluation=Evaluation(split="test"),
        seed=seed,
        default_root_dir=folder,
        console=False,
    )
    print(f"{folder.name}: started", flush=True)
    loop.fit(model, data, ckpt_path="last" if (folder / "checkpoints" / "last.ckpt").exists() else None)
    print(f"{folder.name}: {loop.history[-1].metrics['test_accuracy']:.4f}", flush=True)


def histories(where: str, method: str) -> dict[int, list[RoundRecord]]:
    """Complete runs, by seed."""
    folders = {seed: FOLDER / name_of(where, method, seed) for seed in (0, 1, 2)}
    return {seed: read_history(folder / "history.jsonl") for seed, folder in folders.items() if is_complete(folder)}


def accuracy(history: list[RoundRecord]) -> float:
    """Mean test accuracy of the last 10 % of rounds, in %."""
    return 100 * statistics.mean(record.metrics["test_accuracy"] for record in history[-LAST:])


def ratio_to_dense(history: list[RoundRecord], dense: list[RoundRecord], last: int) -> tuple[float, float]:
    """Encoded bytes up and down over the encoded bytes of dense FedAvg in the same rounds."""
    return tuple(
        sum(getattr(record, key) for record in history[-last:]) / sum(getattr(record, key) for record in dense[-last:])
        for key in ("bytes_up", "bytes_down")
    )


def table(where: str, methods: Sequence[str]) -> list[str]:
    """One row per method: accuracy, its distance from dense FedAvg of the same seeds, bytes."""
    dense = histories(where, "dense")
    head = ["method", "seeds", "accuracy, %", "minus dense, points", "bytes up / down, last 20 rounds", "whole run"]
    rows = []
    for method in methods:
        runs = histories(where, method)
        if not runs:
            rows.append([method, "not run"])
            continue
        both = runs.keys() & dense.keys()
        gap = pages.spread([accuracy(runs[seed]) - accuracy(dense[seed]) for seed in both]) if both else "dense not run"
        late, whole = (
            " / ".join(f"{ratio:.3f}x" for ratio in ratio_to_dense(runs[min(both)], dense[min(both)], last))
            if both
            else ""
            for last in (LAST, ROUNDS)
        )
        rows.append([method, ", ".join(map(str, runs)), pages.spread(map(accuracy, runs.values())), gap, late, whole])
    return pages.table(head, rows)


def closer_look(where: str, methods: Sequence[str]) -> list[str]:
    """Losses at the end, and what moving the masks costs in the round that moves them; seed 0."""
    late_accuracy = "accuracy of rounds 141-200 that moved masks / others, %"
    rows = []
    for method in methods:
        for history in [*histories(where, method).values()][:1]:
            late = history[141:]
            moved, others = (
                100
                * statistics.mean(
                    record.metrics["test_accuracy"] for record in late if (record.round % 5 == 0) is moves
                )
                for moves in (True, False)
            )
            last = history[-1]
            losses = [f"{last.train_loss:.3f}", f"{last.metrics['test_loss']:.3f}"]
            rows.append([method, *losses, f"{moved:.2f} / {others:.2f}"])
    return pages.table(["method", "training loss, round 200", "test loss, round 200", late_accuracy], rows)


def draw(path: Path) -> None:
    """Accuracy by round and bytes by round, seed 0."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.8), constrained_layout=True)
    labels = {"dense": "dense FedAvg", "feddip90": "FedDIP, 0.90", "feddip95": "FedDIP, 0.95"}
    colors = dict(zip(labels, ("tab:blue", "tab:orange", "tab:green"), strict=True))
    for axis, where, title in ((axes[0], "iid", "iid"), (axes[1], "dirichlet", "Dirichlet(0.5)")):
        for method, label in labels.items():
            for history in [*histories(where, method).values()][:1]:
                rounds = [record.round for record in history[1:]]
                axis.plot(
                    rounds,
                    [100 * record.metrics["test_accuracy"] for record in history[1:]],
                    label=label,
                    color=colors[method],
                    lw=1,
                )
        axis.set(title=f"{title}, seed 0", xlabel="round", ylabel="test accuracy, %", ylim=(60, 92))
        axis.grid(alpha=0.3)
    for method, label in labels.items():
        for history in [*histories("iid", method).values()][:1]:
            sent = [(record.bytes_up + record.bytes_down) / 1e6 for record in history[1:]]
            axes[2].plot(range(1, len(sent) + 1), sent, label=label, color=colors[method], lw=1)
    axes[2].set(title="iid, seed 0: both ways, five clients", xlabel="round", ylabel="MB per round", ylim=(0, None))
    axes[2].grid(alpha=0.3)
    axes[0].legend(loc="lower right")
    figure.savefig(path, dpi=110)


def report() -> None:
    """Put the tables into the page between its markers, and draw the picture."""
    page = Path(__file__).with_suffix(".md")
    others = [method for method in METHODS if method not in MAIN]
    parts = {
        "iid": table("iid", MAIN),
        "dirichlet": table("dirichlet", MAIN),
        "options": table("iid", ("feddip95", *others)),
        "look": closer_look("iid", (*MAIN, "feddip95-nested")),
    }
    for name, lines in parts.items():
        pages.put(page, name, lines)
    draw(page.with_suffix(".png"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("run").add_argument("cells", nargs="*", help="names of cells, all by default")
    commands.add_parser("report")
    arguments = parser.parse_args()
    if arguments.command == "report":
        report()
        return
    for cell in CELLS:
        if not arguments.cells or name_of(*cell) in arguments.cells:
            run(*cell)


if __name__ == "__main__":
    main()
