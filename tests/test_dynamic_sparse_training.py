"""Dynamic sparse training: literals, RigL and FedDST by hand in float64, and what must always hold."""

from __future__ import annotations

import copy
import math
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedsparse import FederatedDataModule, FederatedLoop
from lightning_fedsparse.aggregation import MaskedMean
from lightning_fedsparse.callbacks import DynamicSparseTraining, ErrorFeedback
from lightning_fedsparse.callbacks.dynamic_sparse_training import moved_mask
from lightning_fedsparse.checkpointing import Checkpointing
from lightning_fedsparse.distributions import erk_sparsities
from lightning_fedsparse.quiet import QUIET_TRAINER, quiet_lightning
from lightning_fedsparse.sampling import UniformSampling
from lightning_fedsparse.schedules import Progress
from lightning_fedsparse.seeding import derive_seed
from tests.test_loop import QUIET, clients

ROUNDS, PER_ROUND, EPOCHS, SEED = 7, 3, 2, 5
SPARSITY, DROP = 0.6, 0.5
NAMES = ("first.weight", "last.weight")


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16).double(), nn.Linear(16, 3).double()
        self.seen: list[dict[str, Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.first(x)))  # type: ignore[no-any-return]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append({name: self.get_parameter(name).detach().clone() for name in NAMES})
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


def double_clients() -> dict[str, TensorDataset]:
    return {name: TensorDataset(part.tensors[0].double(), part.tensors[1]) for name, part in clients().items()}


def fit(module: pl.LightningModule, callbacks: Any, epochs: int = 5, **arguments: Any) -> None:
    with quiet_lightning():
        trainer = pl.Trainer(**QUIET_TRAINER, accelerator="cpu", max_epochs=epochs, callbacks=callbacks, **arguments)
        trainer.fit(module, DataLoader(double_clients()["c0"], batch_size=4))


# -- known answers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (0.0, "111100"),
        (0.25, "110110"),  # 0.2 goes, the largest gradient is 4
        (0.5, "111010"),  # 0.2 and 0.3 go, gradients 4 and 2 come: 0.2 returns
        (1.0, "011011"),  # the four largest gradients
    ],
)
def test_moves(share: float, expected: str) -> None:
    weight = torch.tensor([1.0, -0.5, 0.2, -0.3, 0.0, 0.0])
    gradient = torch.tensor([0.1, -3.0, 2.0, 0.2, -4.0, 1.0])
    moved = moved_mask(weight, gradient, torch.tensor([True, True, True, True, False, False]), share)
    assert "".join(str(int(bit)) for bit in moved) == expected


def test_a_gradient_that_overflowed_ranks_last() -> None:
    mask = torch.tensor([True, False, False, False])
    gradient = torch.tensor([0.0, float("nan"), 1.0, float("inf")])
    assert moved_mask(torch.ones(4), gradient, mask, 1.0).tolist() == [False, False, True, False]


@pytest.mark.parametrize(
    ("step", "share"),
    [(0, 0), (5, 0), (10, 0.5 * (1 + math.cos(math.pi / 5)) / 2), (25, 0), (50, 0), (60, 0), (100, 0)],
)
def test_share_that_moves(step: int, share: float) -> None:
    assert DynamicSparseTraining(0.5, every=10).share(Progress(step, 100)) == pytest.approx(share)
    # halfway to the end of the moves half of the share is left
    assert DynamicSparseTraining(0.5, every=5).share(Progress(25, 100)) == pytest.approx(0.25)


@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=30), st.data())
def test_a_move_keeps_as_many_and_the_largest(values: list[float], data: Any) -> None:
    weight = torch.tensor(values)
    draw = st.lists(st.floats(-1, 1, width=32), min_size=len(values), max_size=len(values))
    gradient = torch.tensor(data.draw(draw))
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values))))
    share = data.draw(st.floats(0, 1))
    moved = moved_mask(weight, gradient, mask, share)
    assert moved.sum() == mask.sum()
    stayed = mask.sum() - math.floor(share * int(mask.sum()))
    assert (moved & mask).sum() >= stayed
    dropped, kept = weight[mask & ~moved].abs(), weight[mask & moved].abs()
    if len(dropped) and len(kept):
        # all but those that grew again are at least as large as what was dropped
        assert (kept >= dropped.max()).sum() >= stayed
    grown, left = gradient[moved & ~mask].abs(), gradient[~moved & ~mask].abs()
    assert not len(grown) or not len(left) or grown.min() >= left.max()


# -- by hand -----------------------------------------------------------------------------------------------------------


