"""What registered clients cost that are not sampled, and where what clients remember is kept.

    python docs/benchmarks/population.py              # the tables of population.md; a minute and a half of a core

Every figure is measured in a process of its own, on one thread. A start is the processor time between the building of the
``FederatedDataModule`` and the first client's first step; the peak is the largest resident set of the whole process.
"""

from __future__ import annotations

import json
import os
import pickle
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from pages import put, table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedsparse import FederatedDataModule, FederatedLoop
from lightning_fedsparse.callbacks import CompressionMemory, feddip
from lightning_fedsparse.capacities import CapacityShares
from lightning_fedsparse.evaluation import Evaluation
from lightning_fedsparse.memories import HeldMemories
from lightning_fedsparse.partition import IidPartition, NaturalPartition
from lightning_fedsparse.spilled_memories import SpilledMemories
from lightning_fedsparse.wire import Link, Wire

PAGE = Path(__file__).with_suffix(".md")
EXAMPLES = 400_000
SAMPLED = 200
REGISTERED = (200, 10_000, 100_000)
PARTITIONS = {
    "iid": IidPartition,
    "natural": lambda count: NaturalPartition(),
}
REMEMBERING = (100, 500)  # clients, all of which are sampled in every round
STORES = {"held": HeldMemories, "spilled": SpilledMemories}


class Data(pl.LightningDataModule):
    def __init__(self, clients: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        classes = torch.randint(0, 10, (EXAMPLES,), generator=generator)
        self._examples = TensorDataset(torch.zeros(EXAMPLES, 64), classes)
        self._examples.client_keys = np.arange(EXAMPLES) % clients

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self._examples, batch_size=4, shuffle=True)


class Model(pl.LightningModule):
    """As many weights as LeNet-5 has, in two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 800), nn.ReLU(), nn.Linear(800, 10))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(self.layers(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class FirstStep(pl.Callback):
    """When the first client's first step began; a class attribute, for each client round gets a copy of the callback."""

    at: float | None = None

    def on_train_batch_start(self, *args: object) -> None:
        if FirstStep.at is None:
            FirstStep.at = time.process_time()


def loop_of(rounds: int, sampled: int, memories: HeldMemories | SpilledMemories, folder: str) -> FederatedLoop:
    return FederatedLoop(
        rounds,
        sampled,
        [*feddip(sparsity=0.9), CompressionMemory()],
        {"max_steps": 1, "callbacks": [FirstStep()]},
        evaluation=Evaluation(split="none"),
        wire=Wire(link=Link(up_mbps=1)),
        memories=memories,
        default_root_dir=folder,
        console=False,
    )


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def population(name: str, registered: int) -> list[float]:
    """Processor seconds to the first step, seconds of the round, peak in megabytes, processor seconds to a worker."""
    data = Data(registered)
    capacities = CapacityShares({1.0: 0.5, 0.5: 0.5})
    with tempfile.TemporaryDirectory() as folder:
        loop = loop_of(1, SAMPLED, SpilledMemories(), folder)
        started = time.process_time()
        clients = FederatedDataModule(data, PARTITIONS[name](registered), capacities=capacities)
        history = loop.fit(Model(), clients)
    assert FirstStep.at is not None
    start, peak = FirstStep.at - started, peak_megabytes()
    sending = time.process_time()
    pickle.loads(pickle.dumps(clients))
    return [start, history[-1].seconds, peak, time.process_time() - sending]


def memories(name: str, clients: int) -> list[float]:
    """Peak, the last checkpoint and all files of memories, in megabytes, after two rounds of all clients."""
    with tempfile.TemporaryDirectory() as folder:
        loop = loop_of(2, clients, STORES[name](), folder)
        loop.fit(Model(), FederatedDataModule(Data(clients), IidPartition(clients)))
        files = sum(path.stat().st_size for path in Path(folder).glob("memories/*")) / 1e6
        return [peak_megabytes(), Path(folder, "checkpoints", "last.ckpt").stat().st_size / 1e6, files]


def in_a_process_of_its_own(*arguments: object) -> list[float]:
    command = [sys.executable, __file__, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    figures: list[float] = json.loads(found.stdout.splitlines()[-1])
    return figures


def populations() -> list[str]:
    rows = []
    for name in PARTITIONS:
        first: list[float] = []
        for registered in REGISTERED:
            start, seconds, peak, sending = in_a_process_of_its_own("population", name, registered)
            first = first or [start, peak, sending]
            figures = [
                f"{start:.2f}",
                f"{start - first[0]:+.2f}",
                f"{seconds:.1f}",
                f"{peak:.0f}",
                f"{peak / first[1]:.3f}x",
                f"{sending:.2f}",
                f"{sending - first[2]:+.2f}",
            ]
            rows.append([name, f"{registered:,}", *figures])
    head = ["partition", "registered", "start, s", "over the least", "round, s", "peak, MB", "of the least"]
    head += ["to a worker, s", "over the least"]
    return table(head, rows)


def stores() -> list[str]:
    rows = []
    for name in STORES:
        for clients in REMEMBERING:
            figures = in_a_process_of_its_own("memories", name, clients)
            rows.append([name, str(clients), *(f"{figure:.1f}" for figure in figures)])
    return table(["memories", "clients that remember", "peak, MB", "checkpoint, MB", "files, MB"], rows)


def machine() -> str:
    """What everything ran on, in a line."""
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next((line.split(":")[1].strip() for line in cpuinfo if line.startswith("model name")), platform.machine())
    return f"{model}, one thread; torch {torch.__version__}, Python {platform.python_version()}."


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1:]:
        what, name, clients = sys.argv[1:]
        print(json.dumps({"population": population, "memories": memories}[what](name, int(clients))))
        return
    for name, lines in (("machine", [machine()]), ("populations", populations()), ("stores", stores())):
        print(*lines, "", sep="\n", flush=True)
        put(PAGE, name, lines)


if __name__ == "__main__":
    main()
