"""Where a round's time goes: exclusive wall time of its parts, by wrapping the functions in which they begin.

Each part's time is its own, without that of parts inside it, so that all of them make the whole round. A wrapper costs a
microsecond a call, some twenty calls a step.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import wraps
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import pages
import torch
from lightning.pytorch.loops.optimization.automatic import Closure
from lightning.pytorch.trainer import call
from speed_ours import Ours
from speed_overhead import CLIENTS, FEW, Tiny, TinyData
from speed_tables import WARM_UP, Measured
from speed_work import CIFAR10, FASHION

from lightning_fedsparse import FederatedDataModule, FederatedLoop, intake
from lightning_fedsparse.aggregation import WeightedMean
from lightning_fedsparse.broadcasting import Broadcaster
from lightning_fedsparse.callbacks import feddip
from lightning_fedsparse.client import ClientWorker
from lightning_fedsparse.clients import Client
from lightning_fedsparse.counting_wire import CountingWire
from lightning_fedsparse.effective import EffectiveWeights
from lightning_fedsparse.loaders import _InProcessLoader
from lightning_fedsparse.models import ImageClassifier
from lightning_fedsparse.partition import IidPartition
from lightning_fedsparse.resident import ResidentTrainer
from lightning_fedsparse.wire import Wire

__all__ = ["lines", "measure"]

FORWARD, BACKWARD, STEP, DATA = "forward", "backward", "optimizer step", "data"
LIGHTNING, CALLBACKS, TRAINER = "Lightning's fit and loops", "callbacks", "the Trainer made as new"
CLIENT, ENCODE, DECODE = "a client's round: load, update", "wire: encode", "wire: decode"
CHECK, ACCOUNT, AGGREGATE = "wire: check", "wire: account", "aggregate"
BROADCAST, SERVER, RECORD, ROUND = "broadcast", "server step", "record", "the rest of the round"
COMPUTE = (FORWARD, BACKWARD, STEP, DATA)
MOST = 0.05  # of the round, for any other part

_WRAPPED: list[tuple[Any, str, str]] = [
    (Tiny, "training_step", FORWARD),
    (ImageClassifier, "training_step", FORWARD),
    (torch.Tensor, "backward", BACKWARD),
    (torch.optim.SGD, "step", STEP),
    (torch.optim.Optimizer, "zero_grad", STEP),
    (Client, "train_loader", DATA),
    (FederatedDataModule, "client", DATA),
    (Closure, "__call__", LIGHTNING),  # inside the optimizer's step
    (pl.Trainer, "fit", LIGHTNING),
    (call, "_call_callback_hooks", CALLBACKS),
    (EffectiveWeights, "_after_step", CALLBACKS),
    (ResidentTrainer, "next", TRAINER),
    (ClientWorker, "train", CLIENT),
    *((wire, "encode_upload", ENCODE) for wire in (Wire, CountingWire)),
    *((wire, "encode_broadcast", ENCODE) for wire in (Wire, CountingWire)),
    *((wire, "decode", DECODE) for wire in (Wire, CountingWire)),
    *((wire, "measure", ACCOUNT) for wire in (Wire, CountingWire)),
    (intake, "check_update", CHECK),
    (WeightedMean, "start", AGGREGATE),
    (WeightedMean, "add", AGGREGATE),
    (WeightedMean, "result", AGGREGATE),
    (Broadcaster, "start", BROADCAST),
    (Broadcaster, "send", BROADCAST),
    (FederatedLoop, "_server_step", SERVER),
    (FederatedLoop, "_record", RECORD),
    (FederatedLoop, "_round", ROUND),
]


class Spans:
    """Exclusive seconds by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since = 0.0

    def wrapped(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """The function, timed."""

        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._enter(name)
            try:
                return function(*args, **kwargs)
            finally:
                self._leave()

        return timed

    def iterated(self, function: Callable[..., Iterator[Any]], name: str) -> Callable[..., Iterator[Any]]:
        """The generator function, timed while it works and not while it waits to be asked."""

        @wraps(function)
        def timed(*args: Any) -> Iterator[Any]:
            step = self.wrapped(function(*args).__next__, name)
            while True:
                try:
                    item = step()
                except StopIteration:
                    return
                yield item

        return timed

    def _enter(self, name: str) -> None:
        self._pass()
        self._open.append(name)

    def _leave(self) -> None:
        self._pass()
        self._open.pop()

    def _pass(self) -> None:
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now


def profiled(ours: Ours, rounds: int) -> dict[str, float]:
    """Seconds of the parts of a round, means of the rounds after the warm-up."""
    for index in range(WARM_UP):
        ours.round(index)
    spans = Spans()
    with ExitStack() as stack:
        for owner, name, part in _WRAPPED:
            stack.enter_context(patch.object(owner, name, spans.wrapped(getattr(owner, name), part)))
        batches = spans.iterated(_InProcessLoader._batches, DATA)
        stack.enter_context(patch.object(_InProcessLoader, "_batches", batches))
        for index in range(WARM_UP, WARM_UP + rounds):
            ours.round(index)
    return {part: seconds / rounds for part, seconds in spans.seconds.items()}


def measure(rounds: int) -> Measured:
    """The mean round of each workload."""
    total = WARM_UP + rounds
    tiny = FederatedDataModule(TinyData(FEW), IidPartition(CLIENTS))
    runs = {
        "CIFAR-10": Ours.of(CIFAR10, CIFAR10.data(), total, wire="count"),
        "CIFAR-10, real payloads": Ours.of(CIFAR10, CIFAR10.data(), total),
        "Fashion-MNIST": Ours.of(FASHION, FASHION.data(), total),
        "Fashion-MNIST, FedDIP": Ours.of(FASHION, FASHION.data(), total, feddip()),
        f"Linear(8, 2), {FEW} steps": Ours(Tiny(), tiny, CLIENTS, total),
    }
    seconds = {}
    for name, ours in runs.items():
        seconds |= {f"{name}: {part}": [spent] for part, spent in profiled(ours, rounds).items()}
    return Measured(seconds)


def lines(measured: Measured) -> list[str]:
    """Shares of each part in each round, and milliseconds per client of what is not computation where nothing else is."""
    runs: dict[str, dict[str, float]] = {}
    for key, [spent] in measured.seconds.items():
        run, part = key.split(": ", 1)
        runs.setdefault(run, {})[part] = spent
    shares = {run: {part: spent / sum(parts.values()) for part, spent in parts.items()} for run, parts in runs.items()}
    first, *_, tiny = runs
    others = sorted(
        {part for parts in runs.values() for part in parts} - {*COMPUTE}, key=shares[first].get, reverse=True
    )
    rows = [
        [
            part,
            *(f"{100 * shares[run].get(part, 0):.1f} %" for run in runs),
            f"{1000 * runs[tiny].get(part, 0) / CLIENTS:.3f}",
        ]
        for part in (*COMPUTE, *others)
    ]
    head = ["part of a round", *runs, "the last, ms per client"]
    largest = {
        run: max((share, part) for part, share in parts.items() if part not in COMPUTE) for run, parts in shares.items()
    }
    aims = [
        [run, f"{part}, {100 * share:.1f} %", f"at most {100 * MOST:g} %", "holds" if share <= MOST else "misses"]
        for run, (share, part) in largest.items()
        if run != tiny
    ]
    return [
        *pages.table(head, rows),
        "",
        *pages.table(["round", "largest other part", "wanted", ""], aims),
        "",
        f"Mean rounds; {measured.busy:.2f} cores were busy just before.",
    ]
