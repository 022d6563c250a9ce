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
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import torch

from lightning_fedsparse import FederatedDataModule, FederatedLoop
from lightning_fedsparse.callbacks import RoundLearningRate, feddip
from lightning_fedsparse.datasets import FashionMNISTDataModule
from lightning_fedsparse.evaluation import Evaluation
from lightning_fedsparse.models import ImageClassifier, LeNet5
from lightning_fedsparse.partition import DirichletPartition, IidPartition
from lightning_fedsparse.records import read_history

ROUNDS = 200
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("run").add_argument("cells", nargs="*", help="names of cells, all by default")
    arguments = parser.parse_args()
    for cell in CELLS:
        if not arguments.cells or name_of(*cell) in arguments.cells:
            run(*cell)


if __name__ == "__main__":
    main()
