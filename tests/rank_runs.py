"""Federations over several processes of this machine.

One process imports everything, which takes longer than all else here, and forks the ranks; each leaves what it has found in
the folder.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_fedsparse import FederatedDataModule, FederatedLoop
from lightning_fedsparse.callbacks import (
    CollapseMonitor,
    CompressionMemory,
    DeviceMonitor,
    DynamicSparseTraining,
    FixedMask,
    GradientPruning,
    MaskMonitor,
    SparsityMonitor,
    feddip,
    fiarse,
    sparsyfed,
)
from lightning_fedsparse.callbacks.base import SparsityCallback
from lightning_fedsparse.capacities import CapacityMapping
from lightning_fedsparse.evaluation import Evaluation
from lightning_fedsparse.executors import LocalExecutor
from lightning_fedsparse.failures import RankLostError
from lightning_fedsparse.faults import FaultPolicy
from lightning_fedsparse.schedules import LinearSchedule
from lightning_fedsparse.spilled_memories import SpilledMemories
from lightning_fedsparse.testing import Fault, FaultyExecutor, RandomFaults
from lightning_fedsparse.wire import Link, Wire
from tests.test_loop import QUIET, Net, clients, loaders

ROUNDS = 4
SMALL = {f"c{number}": 0.5 if number % 2 else 1.0 for number in range(8)}
COMING = (Fault.RAISES, Fault.DROPPED, Fault.CORRUPTED, Fault.STRAGGLES, Fault.TWICE)


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.9, momentum=0.5)


def arguments(name: str, folder: Path) -> dict[str, Any]:
    """Of one scenario's loop, beside those that all have."""
    failing = FaultyExecutor(LocalExecutor(), RandomFaults(0.4, seed=3, kinds=COMING))
    monitors = [MaskMonitor(), SparsityMonitor(), DeviceMonitor(), CollapseMonitor()]
    residual = [*feddip(0.7, reconfigure_every=1), CompressionMemory()]
    scenarios: dict[str, dict[str, Any]] = {
        "dense": {"server_optimizer": momentum, "wire": Wire(link=Link(1.0)), "evaluation": Evaluation()},
        "feddip": {"callbacks": [*residual, *monitors], "wire": Wire(uploads="int8")},
        "feddip-levels": {"callbacks": [*feddip(0.5, reconfigure_every=1), *monitors]},
        "sparsyfed": {"callbacks": [*sparsyfed(0.7), *monitors[2:]], "buffers": "recalibrate"},
        "fiarse": {"callbacks": [*fiarse(), *monitors]},
        "moving": {"callbacks": [DynamicSparseTraining(sparsity=0.5, every=1), *monitors], "buffers": "local"},
        "fixed": {"callbacks": [FixedMask(0.6), *monitors]},
        "gradient": {"callbacks": [GradientPruning(LinearSchedule(0.2, 0.6), every=1), *monitors]},
        "spilled": {
            "callbacks": [*residual],
            "memories": SpilledMemories(quota_bytes=12000),
            "default_root_dir": folder / "spilled-run",
        },
        "failing": {
            "callbacks": [*residual],
            "executor": failing,
            "faults": FaultPolicy(min_clients=3, tries=3, deadline=60),
        },
        "choosing": {
            "callbacks": feddip(0.7),
            "executor": failing,
            "faults": FaultPolicy(min_clients=4, oversample=2, when_fewer="skip", deadline=60),
        },
        "resumed": {"callbacks": [*residual], "default_root_dir": folder / "resumed-run"},
        "lost": {
            "callbacks": [*residual, Dies(2, rank=1)],
            "default_root_dir": folder / "lost-run",
            "rank_timeout": 30,
        },
    }
    return scenarios[name]


class Held(LightningDataModule):
    """What the global model is evaluated on."""

    @override
    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(clients(9)["c8"], batch_size=8)


def data_of(name: str) -> FederatedDataModule:
    own = {client_id: DataLoader(part, batch_size=8, shuffle=True) for client_id, part in clients(8).items()}
    sizes = CapacityMapping(SMALL) if name in ("fiarse", "feddip-levels") else None
    return FederatedDataModule(own, evaluation=Held(), capacities=sizes)


def fit(name: str, folder: Path) -> dict[str, Any]:
    """Run a scenario; what it leads to."""
    # every rank draws other weights: those of the first count
    torch.manual_seed(int(os.environ.get("RANK", "0")))
    model = Net()
    common = {"console": False, "evaluation": QUIET, "seed": 1, "rank_timeout": 60}
    loop = FederatedLoop(ROUNDS, 4, **{**common, **arguments(name, folder)})
    loop.fit(model, data_of(name), ckpt_path="last" if name in ("resumed", "lost") else None)
    return {
        "weights": model.state_dict(),
        "masks": dict(loop.state.masks),
        "history": [{**vars(record), "seconds": 0} for record in loop.history],
        "memories": sorted(loop.memories),
    }


class Dies(SparsityCallback):
    """In a round, on a rank and in its first life, the process is killed."""

    def __init__(self, index: int, rank: int) -> None:
        self.index = index
        self.rank = rank

    @override
    def on_server_round_end(self, state: Any, server_round: Any) -> Any:
        first_life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if server_round.index == self.index and os.environ.get("RANK") == str(self.rank) and first_life:
            os.kill(os.getpid(), signal.SIGKILL)
        return state


class Sleeps(SparsityCallback):
    """In the second round the second rank does not go on for a while."""

    @override
    def on_server_round_end(self, state: Any, server_round: Any) -> Any:
        if server_round.index == 1 and os.environ.get("RANK") == "1":
            time.sleep(8)
        return state


class Drifts(SparsityCallback):
    """The second rank's weights are others."""

    @override
    def on_server_round_end(self, state: Any, server_round: Any) -> Any:
        if os.environ.get("RANK") == "1":
            state.weights["last.bias"] += 1e-6
        return state


def failure(callback: SparsityCallback, timeout: float) -> str:
    """What a run says that can't go on."""
    loop = FederatedLoop(3, 2, [callback], console=False, evaluation=QUIET, rank_timeout=timeout)
    try:
        loop.fit(Net(), loaders(clients()))
    except (RankLostError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def run(name: str, folder: Path) -> Any:
    if name == "hung":
        return failure(Sleeps(), 5)
    if name == "drifting":
        return failure(Drifts(), 30)
    try:
        return fit(name, folder)
    except RankLostError as error:
        return f"{type(error).__name__}: {error}"


def start(folder: Path, size: int, names: list[str]) -> None:
    """Fork the ranks, wait for them and print how each has ended."""
    torch.set_num_threads(1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(size)}
    children = []
    for rank in range(size):
        if (child := os.fork()) == 0:
            os.environ["RANK"] = str(rank)
            for name in names:
                torch.save(run(name, folder), folder / f"{name}-{rank}.pt")
            os._exit(0)
        children.append(child)
    ends = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(*ends)
