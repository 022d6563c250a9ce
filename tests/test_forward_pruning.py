"""Forward pruning: its weights by hand, its training step, and ZeroFL against ZeroFL by hand."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedsparse import FederatedLoop
from lightning_fedsparse.callbacks import ActivationPruning, ForwardPruning, TopKAfterTraining, zerofl
from lightning_fedsparse.callbacks.forward_pruning import _LargestPerLayer
from lightning_fedsparse.sampling import UniformSampling
from lightning_fedsparse.seeding import derive_seed
from tests.effective_reference import WEIGHTS, EvaluatedNet, assert_engine_clean, loader, quiet_trainer, seeded
from tests.effective_reference import Net as SmallNet
from tests.test_loop import QUIET, Net, clients, loaders
from tests.test_sparsyfed_reference import PrunedLinear

PRUNED = ("first.weight", "last.weight")


@pytest.mark.parametrize(
    ("sparsity", "kept"),
    [(0.0, [0.8, -0.5, 0.1, 0.3, -0.2]), (0.6, [0.8, -0.5, 0, 0, 0]), (0.5, [0.8, -0.5, 0, 0.3, 0])],
)
def test_the_largest_of_a_layer(sparsity: float, kept: list[float]) -> None:
    weights = {"w": torch.tensor([0.8, -0.5, 0.1, 0.3, -0.2])}
    _LargestPerLayer(["w"], sparsity, None).apply(weights, weights)
    assert weights["w"].tolist() == pytest.approx(kept)


def test_a_first_threshold_stays() -> None:
    step = _LargestPerLayer(["w"], 0.5, {})
    first, second = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([5.0, 2.5, 3.0, 7.0])
    step.apply({"w": first}, {"w": first})
    step.apply({"w": second}, {"w": second})
    assert first.tolist() == [0, 0, 3, 4]
    assert second.tolist() == [5, 0, 3, 7]


def forward_weights(weight: Tensor, sparsity: float, threshold: float | None = None) -> tuple[Tensor, float]:
    """The largest of a layer, with their own gradient for all of it."""
    if threshold is None:
        k = math.ceil((1 - sparsity) * weight.numel() - 1e-9)
        threshold = float(weight.detach().abs().flatten().sort(descending=True).values[k - 1])
    cut = (weight * (weight.abs() >= threshold)).detach()
    return weight + (cut - weight).detach(), threshold


def by_hand(module: SmallNet, batches: Any, sparsity: float, first: bool, overwrite: bool) -> None:
    optimizer = module.configure_optimizers()
    parameters = dict(module.named_parameters())
    thresholds: dict[str, float] = {}
    for _ in range(2):
        for x, y in batches:
            used = {}
            for name in WEIGHTS:
                used[name], found = forward_weights(parameters[name], sparsity, thresholds.get(name))
                if first:
                    thresholds[name] = found
                if overwrite:
                    parameters[name].data = used[name].detach().clone()
            optimizer.zero_grad()
            F.cross_entropy(functional_call(module, used, x), y).backward()
            optimizer.step()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("threshold", ["per_batch", "first_batch"])
def test_training_equals_training_by_hand(threshold: Any, overwrite: bool) -> None:
    module, expected = seeded(SmallNet).double(), seeded(SmallNet).double()
    batches = [(x.double(), y) for x, y in loader()]
    callback = ForwardPruning(0.7, threshold=threshold, overwrite=overwrite)
    quiet_trainer([callback]).fit(module, DataLoader(batches, batch_size=None))
    by_hand(expected, batches, 0.7, threshold == "first_batch", overwrite)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter, expected.get_parameter(name), rtol=0, atol=1e-12)
    assert_engine_clean(module)


def test_evaluation_sees_the_dense_weights() -> None:
    module = seeded(EvaluatedNet)
    trainer = quiet_trainer([ForwardPruning(0.75)])
    trainer.fit(module, loader(), loader())
    trainer.test(module, loader(), verbose=False)
    for stage, zeros in (("train", 36), ("validation", 0), ("test", 0)):
        assert all(int((weights["first.weight"] == 0).sum()) == zeros for weights in module.seen[stage]), stage


def test_the_first_layer_may_be_left_dense() -> None:
    module = seeded(SmallNet)
    quiet_trainer([ForwardPruning(0.75, first_layer=False)]).fit(module, loader())
    for weights in module.seen["train"]:
        assert bool((weights["first.weight"] != 0).all())
        assert int((weights["second.weight"] == 0).sum()) == 18


# -- ZeroFL ------------------------------------------------------------------------------------------------------------

ROUNDS, PER_ROUND, EPOCHS, SEED, SPARSITY = 5, 3, 2, 5, 0.75


def zerofl_by_hand(
    model: Net, data: dict[str, TensorDataset], *, mask_ratio: float = 0.0, overwrite: bool = False, first: bool = False
) -> dict[str, Tensor]:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for t in range(ROUNDS):
        cohort = UniformSampling().sample(list(data), PER_ROUND, seed=SEED, round_index=t)
        sums = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in state.items()}
        for client in cohort:
            torch.manual_seed(derive_seed(SEED, "client", t, client))
            local = copy.deepcopy(model)
            local.load_state_dict(state)
            optimizer = local.configure_optimizers()
            for_weights, for_inputs = None, None
            for _ in range(EPOCHS):
                for x, y in DataLoader(data[client], batch_size=8, shuffle=True):
                    weight, found = forward_weights(local.last.weight, SPARSITY, for_weights)
                    for_weights = found if first else None
                    if overwrite:
                        local.last.weight.data = weight.detach().clone()
                    hidden = F.relu(local.norm(local.first(x)))  # the first layer is dense, forward and backward
                    if first and for_inputs is None:
                        k = math.ceil(hidden.numel() * int((weight != 0).sum()) / weight.numel())
                        for_inputs = float(hidden.detach().abs().flatten().sort(descending=True).values[k - 1])
                    optimizer.zero_grad()
                    F.cross_entropy(PrunedLinear.apply(hidden, weight, local.last.bias, for_inputs), y).backward()
                    optimizer.step()
            sent = {name: tensor.clone() for name, tensor in local.state_dict().items()}
            order = torch.cat([sent[name].abs().flatten() for name in PRUNED]).argsort(stable=True)
            keep = torch.ones(len(order), dtype=torch.float64)
            keep[order[: round((SPARSITY - mask_ratio) * len(order))]] = 0
            for name, part in zip(PRUNED, keep.split([sent[name].numel() for name in PRUNED]), strict=True):
                sent[name] = sent[name] * part.view(sent[name].shape)
            for name, tensor in sent.items():
                sums[name] += len(data[client]) * tensor.double()
        total = sum(len(data[client]) for client in cohort)
        state = {name: (value / total).to(state[name].dtype) for name, value in sums.items()}
    return state


@pytest.mark.parametrize(
    ("by_hand_options", "options"),
    [
        ({}, {}),
        ({"mask_ratio": 0.1}, {"mask_ratio": 0.1}),
        ({"overwrite": True, "first": True}, {"overwrite": True, "threshold": "first_batch"}),
    ],
    ids=["default", "mask ratio", "as re-implemented"],
)
def test_federation_equals_zerofl_by_hand(by_hand_options: Any, options: Any) -> None:
    torch.manual_seed(3)
    model = Net().double()
    data = {name: TensorDataset(part.tensors[0].double(), part.tensors[1]) for name, part in clients().items()}
    state = zerofl_by_hand(copy.deepcopy(model), data, **by_hand_options)
    loop = FederatedLoop(
        ROUNDS,
        PER_ROUND,
        zerofl(SPARSITY, **options),
        {"max_epochs": EPOCHS},
        seed=SEED,
        evaluation=QUIET,
        console=False,
    )
    loop.fit(model, loaders(data))
    assert not any(record.failures for record in loop.history)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=1e-12)


def test_the_parts_of_zerofl() -> None:
    topk, forward, activations, *monitors = zerofl(0.95, 0.05, exclude=["last.*"])
    assert isinstance(topk, TopKAfterTraining)
    assert topk.schedule(1.0) == 0.9
    assert isinstance(forward, ForwardPruning)
    assert forward.sparsity == 0.95
    assert isinstance(activations, ActivationPruning)
    assert not forward.first_layer
    assert not activations.first_layer
    assert all(part.exclude == ("last.*",) for part in (topk, forward, activations, *monitors))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ForwardPruning(1.0), r"expected a sparsity in \[0, 1\) of each layer's forward pass, got 1.0"),
        (
            lambda: ForwardPruning(0.5, threshold="never"),
            "expected threshold 'per_batch' or 'first_batch', got 'never'",
        ),
        (lambda: zerofl(0.5, 0.6), r"expected mask_ratio in \[0, 0.5\], the sparsity, got 0.6"),
    ],
)
def test_what_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