def counts_by_hand(shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
    sparsities = erk_sparsities(shapes, SPARSITY)
    return {name: int(math.prod(shape) * (1 - sparsities[name]) + 1e-9) for name, shape in shapes.items()}


def top_by_hand(magnitudes: Tensor, allowed: Tensor, count: int) -> Tensor:
    order = sorted(allowed.flatten().nonzero().flatten().tolist(), key=lambda i: (-float(magnitudes.flatten()[i]), -i))
    mask = torch.zeros(magnitudes.numel(), dtype=torch.bool)
    mask[order[:count]] = True
    return mask.view(magnitudes.shape)


def move_by_hand(weight: Tensor, gradient: Tensor, mask: Tensor, share: float) -> Tensor:
    count = int(share * int(mask.sum()))
    kept = top_by_hand(weight.abs(), mask, int(mask.sum()) - count)
    return kept | top_by_hand(gradient.abs(), ~kept, count)


def share_by_hand(step: int, total: int, every: int, end: float) -> float:
    if step == 0 or step % every or step / total >= end:
        return 0.0
    return DROP / 2 * (1 + math.cos(math.pi * step / (end * total)))


def train_by_hand(net: Net, masks: dict[str, Tensor], batches: Any, share_at: Any) -> dict[str, Tensor]:
    """Plain PyTorch: weights off the masks are zero, and so are their gradients."""
    weights = {name: net.get_parameter(name) for name in NAMES}
    optimizer = net.configure_optimizers()
    for name, weight in weights.items():
        weight.data *= masks[name]
    for step, (x, y) in enumerate(batches):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        if (share := share_at(step)) > 0:
            for name, weight in weights.items():
                moved = move_by_hand(weight.data, weight.grad, masks[name], share)  # type: ignore[arg-type]
                weight.data *= masks[name] & moved
                masks[name] = moved
        for name, weight in weights.items():
            weight.grad *= masks[name]  # type: ignore[operator]
        optimizer.step()
        for name, weight in weights.items():
            weight.data *= masks[name]
    return masks


def initial_by_hand(net: Net) -> dict[str, Tensor]:
    counts = counts_by_hand({name: tuple(net.get_parameter(name).shape) for name in NAMES})
    everything = {name: torch.ones_like(net.get_parameter(name), dtype=torch.bool) for name in NAMES}
    return {name: top_by_hand(net.get_parameter(name).data.abs(), everything[name], counts[name]) for name in NAMES}


def test_a_plain_trainer_equals_rigl_by_hand() -> None:
    torch.manual_seed(3)
    module = Net()
    expected = copy.deepcopy(module)
    batches = [batch for _ in range(5) for batch in DataLoader(double_clients()["c0"], batch_size=4)]
    start = initial_by_hand(expected)
    masks = train_by_hand(expected, dict(start), batches, lambda step: share_by_hand(step, 25, 3, 0.8))
    method = DynamicSparseTraining(SPARSITY, every=3, drop=DROP, end=0.8)
    fit(module, [method])
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter, expected.get_parameter(name), rtol=0, atol=1e-12)
    assert all(torch.equal(method.masks[name], masks[name]) for name in NAMES)
    assert any(not torch.equal(masks[name], start[name]) for name in NAMES)
    sizes = {int(sum((seen[name] != 0).sum() for name in NAMES)) for seen in module.seen}
    assert max(sizes) == sum(int(mask.sum()) for mask in start.values())


