"""A frozen mask: FLASH's warm-up against one by hand, masks from the start, and a plain Trainer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedsparse import FederatedLoop, load_folded
from lightning_fedsparse.callbacks import ErrorFeedback, FixedMask, MaskMonitor
from lightning_fedsparse.masks import sparsity_of
from lightning_fedsparse.sampling import UniformSampling
from lightning_fedsparse.seeding import derive_seed
from tests.effective_reference import WEIGHTS, loader, quiet_trainer, reference_fit, seeded, sorted_masks
from tests.effective_reference import Net as SmallNet
from tests.test_loop import QUIET, Net, clients, loaders

PRUNED = ("first.weight", "last.weight")
ROUNDS, PER_ROUND, EPOCHS, SEED, SPARSITY = 4, 3, 2, 5, 0.7


def train(local: Net, part: TensorDataset, masks: dict[str, Tensor] | None) -> None:
    optimizer = local.configure_optimizers()
    weights = dict(local.named_parameters())
    for _ in range(EPOCHS):
        for x, y in DataLoader(part, batch_size=8, shuffle=True):
            optimizer.zero_grad()
            F.cross_entropy(local(x), y).backward()
            for name in masks or ():
                weights[name].grad *= masks[name]
            optimizer.step()


def flash_by_hand(model: Net, data: dict[str, TensorDataset]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients times the mask; a weight decay of zero weights is zero."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    masks: dict[str, Tensor] = {}
    for t in range(ROUNDS):
        cohort = UniformSampling().sample(list(data), PER_ROUND, seed=SEED, round_index=t)
        sums = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in state.items()}
        densities = dict.fromkeys(PRUNED, 0.0)
        total = sum(len(data[client]) for client in cohort)
        for client in cohort:
            torch.manual_seed(derive_seed(SEED, "client", t, client))
            local = copy.deepcopy(model)
            local.load_state_dict(state)
            train(local, data[client], masks)
            sent = {name: tensor.clone() for name, tensor in local.state_dict().items()}
            if t == 0:
                kept = sorted_masks({name: sent[name] for name in PRUNED}, SPARSITY)
                for name in PRUNED:
                    sent[name] = sent[name] * kept[name]
                    densities[name] += len(data[client]) / total * float(kept[name].double().mean())
            for name, tensor in sent.items():
                sums[name] += len(data[client]) * tensor.double()
        state = {name: (value / total).to(state[name].dtype) for name, value in sums.items()}
        if t == 0:
            for name in PRUNED:
                count = int(densities[name] * state[name].numel() + 1e-9)
                mask = torch.zeros(state[name].numel())
                mask[state[name].abs().flatten().argsort(descending=True)[:count]] = 1
                masks[name] = mask.view(state[name].shape)
                state[name] = state[name] * masks[name]
    return state, masks


def run(callbacks: list[Any], model: Net, data: dict[str, TensorDataset], rounds: int = ROUNDS) -> FederatedLoop:
    loop = FederatedLoop(
        rounds, PER_ROUND, callbacks, {"max_epochs": EPOCHS}, seed=SEED, evaluation=QUIET, console=False
    )
    loop.fit(model, loaders(data))
    assert not any(record.failures for record in loop.history)
    return loop


def test_federation_equals_flash_by_hand() -> None:
    torch.manual_seed(3)
    model = Net().double()
    data = {name: TensorDataset(part.tensors[0].double(), part.tensors[1]) for name, part in clients().items()}
    state, masks = flash_by_hand(copy.deepcopy(model), data)
    loop = run([FixedMask(SPARSITY), MaskMonitor()], model, data)
    for name in PRUNED:
        assert torch.equal(loop.state.masks[name], masks[name].bool())
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=1e-12)
    # round 1 comes down dense and goes up sparse; then both ways are sparse
    first, second = loop.history[1], loop.history[2]
    assert first.bytes_down > first.dense_bytes_down > 1.5 * first.bytes_up
    assert second.bytes_down < first.bytes_up


def test_biases_that_start_at_zero_train() -> None:
    torch.manual_seed(3)
    model = Net()
    torch.nn.init.zeros_(model.last.bias)
    run([FixedMask(SPARSITY)], model, clients())
    assert bool((model.last.bias != 0).all())


@pytest.mark.parametrize("distribution", ["uniform", "erk"])
@pytest.mark.parametrize("positions", ["magnitude", "random"])
def test_masks_without_a_warmup_are_there_from_the_start(positions: Any, distribution: Any) -> None:
    torch.manual_seed(3)
    model = Net()
    initial = {name: model.get_parameter(name).detach().clone() for name in PRUNED}
    loop = run([FixedMask(0.75, positions=positions, distribution=distribution)], model, clients(), rounds=1)
    masks = {name: loop.state.masks[name] for name in PRUNED}
    # 128 and 48 weights; Erdos-Renyi leaves the smaller one denser: 24 / 128 and 19 / 48, scaled to 44 in all
    assert [int(mask.sum()) for mask in masks.values()] == ([32, 12] if distribution == "uniform" else [24, 19])
    if positions == "magnitude":
        for name, mask in masks.items():
            assert float(initial[name][mask].abs().min()) >= float(initial[name][~mask].abs().max())
    again = run([FixedMask(0.75, positions=positions, distribution=distribution)], Net(), clients(), rounds=1)
    assert (again.state.masks.id == loop.state.masks.id) == (positions == "random")


# -- in a plain Trainer ------------------------------------------------------------------------------------------------


def test_a_plain_warmup_is_dense_then_the_mask_stays() -> None:
    module = seeded(SmallNet)
    masking = FixedMask(0.6, warmup=0.35)  # 3.5 of 10 steps: the mask comes before the fifth
    quiet_trainer([masking]).fit(module, loader())
    kept = [{name: weights[name] != 0 for name in WEIGHTS} for weights in module.seen["train"]]
    assert all(bool(mask.all()) for masks in kept[:4] for mask in masks.values())
    for masks in kept[4:]:
        assert all(torch.equal(masks[name], masking.masks[name]) for name in WEIGHTS)
    assert sparsity_of(masking.masks) == pytest.approx(round(0.6 * 72) / 72)
    for name in WEIGHTS:
        assert not module.get_parameter(name).detach()[~masking.masks[name]].any()


def test_a_warmup_ends_before_the_last_step_at_the_latest() -> None:
    module = seeded(SmallNet)
    quiet_trainer([FixedMask(0.5, warmup=0.99)]).fit(module, loader())
    assert sum(int((module.get_parameter(name) == 0).sum()) for name in WEIGHTS) == 36


@pytest.mark.parametrize("feedback", [False, True])
def test_a_plain_fit_equals_one_by_hand(feedback: bool) -> None:
    module, expected = seeded(SmallNet), seeded(SmallNet)
    masking = FixedMask(0.6, warmup=0.35, fold=False)
    quiet_trainer([masking, *([ErrorFeedback()] if feedback else [])]).fit(module, loader())
    masks = reference_fit(
        expected, list(loader()), sparsity_at=lambda step: 0.6 if step == 4 else None, feedback=feedback
    )
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter, expected.get_parameter(name), rtol=0, atol=1e-6)
    for name in WEIGHTS:
        assert torch.equal(masking.masks[name], masks[name])


def test_a_checkpoint_folds(tmp_path: Any) -> None:
    module = seeded(SmallNet)
    trainer = quiet_trainer([FixedMask(0.5, positions="random", fold=False), ErrorFeedback()])
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    folded = load_folded(tmp_path / "end.ckpt", seeded(SmallNet))
    assert sum(int((folded.get_parameter(name) == 0).sum()) for name in WEIGHTS) == 36


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, r"values in \[0, 1\), got 1.0"),
        ({"sparsity": 0.5, "positions": "best"}, "expected positions 'warmup', 'magnitude' or 'random', got 'best'"),
        ({"sparsity": 0.5, "warmup": 1.0}, r"expected warmup in \[0, 1\), got 1.0"),
        ({"sparsity": 0.5, "distribution": "even"}, "expected distribution 'uniform' or 'erk', got 'even'"),
    ],
)
def test_what_is_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FixedMask(**options)
