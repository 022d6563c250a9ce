"""What a client's fit, a step, a log call and the round around them cost where the model costs nothing.

Linear(8, 2), batches of 4, clients whose fit has few or many steps: from the two follow what is paid per fit and what per
step. Four spans are timed: the plain loop, ``ResidentTrainer.next()`` with ``Trainer.fit``, the whole client's round (load,
fit, update, encode), and the federation's round (broadcast, decode, check, aggregate, record).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pages
import torch
import torch.nn.functional as F
from speed_ours import Ours
from speed_rivals import train_clients
from speed_tables import WARM_UP, Measured, Rounds, interleaved, notes
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedsparse import FederatedDataModule
from lightning_fedsparse.callbacks import SparsityCallback
from lightning_fedsparse.client import ClientJob, ClientWorker
from lightning_fedsparse.executors import LocalExecutor
from lightning_fedsparse.executors.local import Outcome
from lightning_fedsparse.partition import IidPartition
from lightning_fedsparse.quiet import quiet_lightning
from lightning_fedsparse.resident import ResidentTrainer

__all__ = ["FEW", "MANY", "Tiny", "TinyData", "lines", "measure"]

CLIENTS, BATCH, RATE = 20, 4, 0.1
FEW, MANY = 5, 50  # steps of a fit
TURNS = 3  # rounds here for one that is asked for: they are short

PLAIN, BARE, CALLBACKS, LOGS = "plain loop", "no callbacks", "three callbacks", "one self.log per step"
FIT, CLIENT, ROUND = "Trainer.fit", "client's round", "federation's round"
MOST_PER_FIT, MOST_PER_STEP = 2.5, 0.4  # milliseconds over the plain loop


class Tiny(pl.LightningModule):
    """A model that costs nothing, which may log its loss."""

    def __init__(self, *, logs: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layer = nn.Linear(8, 2)
        self._logs = logs

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss = F.cross_entropy(self.layer(batch[0]), batch[1])
        if self._logs:
            self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=RATE)


class TinyData(pl.LightningDataModule):
    """Clients of so many steps, once they are split."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        count = CLIENTS * BATCH * steps
        generator = torch.Generator().manual_seed(0)
        self._examples = TensorDataset(torch.rand(count, 8, generator=generator), torch.arange(count) % 2)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self._examples, batch_size=BATCH, shuffle=True)


class Nothing(SparsityCallback):
    """Does nothing in any hook."""


class Plain:
    """The hand-written loop on ready batches."""

    def __init__(self, data: FederatedDataModule) -> None:
        self._network = Tiny().layer
        self._weights = [parameter.detach().clone() for parameter in self._network.parameters()]
        self._total = [torch.zeros_like(weight) for weight in self._weights]
        self._clients = [list(data.client(client_id).train_loader()) for client_id in data.client_ids]

    def round(self, index: int) -> float:
        started = time.perf_counter()
        train_clients(self._network, self._weights, self._total, self._clients, rate=RATE, decay=0.0)
        return time.perf_counter() - started


class Fits:
    """Nothing but fits, of one client after the other."""

    def __init__(self, data: FederatedDataModule, model: Tiny, callbacks: list[pl.Callback]) -> None:
        self._data = data
        self._model = model
        self._trainers = ResidentTrainer({"max_epochs": 1}, callbacks)

    def round(self, index: int) -> float:
        clients = [self._data.client(client_id) for client_id in self._data.client_ids]
        with quiet_lightning():
            started = time.perf_counter()
            for client in clients:
                self._trainers.next().fit(self._model, client.train_loader())
            return time.perf_counter() - started


class ClientsTimed(LocalExecutor):
    """Adds up what clients take; as a variant it tells that of the round before."""

    def __init__(self) -> None:
        self._seconds = 0.0

    def run(self, worker: ClientWorker, jobs: Iterable[ClientJob]) -> Iterator[Outcome]:
        self._seconds = 0.0
        for result in super().run(worker, jobs):
            self._seconds += result.seconds  # type: ignore[union-attr]  # none fails
            yield result

    def round(self, index: int) -> float:
        return self._seconds


def measure(rounds: int) -> Measured:
    """All spans, for few and for many steps."""
    rounds *= TURNS
    variants: dict[str, Rounds] = {}
    for steps in (FEW, MANY):
        data = FederatedDataModule(TinyData(steps), IidPartition(CLIENTS))
        variants[_key(PLAIN, "", steps)] = Plain(data)
        for kind, logs, callbacks in (
            (BARE, False, []),
            (CALLBACKS, False, [Nothing() for _ in range(3)]),
            (LOGS, True, []),
        ):
            of = partial(_key, kind=kind, steps=steps)
            timed = ClientsTimed()
            variants[of(FIT)] = Fits(data, Tiny(logs=logs), callbacks)
            variants[of(ROUND)] = Ours(Tiny(logs=logs), data, CLIENTS, WARM_UP + rounds, callbacks, {}, timed)
            variants[of(CLIENT)] = timed  # after the round that it tells of
    return Measured(interleaved(variants, rounds))


def lines(measured: Measured) -> list[str]:
    """What is paid per fit and per step over the plain loop, in milliseconds."""
    plain = _costs(measured, PLAIN, "")
    rows = [[PLAIN, "", *(f"{cost:.3f}" for cost in plain)]]
    over = {}
    for kind in (BARE, CALLBACKS, LOGS):
        for span in (FIT, CLIENT, ROUND):
            over[span, kind] = [cost - least for cost, least in zip(_costs(measured, span, kind), plain, strict=True)]
            rows.append([span, kind, *(f"+{cost:.3f}" for cost in over[span, kind])])
    fit, step = over[CLIENT, CALLBACKS]
    log = over[FIT, LOGS][1] - over[FIT, BARE][1]
    aims = [
        _row("per client fit, three callbacks", fit, MOST_PER_FIT),
        _row("per step, three callbacks", step, MOST_PER_STEP),
        ["per self.log", f"{log:.3f}"],
        ["the round around a client", f"{over[ROUND, CALLBACKS][0] - fit:.3f}"],
    ]
    return [
        *pages.table(["milliseconds", "with", "per client fit", "per step"], rows),
        "",
        *pages.table(["a client's round over the plain loop, ms", "measured", "wanted", ""], aims),
        "",
        *notes(measured),
    ]


def _costs(measured: Measured, span: str, kind: str) -> tuple[float, float]:
    """Milliseconds per client fit and per step."""
    few, many = (1000 * measured[_key(span, kind, steps)] / CLIENTS for steps in (FEW, MANY))
    step = (many - few) / (MANY - FEW)
    return few - FEW * step, step


def _key(span: str, kind: str, steps: int) -> str:
    return f"{span}, {kind}, {steps} steps" if kind else f"{span}, {steps} steps"


def _row(what: str, cost: float, most: float) -> list[str]:
    return [what, f"{cost:.3f}", f"at most {most:g}", "holds" if cost <= most else "misses"]
