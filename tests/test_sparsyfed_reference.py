"""SparsyFed in the loop against SparsyFed by hand: plain PyTorch that shares no code with the library's method.

The powers are an expression in the autograd graph, and the linear layers have a backward pass of their own.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedsparse import FederatedLoop
from lightning_fedsparse.callbacks import MaskMonitor, SparsityMonitor, TopKAfterTraining, sparsyfed
from lightning_fedsparse.sampling import UniformSampling
from lightning_fedsparse.schedules import ConstantSchedule
from lightning_fedsparse.seeding import derive_seed
from tests.test_loop import QUIET, Net, assert_smaller_clients_send_less, clients, loaders

ROUNDS, PER_ROUND, EPOCHS, SEED, SPARSITY = 6, 3, 2, 5, 0.8
PRUNED = ("first.weight", "last.weight")


class PrunedLinear(torch.autograd.Function):
    """Exact forward; the weight's gradient from the largest inputs, as many as the weight has non-zeros (in share)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, threshold: float | None) -> Tensor:
        k = math.ceil(x.numel() * int((weight != 0).sum()) / weight.numel())
        t = x.abs().flatten().sort(descending=True).values[max(k, 1) - 1] if threshold is None else threshold
        ctx.save_for_backward(x * (x.abs() >= t), weight)
        return x @ weight.T + bias

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x_hat, weight = ctx.saved_tensors
        return grads[0] @ weight, grads[0].T @ x_hat, grads[0].sum(0), None


def loss_at(
    local: Net, powers: dict[str, Tensor], x: Tensor, y: Tensor, prune: bool, first: dict[str, float]
) -> Tensor:
    def linear(name: str, x: Tensor) -> Tensor:
        weight, bias = powers[f"{name}.weight"], getattr(local, name).bias
        if not prune or bool((weight != 0).all()):
            return F.linear(x, weight, bias)
        k = math.ceil(x.numel() * int((weight != 0).sum()) / weight.numel())
        if first is not None and name not in first:
            first[name] = float(x.detach().abs().flatten().sort(descending=True).values[k - 1])
        return PrunedLinear.apply(x, weight, bias, None if first is None else first[name])

    hidden = F.relu(local.norm(linear("first", x)))
    return F.cross_entropy(linear("last", hidden), y)


def beta_of(weights: dict[str, Tensor], exponent: str, beta: float) -> dict[str, float]:
    if exponent == "fixed":
        return dict.fromkeys(weights, beta)
    own = {}
    for name, w in weights.items():
        a = w.detach().abs()
        sigma = torch.linalg.svdvals(a)[0]
        mean = (a / sigma)[a != 0].mean() if exponent == "spectral_global" else (a / sigma).mean()
        own[name] = round(1 + float(mean), 4 if exponent == "spectral_global" else 8)
    if exponent == "spectral_global":
        return dict.fromkeys(own, sum(own.values()) / len(own))
    return own