def feddst_by_hand(model: Net, data: dict[str, TensorDataset], every: int, weighting: str) -> dict[str, Tensor]:
    state = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    masks = initial_by_hand(model)
    for name in NAMES:
        state[name] *= masks[name]
    for t in range(ROUNDS):
        share = share_by_hand(t, ROUNDS, every, 1.0)
        sums = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        counts = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        for client in UniformSampling().sample(list(data), PER_ROUND, seed=SEED, round_index=t):
            local = copy.deepcopy(model)
            local.load_state_dict(state)
            torch.manual_seed(derive_seed(SEED, "client", t, client))
            loader = DataLoader(data[client], batch_size=8, shuffle=True)
            batches = [batch for _ in range(EPOCHS) for batch in loader]
            own = train_by_hand(local, dict(masks), batches, lambda step, share=share: share if step == 0 else 0)
            weight = 1 if weighting == "uniform" else len(data[client])
            for name, parameter in local.named_parameters():
                held = own[name].double() if name in NAMES else torch.ones_like(parameter)
                sums[name] += weight * held * parameter.data
                counts[name] += weight * held
        state = {name: sums[name] / counts[name].clamp(min=1) for name in state}
        if share > 0:
            sizes = counts_by_hand({name: tuple(state[name].shape) for name in NAMES})
            masks = {name: top_by_hand(state[name].abs(), masks[name] | True, sizes[name]) for name in NAMES}
            for name in NAMES:
                state[name] *= masks[name]
    return state


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
@pytest.mark.parametrize("every", [1, 2])
def test_a_federation_equals_feddst_by_hand(every: int, weighting: Any) -> None:
    torch.manual_seed(3)
    model = Net()
    data = double_clients()
    expected = feddst_by_hand(copy.deepcopy(model), data, every, weighting)
    loaders = {name: DataLoader(part, batch_size=8, shuffle=True) for name, part in data.items()}
    loop = FederatedLoop(
        ROUNDS,
        PER_ROUND,
        [DynamicSparseTraining(SPARSITY, every=every, drop=DROP, end=1.0)],
        {"max_epochs": EPOCHS},
        aggregator=MaskedMean(weighting),
        seed=SEED,
        evaluation=QUIET,
        console=False,
    )
    loop.fit(model, FederatedDataModule(loaders))
    for name, tensor in model.named_parameters():
        torch.testing.assert_close(tensor.detach(), expected[name], rtol=0, atol=1e-12)


# -- in a federation ---------------------------------------------------------------------------------------------------


def run(rounds: int = 4, options: Any = None, fit: Any = None, **arguments: Any) -> Any:
    torch.manual_seed(3)
    model = Net()
    loaders = {name: DataLoader(part, batch_size=8, shuffle=True) for name, part in double_clients().items()}
    method = DynamicSparseTraining(SPARSITY, **{"every": 1, "end": 1.0, **(options or {})})
    loop = FederatedLoop(rounds, 3, [method], evaluation=QUIET, console=False, **arguments)
    loop.fit(model, FederatedDataModule(loaders), **(fit or {}))
    return loop, model


def test_sparsity_is_exact_in_every_round_and_positions_travel_when_masks_move() -> None:
    loop, _ = run(6, {"every": 3})
    sparsities = erk_sparsities({"first.weight": (16, 8), "last.weight": (3, 16)}, SPARSITY)
    kept = int(128 * (1 - sparsities["first.weight"])) + int(48 * (1 - sparsities["last.weight"]))
    assert {row.sparsity for row in loop.history} == {1 - kept / 176}
    assert not any(row.failures for row in loop.history)
    still, moved = loop.history[2], loop.history[4]  # rounds of index 1 and 3
    positions = [sum(client.up.positions for client in row.clients.values()) for row in (still, moved)]
    assert positions[0] == 0 < positions[1]


def test_a_resumed_run_ends_like_an_uninterrupted_one(tmp_path: Any) -> None:
    _, expected = run(5, {"end": 0.5, "every": 2}, default_root_dir=tmp_path / "whole")
    run(5, {"end": 0.5, "every": 2}, default_root_dir=tmp_path / "cut", checkpointing=Checkpointing(every_n_rounds=2))
    _, model = run(5, {"end": 0.5, "every": 2}, {"ckpt_path": "last"}, default_root_dir=tmp_path / "cut")
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), expected.parameters(), strict=True))


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, r"expected a sparsity in \[0, 1\), got 1.0"),
        ({"sparsity": 0.5, "every": 0}, "expected a period of at least 1, got every=0"),
        ({"sparsity": 0.5, "drop": 0.0}, r"expected drop in \(0, 1\], got 0.0"),
        ({"sparsity": 0.5, "end": 1.5}, r"expected end in \(0, 1\], got 1.5"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DynamicSparseTraining(**options)


def test_another_module_than_the_last_one_is_refused() -> None:
    class Other(Net):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(16, 4).double()

        def validation_step(self, batch: Any) -> None: ...

    method = DynamicSparseTraining(0.5)
    fit(Net(), [method], epochs=1)
    trainer = pl.Trainer(**{**QUIET_TRAINER, "limit_val_batches": 1}, accelerator="cpu", callbacks=[method])
    with (
        quiet_lightning(),
        pytest.raises(ValueError, match="expected the module that DynamicSparseTraining trained last"),
    ):
        trainer.validate(Other(), DataLoader(double_clients()["c0"], batch_size=4), verbose=False)


def test_error_feedback_has_no_place_beside_it() -> None:
    with pytest.raises(ValueError, match="expected a callback that prunes beside ErrorFeedback"):
        fit(Net(), [DynamicSparseTraining(0.5), ErrorFeedback()])
