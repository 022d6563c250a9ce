"""FIARSE in the loop against FIARSE by hand: plain PyTorch that shares no code with the library's method.

The gradient's factor is not written down here: autograd finds it from the surrogate that it is derived from.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedsparse import FederatedDataModule, FederatedLoop
from lightning_fedsparse.aggregation import MaskedMean
from lightning_fedsparse.callbacks import fiarse
from lightning_fedsparse.capacities import CapacityList
from lightning_fedsparse.sampling import UniformSampling
from lightning_fedsparse.seeding import derive_seed
from tests.test_loop import QUIET, Net, clients

ROUNDS, PER_ROUND, EPOCHS, SEED = 5, 4, 2, 5
MASKED = ("first.weight", "last.weight")
CAPACITIES = [1.0, 1 / 4, 1 / 16, 1 / 64, 1 / 4, 1 / 16]


def threshold(weights, capacity):
    magnitudes = sorted((abs(float(w)) for weight in weights for w in weight.flatten()), reverse=True)
    return 0.0 if capacity == 1 else magnitudes[max(1, int(capacity * len(magnitudes))) - 1]


def effective(weight, held, theta, corrected):
    kept = (held & (weight.abs() >= theta)).to(weight.dtype)
    if theta == 0 or not corrected:
        return weight * kept
    surrogate = (weight.abs() - theta) / (weight.abs() + theta)
    return weight * kept + weight.detach() * kept * (surrogate - surrogate.detach())


def fiarse_by_hand(model, data, *, extraction, weighting, corrected, server_lr):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    for t in range(ROUNDS):
        cohort = UniformSampling().sample(list(data), PER_ROUND, seed=SEED, round_index=t)
        sums = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in state.items()}
        counts = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in state.items()}
        for client in cohort:
            capacity = CAPACITIES[list(data).index(client)]
            groups = [MASKED] if extraction == "model" else [(name,) for name in MASKED]
            thetas = {name: threshold([state[n] for n in group], capacity) for group in groups for name in group}
            held = {name: state[name].abs() >= thetas[name] for name in MASKED}
            torch.manual_seed(derive_seed(SEED, "client", t, client))
            local = copy.deepcopy(model)
            local.load_state_dict(state)
            weights = dict(local.named_parameters())
            for name in MASKED:
                weights[name].data *= held[name]
            optimizer = local.configure_optimizers()
            for _ in range(EPOCHS):
                for x, y in DataLoader(data[client], batch_size=8, shuffle=True):
                    optimizer.zero_grad()
                    used = {name: effective(weights[name], held[name], thetas[name], corrected) for name in MASKED}
                    F.cross_entropy(functional_call(local, used, (x,)), y).backward()
                    optimizer.step()
            share = 1 if weighting == "uniform" else len(data[client])
            for name, tensor in local.state_dict().items():
                if name in MASKED:
                    assert torch.equal(tensor[~held[name]], torch.zeros_like(tensor[~held[name]]))
                    sums[name] += share * held[name] * (state[name] - tensor)
                    counts[name] += share * held[name]
                else:
                    sums[name] += share * ((state[name] - tensor) if name in parameters else tensor)
                    counts[name] += share
        for name, tensor in state.items():
            if name in parameters:
                step = torch.where(counts[name] > 0, sums[name] / counts[name].clamp(min=1), 0)
                state[name] = tensor - server_lr * step
            else:
                state[name] = (sums[name] / counts[name]).to(tensor.dtype)
    return state


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1),
}


class Double(Net):
    def __init__(self, optimizer):
        super().__init__()
        self.make_optimizer = OPTIMIZERS[optimizer]
        self.double()

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters())


@pytest.mark.parametrize(
    "option",
    [
        {},
        {"extraction": "tensor"},
        {"weighting": "examples"},
        {"gradient": "plain"},
        {"server_lr": 0.5},
        {"optimizer": "adamw"},
    ],
    ids=str,
)
def test_federation_equals_fiarse_by_hand(option):
    extraction, weighting = option.get("extraction", "model"), option.get("weighting", "uniform")
    gradient, server_lr = option.get("gradient", "tcb"), option.get("server_lr", 1.0)
    torch.manual_seed(3)
    model = Double(option.get("optimizer", "sgd"))
    data = {name: TensorDataset(part.tensors[0].double(), part.tensors[1]) for name, part in clients().items()}
    expected = fiarse_by_hand(
        copy.deepcopy(model),
        data,
        extraction=extraction,
        weighting=weighting,
        corrected=gradient == "tcb",
        server_lr=server_lr,
    )
    loaders = {name: DataLoader(part, batch_size=8, shuffle=True) for name, part in data.items()}
    loop = FederatedLoop(
        ROUNDS,
        PER_ROUND,
        fiarse(extraction=extraction, gradient=gradient),
        {"max_epochs": EPOCHS},
        aggregator=MaskedMean(weighting),
        server_optimizer=None if server_lr == 1 else lambda parameters: torch.optim.SGD(parameters, lr=server_lr),
        seed=SEED,
        evaluation=QUIET,
        console=False,
    )
    loop.fit(model, FederatedDataModule(loaders, capacities=CapacityList(CAPACITIES)))
    # a bias before BatchNorm has a gradient of rounding errors alone, which Adam divides by as little
    atol = 1e-10 if "optimizer" in option else 1e-12
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=atol)
