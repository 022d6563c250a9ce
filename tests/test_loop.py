"""The loop against a plain-Python FedAvg, and what a round must keep true."""

import copy

import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedsparse import FederatedDataModule, FederatedLoop
from lightning_fedsparse.callbacks import feddip
from lightning_fedsparse.capacities import CapacityMapping
from lightning_fedsparse.evaluation import Evaluation
from lightning_fedsparse.sampling import UniformSampling
from lightning_fedsparse.seeding import derive_seed

QUIET = Evaluation(split="none")


class Net(pl.LightningModule):
    def __init__(self, lr=0.1):
        super().__init__()
        self.lr = lr
        self.first = nn.Linear(8, 16)
        self.norm = nn.BatchNorm1d(16)
        self.last = nn.Linear(16, 3)

    def forward(self, x):
        return self.last(F.relu(self.norm(self.first(x))))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x), y))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9, weight_decay=1e-3)


def clients(count=6, examples=20):
    generator = torch.Generator().manual_seed(1)
    data = {}
    for number in range(count):
        x = torch.randn(examples + 2 * number, 8, generator=generator)
        y = (x[:, :3] + 0.3 * torch.randn(len(x), 3, generator=generator)).argmax(1)
        data[f"c{number}"] = TensorDataset(x, y)
    return data


def loaders(data, capacities=None):
    own = {name: DataLoader(part, batch_size=8, shuffle=True) for name, part in data.items()}
    return FederatedDataModule(own, capacities=CapacityMapping(capacities) if capacities else None)


def assert_smaller_clients_send_less(loop, capacities):
    """In every round but a dense first one, both ways, the smallest clients move fewer bytes than all larger ones."""
    least = min(capacities.values())
    compared = 0
    for record in loop.history[2:]:
        for way in ("down", "up"):
            totals = {client: getattr(traffic, way).total for client, traffic in record.clients.items()}
            small = [total for client, total in totals.items() if capacities[client] == least]
            large = [total for client, total in totals.items() if capacities[client] > least]
            if small and large:
                assert max(small) < min(large)
                compared += 1
    assert compared


def plain_fedavg(model, data, *, rounds, per_round, epochs, seed):
    """FedAvg by hand: average of state dicts, weighted by examples."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for index in range(rounds):
        cohort = UniformSampling().sample(list(data), per_round, seed=seed, round_index=index)
        sums = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in state.items()}
        for name in cohort:
            torch.manual_seed(derive_seed(seed, "client", index, name))
            local = copy.deepcopy(model)
            local.load_state_dict(state)
            local.train()
            optimizer = local.configure_optimizers()
            loader = DataLoader(data[name], batch_size=8, shuffle=True)
            for _ in range(epochs):
                for x, y in loader:
                    optimizer.zero_grad()
                    F.cross_entropy(local(x), y).backward()
                    optimizer.step()
            for key, tensor in local.state_dict().items():
                sums[key] += len(data[name]) * tensor.double()
        total = sum(len(data[name]) for name in cohort)
        state = {key: (value / total).to(state[key].dtype) for key, value in sums.items()}
    return state


def fedavg_and_loop(callbacks=None, **arguments):
    torch.manual_seed(3)
    model = Net()
    expected = plain_fedavg(copy.deepcopy(model), clients(), rounds=3, per_round=4, epochs=2, seed=5)
    loop = FederatedLoop(3, 4, callbacks, {"max_epochs": 2}, seed=5, evaluation=QUIET, console=False, **arguments)
    loop.fit(model, loaders(clients()))
    return expected, model.state_dict(), loop


def test_dense_loop_is_fedavg_to_the_bit():
    expected, found, _ = fedavg_and_loop()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_feddip_without_sparsity_and_penalty_is_fedavg_to_the_bit():
    callbacks = feddip(sparsity=0.0, initial_sparsity=0.0, lambda_max=0.0, learning_rate_decay=1.0)
    expected, found, _ = fedavg_and_loop(callbacks)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_server_sgd_of_rate_one_is_fedavg_and_momentum_is_not():
    expected, found, _ = fedavg_and_loop(server_optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    _, moved, _ = fedavg_and_loop(server_optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0, momentum=0.9))
    assert not torch.allclose(moved["first.weight"], expected["first.weight"])
