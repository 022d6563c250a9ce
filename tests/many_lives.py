"""A federation in many lives, each ended by SIGKILL one write later than the one before: ``python -m tests.many_lives FOLDER``.

A process that trains nothing itself forks one child after the other. In each child the run starts, or goes on from the last
checkpoint, and the child kills itself just before it opens, flushes, renames, cuts or deletes a file of the run for the
n-th time: n is 1 in the first life, 2 in the second. The lives end with the run.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from lightning_fedsparse import FederatedLoop
from lightning_fedsparse.callbacks import feddip
from lightning_fedsparse.checkpointing import Checkpointing
from lightning_fedsparse.evaluation import Evaluation
from tests.test_loop import Net, clients, loaders

ROUNDS = 40


def fit(folder: Path) -> None:
    torch.manual_seed(0)
    loop = FederatedLoop(
        ROUNDS,
        2,
        feddip(sparsity=0.8, reconfigure_every=3, residual="keep"),
        server_optimizer=momentum,
        evaluation=Evaluation(split="none"),
        checkpointing=Checkpointing(every_n_rounds=2, monitor="train_loss", save_top_k=2),
        default_root_dir=folder,
        console=False,
    )
    loop.fit(Net(), loaders(clients()), ckpt_path="last")


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.9, momentum=0.5)


def die_before(write: int, folder: Path) -> None:
    """Have this process kill itself before a write into the folder."""
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if done == write:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.rename", "os.remove", "os.mkdir") and str(arguments[0]).startswith(str(folder)):
            step()

    sys.addaudithook(audit)
    synced = os.fsync
    os.fsync = lambda handle: (step(), synced(handle))[1]


def live(folder: Path, write: int | None) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if write is not None:
                die_before(write, folder)
            fit(folder)
            code = 0
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(scratch: Path) -> None:
    assert live(scratch / "whole", None) == 0
    lives = 1
    while (code := live(scratch / "lives", lives)) != 0:
        if code != -signal.SIGKILL:
            sys.exit(f"life {lives} ended with {code}")
        lives += 1
    print(lives)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
