"""What a peer's process shares with ours: the network, the clients' images and the turns; needs torch and numpy alone.

A peer is installed into an environment of its own. Its process runs a round whenever it reads a line, and prints how long that
took as a line of JSON, so that its rounds stand between ours.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

CLIENTS, COHORT, BATCH, RATE = 1000, 50, 10, 0.1


class SimpleCNN(nn.Module):
    """The CNN of pfl-research's CIFAR-10 benchmark for images of shape (n, 3, 32, 32): 1,626,442 parameters.

    F. Granqvist et al., "pfl-research: simulation framework for accelerating research in Private Federated Learning", 2024,
    https://arxiv.org/abs/2404.06430.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 32, 3),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Dropout(0.25),
            nn.Flatten(),
            nn.Linear(64 * 14 * 14, 128),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(128, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layers(images)
        return logits


class Turns:
    """The times at which this process may work: from a line on the standard input to the next report."""

    def wait(self) -> None:
        """Wait for a turn; end the process where nobody asks for one any more."""
        if not sys.stdin.readline():
            sys.exit()  # also from a thread of the peer's, which then shuts the rest down
        self._started = time.perf_counter()

    def report(self) -> None:
        """Print how long the turn took."""
        print(json.dumps({"seconds": time.perf_counter() - self._started}), flush=True)


def write_clients(folder: Path, images: npt.NDArray[np.float32], classes: npt.NDArray[np.int64]) -> None:
    """Leave images of shape (clients, n, 3, 32, 32) and classes of shape (clients, n) for a peer."""
    np.save(folder / "images.npy", images)
    np.save(folder / "classes.npy", classes)


def read_clients(folder: str) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """What :func:`write_clients` left, mapped into memory: processes of one machine share it."""
    images, classes = (np.load(Path(folder, f"{name}.npy"), mmap_mode="r") for name in ("images", "classes"))
    return images, classes
