"""Flower's simulation on the CIFAR-10 workload, its clients LightningModules; runs in an environment with flwr[simulation].

As its Lightning example: a new model and a new Trainer for each message; the images lie in memory. With the option ``quiet``
the Trainer says and saves nothing, without it is Lightning's default, as there. One core per client, so that two are trained
at a time where there are two cores.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from speed_apart import BATCH, CLIENTS, COHORT, RATE, SimpleCNN, Turns, read_clients
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)


class Network(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = SimpleCNN()

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=RATE)


def train(folder: str, options: Mapping[str, bool], message: Message, context: Context) -> Message:
    """One client's round."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.ERROR)
    images, classes = read_clients(folder)
    client = int(context.node_config["partition-id"])
    examples = TensorDataset(torch.from_numpy(np.array(images[client])), torch.from_numpy(np.array(classes[client])))
    model = Network()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", **options)
    trainer.fit(model, DataLoader(examples, batch_size=BATCH, shuffle=True))
    content = RecordDict(
        {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord({"num-examples": len(examples)})}
    )
    return Message(content=content, reply_to=message)


def run_rounds(grid: Grid, context: Context) -> None:
    """The server."""
    turns = Turns()

    def between(server_round: int, arrays: ArrayRecord) -> None:
        if server_round:
            turns.report()
        turns.wait()

    strategy = FedAvg(
        fraction_train=COHORT / CLIENTS, fraction_evaluate=0.0, min_train_nodes=COHORT, min_available_nodes=CLIENTS
    )
    strategy.start(grid, initial_arrays=ArrayRecord(Network().state_dict()), num_rounds=10**6, evaluate_fn=between)


def main() -> None:
    torch.set_num_threads(1)
    server, client = ServerApp(), ClientApp()
    server.main()(run_rounds)
    client.train()(partial(train, sys.argv[1], QUIET if "quiet" in sys.argv else {}))
    resources: dict[str, Any] = {"num_cpus": 1, "num_gpus": 0.0}
    run_simulation(server, client, num_supernodes=CLIENTS, backend_config={"client_resources": resources})
