"""Turbofan engines that run to failure: how many cycles are left, from 14 sensors; every engine a client.

The simulated fleet FD001 of C-MAPSS: A. Saxena, K. Goebel, D. Simon, N. Eklund, "Damage Propagation Modeling for Aircraft
Engine Run-to-Failure Simulation", PHM 2008, published by NASA's Prognostics Center of Excellence. The preparation is the
usual one of X. Li, Q. Ding, J.-Q. Sun, "Remaining useful life estimation in prognostics using deep convolution neural
networks", Reliability Engineering & System Safety 172, 2018, https://doi.org/10.1016/j.ress.2017.11.021: windows of 30
cycles, the 14 sensors that change, scaled to [-1, 1] by their range, the remaining life capped at 125 cycles.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from lightning_fedsparse.datasets.download import data_root
from lightning_fedsparse.datasets.in_memory import InMemoryDataModule, ReadyDataset

__all__ = ["Engines", "TurbofanDataModule", "read_engines"]

# engine, cycle, three settings, 21 sensors
_COLUMNS = 26
# of those 21 the ones that change in FD001, from 1
_SENSORS = (2, 3, 4, 7, 8, 9, 11, 12, 13, 14, 15, 17, 20, 21)
_NPZ = "fd001.npz"

Floats = npt.NDArray[np.floating[Any]]


class Engines(NamedTuple):
    """Rows of one cycle each, shape (n, 26), of training and test engines; cycles left after each test engine's last."""

    train: Floats
    test: Floats
    rul: Floats


def read_engines(folder: Path) -> Engines:
    """Read FD001: ``fd001.npz`` (arrays ``train``, ``test``, ``rul``), or NASA's three text files.

    Raises:
        FileNotFoundError: If neither is there; says what is expected where.
        ValueError: If an array has another shape.
    """
    path = folder / _NPZ
    if path.exists():
        with np.load(path, allow_pickle=False) as arrays:
            missing = [name for name in Engines._fields if name not in arrays]
            if missing:
                raise ValueError(f"{path} lacks the arrays {', '.join(missing)}")
            engines = Engines(*(arrays[name] for name in Engines._fields))
    else:
        files = [folder / f"{name}_FD001.txt" for name in ("train", "test", "RUL")]
        for file in files:
            if not file.exists():
                raise FileNotFoundError(
                    f"expected NASA's train_FD001.txt, test_FD001.txt and RUL_FD001.txt in {folder}, found no {file.name}: "
                    "they are in CMAPSSData.zip of the Turbofan Engine Degradation Simulation Data Set, and not "
                    "downloaded, for no licence comes with them"
                )
        train, test, rul = (np.loadtxt(file, ndmin=2) for file in files)
        engines = Engines(train, test, rul.reshape(-1))
    for name, rows in (("train", engines.train), ("test", engines.test)):
        if rows.ndim != 2 or rows.shape[1] != _COLUMNS or not len(rows):
            raise ValueError(
                f"{name} of FD001 in {folder} must have rows of {_COLUMNS} columns, got shape {rows.shape}"
            )
    count = len(np.unique(engines.test[:, 0]))
    if engines.rul.shape != (count,):
        raise ValueError(
            f"RUL of FD001 in {folder} must have one value for each of {count} engines, got {engines.rul.shape}"
        )
    return engines


class TurbofanDataModule(InMemoryDataModule):
    """Windows of sensor values, float32 of shape (14, window), and the cycles left, float32; engines are client keys.

    Every cycle of a training engine that has a whole window behind it is an example; of a test engine its last one alone.
    Each sensor's range over all training engines becomes [-1, 1]: in a real federation these are 28 numbers that the
    clients would have to tell, or that the sensors' data sheet states.

    The windows of an engine overlap, so a validation part drawn from them at random says little: hold out engines.

    Args:
        root: Folder of all data sets, with ``cmapss-fd001/`` in it (see :func:`read_engines`); see
            :func:`lightning_fedsparse.datasets.download.data_root`.
        batch_size: Windows per batch.
        window: Cycles in a window.
        cap: Most cycles that count as left: an engine that will run longer is as good as new.
        num_workers: Worker processes of a loader.
    """

    def __init__(
        self,
        root: str | None = None,
        *,
        batch_size: int = 64,
        window: int = 30,
        cap: float = 125.0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers)
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        if not cap > 0:
            raise ValueError(f"cap must be positive, got {cap}")
        self.folder: Path = data_root(root) / "cmapss-fd001"
        self.window = window
        self.cap = cap
        self._halves: dict[str, ReadyDataset] = {}

    def setup(self, stage: str) -> None:
        """Read the engines and cut their histories into windows, once for all stages."""
        if self._halves:
            return
        engines = read_engines(self.folder)
        sensors = [4 + sensor for sensor in _SENSORS]
        low, high = engines.train[:, sensors].min(0), engines.train[:, sensors].max(0)
        spread = np.where(high > low, high - low, 1.0)
        for half, rows in (("train", engines.train), ("test", engines.test)):
            values = (2 * (rows[:, sensors] - low) / spread - 1).astype(np.float32)
            inputs, left, keys = [], [], []
            for position, engine in enumerate(np.unique(rows[:, 0])):
                own = values[rows[:, 0] == engine]
                if len(own) < self.window:
                    raise ValueError(
                        f"window must be at most {len(own)}, the cycles of {half} engine {engine:g}, got {self.window}"
                    )
                views = np.lib.stride_tricks.sliding_window_view(own, self.window, axis=0)
                cycles = np.arange(len(views) - 1, -1, -1, dtype=np.float32)
                if half == "test":
                    views, cycles = views[-1:], engines.rul[position : position + 1].astype(np.float32)
                inputs.append(views)
                left.append(np.minimum(cycles, np.float32(self.cap)))
                keys.append(np.full(len(views), int(engine)))
            self._halves[half] = ReadyDataset(
                torch.from_numpy(np.concatenate(inputs)),
                torch.from_numpy(np.concatenate(left)),
                client_keys=np.concatenate(keys) if half == "train" else None,
            )

    def dataset(self, half: Literal["train", "test"], *, augment: bool) -> ReadyDataset:
        """Return the training or the test windows; there is no augmentation."""
        assert self._halves, "setup comes first"
        return self._halves[half]
