"""FedDIP in the loop against FedDIP by hand: fifty lines of plain PyTorch that share no code with the library's method."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedsparse import FederatedLoop
from lightning_fedsparse.callbacks import feddip
from lightning_fedsparse.sampling import UniformSampling
from lightning_fedsparse.seeding import derive_seed
from tests.test_loop import QUIET, Net, assert_smaller_clients_send_less, clients, loaders

ROUNDS, PERIOD, PER_ROUND, EPOCHS, SEED = 7, 2, 3, 2, 5
START, END, LAMBDA, LEVELS = 0.3, 0.7, 0.05, 4
PRUNED = ("first.weight", "last.weight")


def scheduled(t):
    return END + (START - END) * (1 - t / ROUNDS) ** 3


def global_mask(weights, sparsity):
    pool = torch.cat([w.abs().flatten() for w in weights.values()])
    order = sorted(range(len(pool)), key=lambda i: (float(pool[i]), i))
    keep = torch.ones(len(pool), dtype=torch.bool)
    keep[order[: round(sparsity * len(pool))]] = False
    parts = keep.split([w.numel() for w in weights.values()])
    return {name: part.view(w.shape) for (name, w), part in zip(weights.items(), parts, strict=True)}


def erk_mask(weights, sparsity):
    """Two layers; at this sparsity one pass decides which of them stays dense."""
    raw = {name: sum(w.shape) / w.numel() for name, w in weights.items()}
    dense = set()
    while True:
        free = [name for name in weights if name not in dense]
        budget = (1 - sparsity) * sum(w.numel() for w in weights.values()) - sum(weights[n].numel() for n in dense)
        scale = budget / sum(raw[name] * weights[name].numel() for name in free)
        worst = max(free, key=raw.get)
        if scale * raw[worst] <= 1:
            break
        dense.add(worst)
    masks = {}
    for name, w in weights.items():
        kept = w.numel() if name in dense else int(scale * raw[name] * w.numel() + 1e-9)
        mask = torch.zeros(w.numel(), dtype=torch.bool)
        mask[w.abs().flatten().argsort(descending=True)[:kept]] = True
        masks[name] = mask.view(w.shape)
    return masks


def held(weights, masks, capacity):
    """The largest weights on the mask, as many as the capacity holds."""
    total = sum(mask.numel() for mask in masks.values())
    count = total - round((1 - capacity) * total)
    ranked = sorted(
        ((abs(float(weights[n].flatten()[i])), n, i) for n in PRUNED for i in masks[n].flatten().nonzero().flatten()),
        key=lambda entry: entry[0],
        reverse=True,
    )
    own = {name: torch.zeros_like(mask) for name, mask in masks.items()}
    for _, name, i in ranked[:count]:
        own[name].view(-1)[i] = True
    return own, max(0, count - len(ranked))


def feddip_by_hand(model, data, regrow, residual, capacities=None):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    masks = erk_mask({name: state[name] for name in PRUNED}, START)
    residuals = {}
    for t in range(ROUNDS):
        if t > 0 and t % PERIOD == 0:
            masks = global_mask({name: state[name] for name in PRUNED}, scheduled(t))
        for name in PRUNED:
            state[name] = state[name] * masks[name]
        last_before = t + 1 < ROUNDS and (t + 1) % PERIOD == 0
        strength = LAMBDA * (t * LEVELS // ROUNDS) / LEVELS
        cohort = UniformSampling().sample(list(data), PER_ROUND, seed=SEED, round_index=t)
        sums = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in state.items()}
        holders = {name: torch.zeros_like(state[name]) for name in PRUNED}
        whole = 0
        server_masks = masks
        for client in cohort:
            torch.manual_seed(derive_seed(SEED, "client", t, client))
            local = copy.deepcopy(model)
            room = math.inf
            if capacities:
                masks, room = held(state, server_masks, capacities[client])
            local.load_state_dict(state | {name: state[name] * masks[name] for name in PRUNED})
            weights = dict(local.named_parameters())
            if residual == "keep" and client in residuals:
                old_masks, kept = residuals[client]
                for name in PRUNED:
                    moved = not all(torch.equal(old_masks[n], masks[n]) for n in PRUNED)
                    weights[name].data += kept[name] * masks[name] if moved else kept[name]
            optimizer = local.configure_optimizers()
            for group in optimizer.param_groups:
                group["lr"] *= 0.998**t
            for _ in range(EPOCHS):
                for x, y in DataLoader(data[client], batch_size=8, shuffle=True):
                    optimizer.zero_grad()
                    dense = {name: weights[name].detach().clone() for name in PRUNED}
                    for name in PRUNED:
                        weights[name].data *= masks[name]
                    loss = F.cross_entropy(local(x), y)
                    loss = loss + strength * sum(weights[name].norm() for name in PRUNED)
                    loss.backward()
                    for name in PRUNED:
                        weights[name].data = dense[name]
                    optimizer.step()
            sent = {name: tensor.clone() for name, tensor in local.state_dict().items()}
            if regrow != "dense":
                off = {name: sent[name] * ~masks[name] for name in PRUNED}
                for name in PRUNED:
                    sent[name] = sent[name] * masks[name]
                if regrow == "candidates" and last_before:
                    wanted = global_mask({name: weights[name].detach() for name in PRUNED}, scheduled(t + 1))
                    limit = min(room, int(0.1 * sum(int(m.sum()) for m in masks.values())))
                    offered = [
                        (abs(float(off[name].flatten()[i])), name, i)
                        for name in PRUNED
                        for i in range(off[name].numel())
                        if wanted[name].flatten()[i] and not masks[name].flatten()[i]
                    ]
                    for _, name, i in sorted(offered, reverse=True)[:limit]:
                        sent[name].view(-1)[i] = off[name].flatten()[i]
            kept = {name: weights[name].detach() - sent[name] for name in PRUNED}
            residuals[client] = (masks, kept)
            for name, tensor in sent.items():
                sums[name] += len(data[client]) * tensor.double()
            for name in PRUNED:
                holders[name] += len(data[client]) * masks[name]
            if all(torch.equal(masks[name], server_masks[name]) for name in PRUNED):
                whole += len(data[client])
        total = sum(len(data[client]) for client in cohort)
        masks, before = server_masks, state
        state = {name: (value / total).to(state[name].dtype) for name, value in sums.items()}
        for name in PRUNED if capacities else ():
            mean = torch.where(holders[name] > 0, sums[name] / holders[name], before[name])
            state[name] = torch.where(masks[name], mean, sums[name] / max(whole, 1))
        if regrow == "nested":
            for name in PRUNED:
                state[name] = state[name] * masks[name]
    for name in PRUNED:
        state[name] = state[name] * masks[name]
    return state, masks


@pytest.mark.parametrize("residual", ["drop", "keep"])
@pytest.mark.parametrize("regrow", ["candidates", "nested", "dense"])
def test_federation_equals_feddip_by_hand(regrow, residual):
    check_against_hand(regrow, residual)


CAPACITIES = {"c0": 0.1, "c1": 1.0, "c2": 0.4, "c3": 0.75, "c4": 0.1, "c5": 0.4}


@pytest.mark.parametrize("residual", ["drop", "keep"])
@pytest.mark.parametrize("regrow", ["candidates", "nested"])
def test_federation_of_clients_of_different_sparsity_equals_one_by_hand(regrow, residual):
    loop = check_against_hand(regrow, residual, CAPACITIES)
    assert_smaller_clients_send_less(loop, CAPACITIES)


def test_clients_that_hold_everything_are_clients_without_capacities():
    plain = check_against_hand("candidates", "drop")
    whole = check_against_hand("candidates", "drop", dict.fromkeys(CAPACITIES, 1.0))
    for name, weight in plain.state.weights.items():
        torch.testing.assert_close(whole.state.weights[name], weight, rtol=0, atol=1e-14)
        assert plain.state.masks[name] is None or torch.equal(plain.state.masks[name], whole.state.masks[name])


def check_against_hand(regrow, residual, capacities=None):
    # float64, so that the order of sums can't blur what is compared
    torch.manual_seed(3)
    model = Net().double()
    data = {name: TensorDataset(part.tensors[0].double(), part.tensors[1]) for name, part in clients().items()}
    state, masks = feddip_by_hand(copy.deepcopy(model), data, regrow, residual, capacities)
    callbacks = feddip(
        sparsity=END,
        initial_sparsity=START,
        reconfigure_every=PERIOD,
        regrow=regrow,
        residual=residual,
        lambda_max=LAMBDA,
        lambda_levels=LEVELS,
    )
    loop = FederatedLoop(
        ROUNDS, PER_ROUND, callbacks, {"max_epochs": EPOCHS}, seed=SEED, evaluation=QUIET, console=False
    )
    loop.fit(model, loaders(data, capacities))
    assert not any(record.failures for record in loop.history)
    for name in PRUNED:
        assert torch.equal(loop.state.masks[name], masks[name])
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=1e-12, atol=1e-12)
    total = sum(masks[name].numel() for name in PRUNED)
    zeros = sum(int((model.state_dict()[name] == 0).sum()) for name in PRUNED)
    last = PERIOD * math.floor((ROUNDS - 1) / PERIOD)
    assert zeros == round(scheduled(last) * total)
    return loop