def pruned(state: dict[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """One ranking over both layers."""
    order = torch.cat([state[name].abs().flatten() for name in PRUNED]).argsort(stable=True)
    keep = torch.ones(len(order), dtype=torch.float64)
    keep[order[: round(sparsity * len(order))]] = 0
    parts = keep.split([state[name].numel() for name in PRUNED])
    return state | {name: state[name] * part.view(state[name].shape) for name, part in zip(PRUNED, parts, strict=True)}


def sparsyfed_by_hand(
    model: Net,
    data: dict[str, TensorDataset],
    *,
    beta: float = 1.25,
    exponent: str = "fixed",
    activation_pruning: bool = True,
    activation_threshold: str = "per_batch",
    ramp: float = 0.0,
    learning_rate_decay: float = 1.0,
    capacities: dict[str, float] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns what forward uses, and the support."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if exponent == "fixed":
        for name in PRUNED:
            state[name] = state[name].sign() * state[name].abs() ** (1 / beta)
    for t in range(ROUNDS):
        share = min(1.0, (t + 1) / ROUNDS / ramp) if ramp else 1.0
        sparsity = SPARSITY * (1 - (1 - share) ** 3) if ramp else SPARSITY
        cohort = UniformSampling().sample(list(data), PER_ROUND, seed=SEED, round_index=t)
        sums = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in state.items()}
        for client in cohort:
            torch.manual_seed(derive_seed(SEED, "client", t, client))
            local = copy.deepcopy(model)
            own = capacities[client] if capacities else 1.0
            local.load_state_dict(state if t == 0 or own == 1 else pruned(state, 1 - own))
            weights = dict(local.named_parameters())
            betas = beta_of({name: weights[name] for name in PRUNED}, exponent, beta)
            optimizer = local.configure_optimizers()
            for group in optimizer.param_groups:
                group["lr"] *= learning_rate_decay ** (t + 1)
            first: Any = {} if activation_threshold == "first_batch" else None
            for _ in range(EPOCHS):
                for x, y in DataLoader(data[client], batch_size=8, shuffle=True):
                    optimizer.zero_grad()
                    # for an exponent of 1 autograd has no slope at 0, the identity has
                    powers = {
                        n: weights[n] if betas[n] == 1 else weights[n].sign() * weights[n].abs() ** betas[n]
                        for n in PRUNED
                    }
                    loss_at(local, powers, x, y, activation_pruning, first).backward()
                    optimizer.step()
            sent = {name: tensor.clone() for name, tensor in local.state_dict().items()}
            for name, tensor in pruned(sent, max(sparsity, 1 - own)).items():
                sums[name] += len(data[client]) * tensor.double()
        total = sum(len(data[client]) for client in cohort)
        state = {name: (value / total).to(state[name].dtype) for name, value in sums.items()}
    betas = beta_of({name: state[name] for name in PRUNED}, exponent, beta)
    support = {name: state[name] != 0 for name in PRUNED}
    for name in PRUNED:
        state[name] = state[name].sign() * state[name].abs() ** betas[name]
    return state, support


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta": 2.0, "ramp": 0.5},
        {"beta": 1.0, "activation_threshold": "first_batch"},
        {"activation_threshold": "first_batch", "learning_rate_decay": 0.9},
        {"activation_pruning": False},
        {"exponent": "spectral_layer"},
        {"exponent": "spectral_global", "activation_pruning": False},
    ],
    ids=lambda options: " ".join(map(str, options.values())) or "default",
)
def test_federation_equals_sparsyfed_by_hand(options: dict[str, Any]) -> None:
    # float64, so that the order of sums can't blur what is compared
    check_against_hand(sparsyfed(sparsity=SPARSITY, **options), **options)


def test_federation_equals_the_top_k_baseline_by_hand() -> None:
    """Plain weights, exact gradients, the largest weights after training; monitors change nothing."""
    topk = TopKAfterTraining(ConstantSchedule(SPARSITY))
    check_against_hand([topk], beta=1.0, activation_pruning=False)
    check_against_hand([topk, MaskMonitor(), SparsityMonitor()], beta=1.0, activation_pruning=False)


@pytest.mark.parametrize("options", [{}, {"beta": 1.0, "activation_pruning": False}, {"ramp": 0.5}])
def test_federation_of_clients_of_different_sparsity_equals_one_by_hand(options: dict[str, Any]) -> None:
    capacities = {"c0": 0.1, "c1": 0.15, "c2": 1.0, "c3": 0.1, "c4": 0.15, "c5": 0.3}
    loop = check_against_hand(sparsyfed(sparsity=SPARSITY, **options), capacities=capacities, **options)
    assert_smaller_clients_send_less(loop, capacities)


def check_against_hand(
    callbacks: Sequence[pl.Callback], *, capacities: dict[str, float] | None = None, **options: Any
) -> FederatedLoop:
    torch.manual_seed(3)
    model = Net().double()
    data = {name: TensorDataset(part.tensors[0].double(), part.tensors[1]) for name, part in clients().items()}
    state, support = sparsyfed_by_hand(copy.deepcopy(model), data, capacities=capacities, **options)
    loop = FederatedLoop(
        ROUNDS, PER_ROUND, callbacks, {"max_epochs": EPOCHS}, seed=SEED, evaluation=QUIET, console=False
    )
    loop.fit(model, loaders(data, capacities))
    assert all(not record.failures for record in loop.history)
    for name in PRUNED:
        assert torch.equal(loop.state.masks[name], support[name])
        assert torch.equal(model.state_dict()[name] != 0, support[name])
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=1e-12)
    return loop
