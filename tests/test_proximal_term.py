"""FedProx: the term by hand, in the loop to the bit, beside masks and powers, and in a plain Trainer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedsparse import FederatedLoop
from lightning_fedsparse.callbacks import ErrorFeedback, MagnitudePruning, Powerpropagation, ProximalTerm, feddip
from lightning_fedsparse.callbacks.proximal_term import proximal_terms
from lightning_fedsparse.sampling import UniformSampling
from lightning_fedsparse.schedules import ConstantSchedule
from lightning_fedsparse.seeding import derive_seed
from tests.effective_reference import Net as SmallNet
from tests.effective_reference import assert_engine_clean, loader, quiet_trainer, seeded
from tests.test_loop import QUIET, Net, clients, fedavg_and_loop, loaders

ROUNDS, PER_ROUND, EPOCHS, SEED = 3, 4, 2, 5


def test_the_term_of_three_weights() -> None:
    terms = proximal_terms({"w": torch.tensor([1.0, 0.5, -2.0])}, {"w": torch.tensor([0.0, 0.5, -1.0])}, 0.5)
    assert terms["w"].tolist() == [0.5, 0.0, -0.5]


def fedprox_by_hand(model: Net, data: dict[str, TensorDataset], mu: float) -> dict[str, Tensor]:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for index in range(ROUNDS):
        cohort = UniformSampling().sample(list(data), PER_ROUND, seed=SEED, round_index=index)
        sums = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in state.items()}
        for name in cohort:
            torch.manual_seed(derive_seed(SEED, "client", index, name))
            local = copy.deepcopy(model)
            local.load_state_dict(state)
            optimizer = local.configure_optimizers()
            for _ in range(EPOCHS):
                for x, y in DataLoader(data[name], batch_size=8, shuffle=True):
                    optimizer.zero_grad()
                    F.cross_entropy(local(x), y).backward()
                    for key, parameter in local.named_parameters():
                        parameter.grad += mu * (parameter.detach() - state[key])
                    optimizer.step()
            for key, tensor in local.state_dict().items():
                sums[key] += len(data[name]) * tensor.double()
        total = sum(len(data[name]) for name in cohort)
        state = {key: (value / total).to(state[key].dtype) for key, value in sums.items()}
    return state


@pytest.mark.parametrize("mu", [0.01, 1.0])
def test_the_loop_is_fedprox_to_the_bit(mu: float) -> None:
    torch.manual_seed(3)
    model = Net()
    expected = fedprox_by_hand(copy.deepcopy(model), clients(), mu)
    loop = FederatedLoop(
        ROUNDS,
        PER_ROUND,
        [ProximalTerm(mu)],
        {"max_epochs": EPOCHS},
        seed=SEED,
        evaluation=QUIET,
        console=False,
    )
    loop.fit(model, loaders(clients()))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_a_strength_of_zero_is_fedavg_to_the_bit() -> None:
    expected, found, _ = fedavg_and_loop([ProximalTerm(0.0)])
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_beside_feddip_what_is_pruned_stays_pruned() -> None:
    _, without, plain = fedavg_and_loop(feddip(sparsity=0.6))
    _, held, loop = fedavg_and_loop([*feddip(sparsity=0.6), ProximalTerm(0.5)])
    assert not torch.equal(held["first.weight"], without["first.weight"])
    assert loop.history[-1].sparsity == plain.history[-1].sparsity > 0.5
    for name in ("first.weight", "last.weight"):
        assert not held[name][~loop.state.masks[name]].any()


def by_hand(module: SmallNet, batches: Any, mu: float, beta: float = 1.0) -> None:
    """L2-SP by autograd: the term is part of the loss, of the stored weights."""
    optimizer = module.configure_optimizers()
    parameters = dict(module.named_parameters())
    powered = ("first.weight", "second.weight")
    start = {name: weight.detach().clone() for name, weight in parameters.items()}
    for _ in range(2):
        for x, y in batches:
            effective = {n: w.sign() * w.abs() ** beta if n in powered else w for n, w in parameters.items()}
            output = torch.func.functional_call(module, effective, x)
            term = sum((weight - start[name]).square().sum() for name, weight in parameters.items())
            optimizer.zero_grad()
            (F.cross_entropy(output, y) + mu / 2 * term).backward()
            optimizer.step()


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_a_plain_trainer_stays_near_its_start(beta: float, order: int) -> None:
    module, expected = seeded(SmallNet).double(), seeded(SmallNet).double()
    batches = [(x.double(), y) for x, y in loader()]
    callbacks = [ProximalTerm(0.7), *([Powerpropagation(beta)] if beta > 1 else [])][::order]
    quiet_trainer(callbacks).fit(module, DataLoader(batches, batch_size=None))
    weights = [expected.first.weight, expected.second.weight]
    for weight in weights:
        weight.data = weight.data.sign() * weight.data.abs() ** (1 / beta)
    by_hand(expected, batches, 0.7, beta)
    for weight in weights:
        weight.data = weight.data.sign() * weight.data.abs() ** beta
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter, expected.get_parameter(name), rtol=0, atol=1e-12)
    assert_engine_clean(module)


class Frozen(SmallNet):
    """Its loss has no gradient, so that only the term could move a weight."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * 0

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("feedback", [False, True])
def test_masked_weights_stay_put_unless_they_learn(feedback: bool) -> None:
    module = seeded(Frozen)
    before = module.first.weight.detach().clone()
    masking = MagnitudePruning(ConstantSchedule(0.5), every=100, fold=False)
    quiet_trainer([masking, ProximalTerm(0.5), *([ErrorFeedback()] if feedback else [])]).fit(module, loader())
    cut = ~masking.masks["first.weight"]
    after = module.first.weight.detach()
    assert torch.equal(after[~cut], before[~cut])
    # pruning zeroes what is cut, except under feedback, where the stored weights stay and nothing pulls at them
    assert torch.equal(after[cut], before[cut] if feedback else torch.zeros_like(before[cut]))


def test_frozen_parameters_are_left_alone() -> None:
    module = seeded(SmallNet)
    module.first.requires_grad_(False)
    before = module.first.weight.detach().clone()
    callback = ProximalTerm(0.5)
    quiet_trainer([callback]).fit(module, loader())
    assert torch.equal(module.first.weight, before)
    assert callback.state_dict()["start"].keys() == {"second.weight", "second.bias"}


@pytest.mark.parametrize("mu", [-0.1, float("inf"), float("nan")])
def test_a_strength_below_zero_is_refused(mu: float) -> None:
    with pytest.raises(ValueError, match=rf"expected a proximal strength mu in \[0, inf\), got {mu}"):
        ProximalTerm(mu)
