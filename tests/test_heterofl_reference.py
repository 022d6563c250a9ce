"""HeteroFL and FedRolex in the loop against both by hand: clients that train physically small networks in plain PyTorch."""

from __future__ import annotations

import math
from itertools import pairwise

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedsparse import FederatedDataModule, FederatedLoop
from lightning_fedsparse.callbacks import WidthMasking
from lightning_fedsparse.capacities import CapacityList
from lightning_fedsparse.sampling import UniformSampling
from lightning_fedsparse.seeding import derive_seed
from tests.test_loop import QUIET, clients

ROUNDS, PER_ROUND, EPOCHS, SEED = 5, 4, 2, 5
SIZES = (8, 6, 5, 3)
CAPACITIES = [1.0, 1 / 4, 1 / 16, 0.64, 1 / 4, 1 / 16]


class Scaler(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.width = width

    def forward(self, x):
        return x / self.width


def small_network(sizes, width, scale):
    """Layers 0, 3 and 6 are linear, whatever the sizes."""
    scaler = Scaler(width if scale else 1.0)
    layers = []
    for inputs, outputs in pairwise(sizes[:3]):
        layers += [nn.Linear(inputs, outputs), scaler, nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(*sizes[2:])).double()


def heterofl_by_hand(state, data, *, selection, scale):
    for t in range(ROUNDS):
        cohort = UniformSampling().sample(list(data), PER_ROUND, seed=SEED, round_index=t)
        sums = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        counts = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        for client in cohort:
            capacity = CAPACITIES[list(data).index(client)]
            width = math.sqrt(capacity)
            counted = [math.ceil(round(width * size, 9)) for size in SIZES[1:3]]
            if selection == "random" and capacity < 1:
                draws = torch.Generator()
                draws.manual_seed(derive_seed(derive_seed(SEED, "method", 0), "units", t, client))
                hidden = [torch.randperm(k, generator=draws)[:n] for k, n in zip(SIZES[1:3], counted, strict=True)]
            else:
                start = {"static": 0, "rolling": t, "rolling_backward": -t, "random": 0}[selection]
                hidden = [
                    torch.tensor([(start + i) % k for i in range(n)]) for k, n in zip(SIZES[1:3], counted, strict=True)
                ]
            units = [torch.arange(SIZES[0]), *hidden, torch.arange(SIZES[3])]
            small = small_network([len(some) for some in units], width, scale)
            where = {}
            for position, number in enumerate((0, 3, 6)):
                rows, columns = units[position + 1], units[position]
                where[f"{number}.weight"] = (rows[:, None], columns[None, :])
                where[f"{number}.bias"] = (rows,)
            small.load_state_dict({name: state[name][index] for name, index in where.items()})
            torch.manual_seed(derive_seed(SEED, "client", t, client))
            optimizer = torch.optim.SGD(small.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
            for _ in range(EPOCHS):
                for x, y in DataLoader(data[client], batch_size=8, shuffle=True):
                    optimizer.zero_grad()
                    F.cross_entropy(small(x), y).backward()
                    optimizer.step()
            for name, tensor in small.state_dict().items():
                sums[name][where[name]] += tensor
                counts[name][where[name]] += 1
        state = {
            name: torch.where(counts[name] > 0, sums[name] / counts[name].clamp(min=1), old)
            for name, old in state.items()
        }
    return state


class Perceptron(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = small_network(SIZES, 1.0, scale=False)
        self.example_input_array = torch.zeros(1, 8, dtype=torch.float64)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("selection", ["static", "rolling", "rolling_backward", "random"])
def test_federation_equals_small_networks_by_hand(selection, scale):
    torch.manual_seed(3)
    model = Perceptron()
    data = {name: TensorDataset(part.tensors[0].double(), part.tensors[1]) for name, part in clients().items()}
    start = {name: tensor.clone() for name, tensor in model.net.state_dict().items()}
    expected = heterofl_by_hand(start, data, selection=selection, scale=scale)
    loop = FederatedLoop(
        ROUNDS,
        PER_ROUND,
        [WidthMasking(selection=selection, scale=scale)],
        {"max_epochs": EPOCHS},
        seed=SEED,
        evaluation=QUIET,
        console=False,
    )
    loaders = {name: DataLoader(part, batch_size=8, shuffle=True) for name, part in data.items()}
    loop.fit(model, FederatedDataModule(loaders, capacities=CapacityList(CAPACITIES)))
    for name, tensor in model.net.state_dict().items():
        assert not torch.equal(tensor, start[name])
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-12)
