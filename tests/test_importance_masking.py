"""Importance masking: the specification's known answers, what never moves, and what clients and the server exchange."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedsparse import FederatedDataModule, FederatedLoop, SparseUpdate, load_folded
from lightning_fedsparse.aggregation import MaskedMean, WeightedMean
from lightning_fedsparse.callbacks import (
    ImportanceMasking,
    Powerpropagation,
    SparsityCallback,
    TopKAfterTraining,
    fiarse,
)
from lightning_fedsparse.capacities import CapacityList, CapacityShares
from lightning_fedsparse.client import ClientWorker
from lightning_fedsparse.evaluation import Evaluation, evaluate
from lightning_fedsparse.masks import importance_masks, importance_threshold
from lightning_fedsparse.partition import IidPartition
from lightning_fedsparse.payload import decode, encode
from lightning_fedsparse.quiet import QUIET_TRAINER, quiet_lightning
from lightning_fedsparse.schedules import ConstantSchedule
from lightning_fedsparse.submodels import extraction_groups, importance_factor, submodel_masks, submodel_thresholds
from lightning_fedsparse.wire import Wire
from tests.test_loop import QUIET, Net, clients

A = torch.tensor([0.9, -0.05, 0.4, -0.7, 0.2, -0.3, 0.1, 0.6], dtype=torch.float64)
L1 = torch.tensor([0.9, -0.8, 0.7, 0.6], dtype=torch.float64)
L2 = torch.tensor([0.1, -0.2, 0.3, 0.05, 0.4, -0.15, 0.25, 0.35], dtype=torch.float64)


def bits(mask: Tensor) -> str:
    return "".join(str(int(bit)) for bit in mask.flatten())


def close(found: Tensor, expected: Any, atol: float = 1e-6) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype), rtol=0, atol=atol)


def trainer(*callbacks: pl.Callback, **arguments: Any) -> pl.Trainer:
    return pl.Trainer(**QUIET_TRAINER, accelerator="cpu", callbacks=list(callbacks), **arguments)


# -- known answers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capacity", "theta", "mask", "factors"),
    [
        (1, 0.05, "11111111", [1.099723, 1.5, 1.197531, 1.124444, 1.32, 1.244898, 1.444444, 1.142012]),
        (0.5, 0.4, "10110001", [1.426036, 0, 1.5, 1.462810, 0, 0, 0, 1.48]),
        (0.25, 0.7, "10010000", [1.492188, 0, 0, 1.5, 0, 0, 0, 0]),
        (0.125, 0.9, "10000000", [1.5, 0, 0, 0, 0, 0, 0, 0]),
        (1 / 64, 0.9, "10000000", [1.5, 0, 0, 0, 0, 0, 0, 0]),
    ],
)
def test_thresholds_masks_and_factors(capacity: float, theta: float, mask: str, factors: list[float]) -> None:
    assert importance_threshold({"w": A}, capacity) == theta
    (kept,) = importance_masks({"w": A}, theta).values()
    assert bits(kept) == mask
    close(importance_factor(A, theta) * kept, factors)


def test_levels_that_hold_each_weight() -> None:
    masks = [submodel_masks({"w": A}, submodel_thresholds({"w": A}, [["w"]], level))["w"] for level in (1, 0.5, 0.25)]
    assert sum(mask.int() for mask in masks).tolist() == [3, 1, 2, 3, 1, 1, 1, 2]  # type: ignore[union-attr]


def test_ties_are_all_kept() -> None:
    w = torch.tensor([0.5, -0.5, 0.5, -0.5])
    assert bits(importance_masks({"w": w}, importance_threshold({"w": w}, 0.25))["w"]) == "1111"


def test_factor_by_distance_from_the_threshold() -> None:
    ratios = torch.tensor([1, 1.5, 2, 3, 5, 10, 100], dtype=torch.float64)
    expected = [1.5, 1.48, 1.444444, 1.375, 1.277778, 1.165289, 1.019606]
    for theta in (1.0, 1e-3, 1e-200):
        close(importance_factor(-ratios * theta, theta), expected)
    assert importance_factor(torch.tensor([0.0, 3.0]), 0.0).tolist() == [1.0, 1.0]


def test_one_threshold_for_the_model_or_one_per_tensor() -> None:
    weights = {"L1": L1, "L2": L2}
    whole = submodel_thresholds(weights, extraction_groups(list(weights)), 0.25)
    assert whole == {"L1": 0.7, "L2": 0.7}
    assert {name: bits(mask) for name, mask in submodel_masks(weights, whole).items()} == {
        "L1": "1110",
        "L2": "00000000",
    }
    each = submodel_thresholds(weights, extraction_groups(list(weights), per_tensor=True), 0.25)
    assert each == {"L1": 0.9, "L2": 0.35}
    assert {name: bits(mask) for name, mask in submodel_masks(weights, each).items()} == {
        "L1": "1000",
        "L2": "00001001",
    }


class Quadratic(pl.LightningModule):
    """Half the squared residual of ``a x - 1`` over four weights."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.tensor([0.8, -0.5, 0.3, 0.1], dtype=torch.float64))
        self.losses: list[float] = []
        self.gradients: list[Tensor] = []
        self.stored: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        a = torch.tensor([1.0, 2.0, -1.0, 3.0], dtype=torch.float64)
        loss = 0.5 * (a @ self.x - 1) ** 2
        self.losses.append(float(loss.detach()))
        return loss

    def on_before_zero_grad(self, optimizer: Any) -> None:
        if self.x.grad is not None:
            self.gradients.append(self.x.grad.clone())

    def on_train_batch_end(self, *args: Any) -> None:
        self.stored.append(self.x.detach().clone())

    def configure_optimizers(self) -> SGD:
        return SGD(self.parameters(), lr=0.1)


def test_three_steps_of_the_biased_gradient() -> None:
    module = Quadratic()
    masking = ImportanceMasking(0.75, include=["x"], fold=False)
    with quiet_lightning():
        trainer(masking, max_epochs=1).fit(module, DataLoader(TensorDataset(torch.zeros(4, 1)), batch_size=1))
    assert masking.thresholds == {"x": 0.3}
    close(module.gradients[0], [-2.095041, -4.40625, 2.25, 0])
    first, second, third = module.stored[:3]
    close(first, [1.009504, -0.059375, 0.075, 0.1])
    close(second, [1.008218, -0.059375, 0.075, 0.1])
    close(third, [1.007106, -0.059375, 0.075, 0.1])
    assert module.losses[:3] == pytest.approx([1.125, 4.5e-5, 3.4e-5], abs=5e-7)


class Perceptron(pl.LightningModule):
    """Two linear layers without biases, and one example."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2, bias=False).double(), nn.Linear(2, 1, bias=False).double()
        self.first.weight.data = torch.tensor([[0.5, -0.4], [0.1, 0.9]], dtype=torch.float64)
        self.second.weight.data = torch.tensor([[0.3, -0.7]], dtype=torch.float64)
        self.seen: dict[str, Tensor] = {}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        output = self.second(F.relu(self.first(torch.tensor([1.0, 2.0], dtype=torch.float64))))
        loss = 0.5 * (output - 0.5).square().sum()
        self.seen |= {"output": output.detach(), "loss": loss.detach()}
        return loss

    def on_train_batch_end(self, *args: Any) -> None:
        self.seen |= {name: parameter.grad.clone() for name, parameter in self.named_parameters()}

    def configure_optimizers(self) -> SGD:
        return SGD(self.parameters(), lr=0.1)


def test_a_perceptron_at_half_capacity() -> None:
    module = Perceptron()
    masking = ImportanceMasking(0.5)
    with quiet_lightning():
        trainer(masking, max_steps=1).fit(module, DataLoader(TensorDataset(torch.zeros(1, 1))))
    assert set(masking.thresholds.values()) == {0.5}
    assert {name: bits(mask) for name, mask in masking.masks.items()} == {
        "first.weight": "1001",
        "second.weight": "01",
    }
    close(module.seen["output"], [-1.26])
    close(module.seen["loss"], 1.5488)
    close(module.seen["first.weight"], [[0, 0], [0, 3.595429]])
    close(module.seen["second.weight"], [[0, -4.708]])


X = torch.tensor([1, -0.8, 0.6, -0.4, 0.2, 0.1], dtype=torch.float64)
DELTAS = ([0.12, -0.06, 0.03, 0, 0.015, -0.01], [0.06, 0.02, -0.05], [-0.03, 0.01])


def aggregated(deltas: Any, weighting: str = "uniform", examples: Any = (1, 1, 1), count: str = "held") -> Tensor:
    mean = MaskedMean(weighting, count=count)  # type: ignore[arg-type]
    mean.start({"x": X})
    for delta, number in zip(deltas, examples, strict=True):
        values = -torch.tensor(delta, dtype=torch.float64)  # the specification's delta is start minus end
        mask = torch.arange(6) < len(delta)
        mean.add(SparseUpdate({"x": values}, {"x": mask}, number, "delta", "unheld"))
    return mean.result()["x"]


def test_aggregation_over_holders() -> None:
    close(aggregated(DELTAS), [0.95, -0.79, 0.61, -0.4, 0.185, 0.11])
    without_first = aggregated(DELTAS[1:], examples=(1, 1))
    close(without_first, [0.985, -0.815, 0.65, -0.4, 0.2, 0.1])
    assert torch.equal(without_first[3:], X[3:])
    zero = (DELTAS[0], [0.06, 0.0, -0.05], DELTAS[2])
    close(aggregated(zero)[1], -0.8 + 0.016667)
    # the released code's count leaves out who sent a zero, and gives back what only zeros were sent for
    close(aggregated(zero, count="changed")[1], -0.8 + 0.025)
    changed = aggregated(DELTAS, count="changed")
    close(changed, aggregated(DELTAS))
    assert changed[3] == X[3]
    counts = torch.stack([(X - aggregated([delta], examples=(1,), count="changed")) != 0 for delta in DELTAS]).sum(0)
    assert counts.tolist() == [3, 3, 2, 0, 1, 1]
    close(X - aggregated(DELTAS, "examples", (100, 300, 600)), [0.012, 0.006, -0.03, 0, 0.015, -0.01])
    reversed_order = aggregated(DELTAS[::-1])
    close(reversed_order, aggregated(DELTAS), atol=1e-15)
    close(aggregated([*DELTAS, []], examples=(1, 1, 1, 1)), aggregated(DELTAS), atol=0)


# -- properties --------------------------------------------------------------------------------------------------------

WEIGHTS = st.lists(st.floats(-1, 1, width=32).filter(lambda value: value != 0), min_size=2, max_size=40, unique_by=abs)
CAPACITY = st.floats(0.01, 1)


@given(WEIGHTS, CAPACITY, CAPACITY, st.sampled_from([0.0, 0.01]))
def test_submodels_are_exact_and_nested(values: list[float], one: float, other: float, floor: float) -> None:
    half = len(values) // 2
    weights = {"a": torch.tensor(values[:half]), "b": torch.tensor(values[half:])}
    kept = []
    for capacity in sorted((one, other)):
        count = max(1, int(capacity * len(values)))
        if floor and count < 2:
            return  # a floor of one weight in each of two tensors
        thresholds = submodel_thresholds(weights, [["a", "b"]], capacity, layer_floor=floor)
        masks = submodel_masks(weights, thresholds)
        assert sum(int(mask.sum()) for mask in masks.values()) == count
        assert not floor or all(mask.any() for mask in masks.values())
        kept.append(masks)
        # what the client holds is enough to find the same thresholds
        held = {name: weight * masks[name] for name, weight in weights.items()}
        assert submodel_thresholds(held, [["a", "b"]], capacity, layer_floor=floor) == thresholds
    small, large = kept
    assert all(bool((large[name] | ~small[name]).all()) for name in weights)


@given(WEIGHTS, CAPACITY)
def test_masks_follow_permutations_signs_and_scale(values: list[float], capacity: float) -> None:
    w = torch.tensor(values, dtype=torch.float64)
    theta = importance_threshold({"w": w}, capacity)
    order = torch.randperm(len(w))
    assert importance_threshold({"w": -w[order]}, capacity) == theta
    assert importance_threshold({"w": 4 * w}, capacity) == 4 * theta
    factors = importance_factor(w, theta)[w.abs() >= theta]
    assert bool(((factors >= 1) & (factors <= 1.5 + 1e-12)).all())


def test_a_floor_keeps_every_layer_and_stays_within_the_capacity() -> None:
    weights = {"L1": L1, "L2": L2}
    thresholds = submodel_thresholds(weights, [["L1", "L2"]], 0.25, layer_floor=0.125)
    assert thresholds == {"L1": 0.8, "L2": 0.4}  # 3 of 12: one each, and the largest other
    with pytest.raises(
        ValueError, match=r"got layer_floor=0.5, which keeps 6 of 12 weights, at capacity 0.25, which keeps 3"
    ):
        submodel_thresholds(weights, [["L1", "L2"]], 0.25, layer_floor=0.5)


# -- in a plain Trainer ------------------------------------------------------------------------------------------------


class Small(pl.LightningModule):
    def __init__(self, manual: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = not manual
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.second(torch.tanh(self.first(batch[0]))), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        if self.automatic_optimization:
            return self.loss(batch)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()
        return None

    def configure_optimizers(self) -> Any:
        if self.automatic_optimization:
            return AdamW(self.parameters(), lr=0.05, weight_decay=0.3)
        return AdamW(self.first.parameters(), lr=0.05), SGD(self.second.parameters(), lr=0.1, momentum=0.9)


def examples() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(40, 6, generator=generator)
    return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=4)


class Watch(pl.Callback):
    """Stored weights after every batch, with the masks of that batch."""

    def __init__(self, masking: ImportanceMasking) -> None:
        self.masking = masking
        self.rows: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: pl.LightningModule, *args: Any) -> None:
        weights = {name: pl_module.get_parameter(name).detach().clone() for name in self.masking.thresholds}
        self.rows.append((weights, dict(self.masking.masks)))  # type: ignore[arg-type]


@pytest.mark.parametrize("manual", [False, True])
def test_nothing_outside_the_mask_moves_under_momentum_and_decay(manual: bool) -> None:
    torch.manual_seed(1)
    module = Small(manual)
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    masking = ImportanceMasking(0.3, refresh_every=10)
    watch = Watch(masking)
    with quiet_lightning():
        trainer(masking, watch, max_epochs=3).fit(module, examples())
    moved, changes = 0, 0
    for (weights, masks), (_, last) in zip(watch.rows, [watch.rows[0], *watch.rows], strict=False):
        for name, weight in weights.items():
            assert torch.equal(weight[~masks[name]], before[name][~masks[name]])
            moved += int((weight != before[name]).sum())
            changes += int((masks[name] != last[name]).sum())
        before = weights
    assert moved > 100
    assert changes > 0, "expected a refresh that moves the submodel, so that momentum of old members exists"


def test_the_submodel_is_folded_and_loads_without_callbacks(tmp_path: Any) -> None:
    torch.manual_seed(1)
    module = Small()
    runner = trainer(ImportanceMasking(0.25), max_epochs=2)
    with quiet_lightning():
        runner.fit(module, examples())
        runner.save_checkpoint(tmp_path / "end.ckpt")
    kept = sum(int((layer.weight != 0).sum()) for layer in (module.first, module.second))
    assert 0 < kept <= 18  # 0.25 of 72; some may have fallen below the threshold
    plain = load_folded(tmp_path / "end.ckpt", Small())
    assert all(torch.equal(one, other) for one, other in zip(plain.parameters(), module.parameters(), strict=True))


def test_full_capacity_leaves_training_alone() -> None:
    results = []
    for callbacks in ([], fiarse(1.0)):
        torch.manual_seed(1)
        module = Small()
        with quiet_lightning():
            trainer(*callbacks, max_epochs=2).fit(module, examples())
        results.append(torch.cat([parameter.detach().flatten() for parameter in module.parameters()]))
    assert torch.equal(results[0], results[1])


def test_the_threshold_at_full_capacity_is_zero_or_the_smallest_magnitude() -> None:
    torch.manual_seed(1)
    module = Small()
    smallest = min(float(layer.weight.detach().abs().min()) for layer in (module.first, module.second))
    for option, expected in (("zero", 0.0), ("min", smallest)):
        masking = ImportanceMasking(full_threshold=option)  # type: ignore[arg-type]
        masking.transform(trainer(), module)
        assert set(masking.thresholds.values()) == {expected}


def test_evaluation_alone_uses_the_submodel() -> None:
    class Evaluated(Small):
        seen = 0

        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.seen = sum(int((layer.weight != 0).sum()) for layer in (self.first, self.second))

    module = Evaluated()
    runner = trainer(ImportanceMasking(0.5))
    with quiet_lightning():
        runner.test(module, examples(), verbose=False)
    assert module.seen == 36
    with pytest.raises(
        ValueError, match=r"expected the module that ImportanceMasking extracted .* 'first.weight' is new"
    ):
        runner.test(Wider(), examples(), verbose=False)


class Wider(Small):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 9)

    def test_step(self, batch: Any, batch_idx: int) -> None: ...


def test_groups_share_thresholds() -> None:
    names = ["a.0.weight", "a.1.weight", "b.weight"]
    assert extraction_groups(names) == [names]
    assert extraction_groups(names, per_tensor=True) == [[name] for name in names]
    assert extraction_groups(names, [["b*"], ["a.0*", "a.1*"]]) == [["b.weight"], ["a.0.weight", "a.1.weight"]]
    with pytest.raises(
        ValueError, match=r"expected groups that match masked parameters, got \['c\*'\], which matches none"
    ):
        extraction_groups(names, [["a*", "b*"], ["c*"]])
    with pytest.raises(ValueError, match=r"expected every masked parameter in one group, got 'b.weight' in 0"):
        extraction_groups(names, [["a*"]])
    with pytest.raises(ValueError, match=r"expected every masked parameter in one group, got 'a.1.weight' in 2"):
        extraction_groups(names, [["*"], ["a.1*"]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity": 0.0}, r"expected a capacity in \(0, 1\], got 0.0 for ImportanceMasking"),
        ({"capacity": 1.1}, r"expected a capacity in \(0, 1\], got 1.1 for ImportanceMasking"),
        ({"extraction": "stage"}, "expected extraction to be one of 'model', 'tensor', got 'stage'"),
        ({"gradient": "biased"}, "expected gradient to be one of 'tcb', 'plain', got 'biased'"),
        ({"full_threshold": "max"}, "expected full_threshold to be one of 'zero', 'min', got 'max'"),
        ({"layer_floor": 1.0}, r"expected a layer_floor in \[0, 1\), got 1.0"),
        ({"refresh_every": 0}, "expected a period of at least 1, got refresh_every=0"),
        ({"extraction": "tensor", "groups": [["a"]]}, "expected either groups or extraction='tensor', got both"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fiarse(**options)


def test_bad_thresholds() -> None:
    with pytest.raises(ValueError, match=r"expected a capacity in \(0, 1\], got 0"):
        importance_threshold({"w": A}, 0)
    with pytest.raises(ValueError, match="expected at least one weight to find a threshold for, got none"):
        importance_threshold({"w": A[:0]}, 0.5)


def test_a_reparametrization_of_the_same_weights_is_refused() -> None:
    callbacks = [Powerpropagation(beta=2.0), ImportanceMasking(0.5)]
    with pytest.raises(ValueError, match="expected ImportanceMasking beside no reparametrization of the same weights"):
        trainer(*callbacks, max_epochs=1).fit(Small(), examples())


# -- in a federation ---------------------------------------------------------------------------------------------------

LEVELS = [1.0, 0.25, 0.0625, 0.25, 0.0625, 1.0]


def federated(capacities: Any = LEVELS, data: Any = None) -> FederatedDataModule:
    loaders = {name: DataLoader(part, batch_size=8, shuffle=True) for name, part in (data or clients()).items()}
    return FederatedDataModule(loaders, capacities=CapacityList(capacities) if capacities else None)


def run(rounds: int = 3, callbacks: Any = None, *, data: Any = None, per_round: int = 6, **arguments: Any) -> Any:
    torch.manual_seed(0)
    model = Net()
    arguments.setdefault("evaluation", QUIET)
    callbacks = fiarse() if callbacks is None else callbacks
    loop = FederatedLoop(rounds, per_round, callbacks, console=False, **arguments)
    loop.fit(model, data or federated())
    return loop, model


def test_full_capacities_are_unweighted_fedavg() -> None:
    data = {name: TensorDataset(part.tensors[0].double(), part.tensors[1]) for name, part in clients().items()}
    results = []
    for callbacks, aggregator in (([], MaskedMean()), (fiarse(), None)):
        torch.manual_seed(0)
        model = Net().double()
        FederatedLoop(3, 4, callbacks, aggregator=aggregator, evaluation=QUIET, console=False).fit(
            model, federated([1.0] * 6, data)
        )
        results.append(model.state_dict())
    for name, tensor in results[0].items():
        close(results[1][name].double(), tensor.double(), atol=1e-12)


def test_coordinates_that_nobody_holds_keep_their_bits() -> None:
    torch.manual_seed(0)
    start = Net().state_dict()
    _, model = run(1, data=federated([0.25] * 6))
    theta = importance_threshold({"a": start["first.weight"], "b": start["last.weight"]}, 0.25)
    for name in ("first.weight", "last.weight"):
        held = start[name].abs() >= theta
        assert torch.equal(model.state_dict()[name][~held], start[name][~held])
        assert not torch.equal(model.state_dict()[name][held], start[name][held])


def test_one_client_alone_leaves_its_weights() -> None:
    class Keep(SparsityCallback):
        left: dict[str, Tensor] = {}

        def on_client_round_end(self, trainer: Any, pl_module: Any, update: SparseUpdate) -> SparseUpdate:
            Keep.left = {name: parameter.detach().clone() for name, parameter in pl_module.named_parameters()}
            return update

    loop, _ = run(1, [*fiarse(), Keep()], per_round=1, data=federated([0.25] * 6))
    for name in ("first.weight", "last.weight"):
        mask = Keep.left[name] != 0
        close(loop.state.weights[name][mask], Keep.left[name][mask], atol=1e-7)
        assert int(mask.sum()) < mask.numel()
    close(loop.state.weights["first.bias"], Keep.left["first.bias"], atol=1e-7)


def test_each_level_is_encoded_once_and_learned_positions_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[Any] = []
    jobs: list[Any] = []
    original, ran = Wire.encode_broadcast, ClientWorker.run

    def encode_(self: Wire, update: SparseUpdate, **arguments: Any) -> bytes:
        encoded.append(update)
        return original(self, update, **arguments)

    def run_(self: ClientWorker, job: Any) -> Any:
        jobs.append((job.client_id, job.reference_id))
        return ran(self, job)

    monkeypatch.setattr(Wire, "encode_broadcast", encode_)
    monkeypatch.setattr(ClientWorker, "run", run_)
    loop, _ = run(4)
    # three levels; all six clients come in every round and hold their level's masks of the last one
    assert len(encoded) == 3 * 4
    small = {f"c{number}" for number, level in enumerate(LEVELS) if level < 1}
    for position, (client_id, reference_id) in enumerate(jobs):
        assert (reference_id is not None) == (position >= 6 and client_id in small)
    assert not any(record.failures for record in loop.history)
    assert all(record.bytes_down < record.dense_bytes_down for record in loop.history[1:])


def test_more_versions_are_kept_for_more_levels() -> None:
    levels = [1.0, 0.5, 0.25, 0.125, 0.0625, 0.03]
    loop, _ = run(6, data=federated(levels))
    # of six levels four versions each, dense masks being one version
    assert 6 < len(loop._run.federation.broadcaster.versions) <= 24
    assert not any(record.failures for record in loop.history)


def test_an_upload_beyond_the_clients_own_support_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = ClientWorker.run

    def greedy(self: ClientWorker, job: Any) -> Any:
        result = ran(self, job)
        if job.client_id != "c1":
            return result
        own = decode(result.payload, schema=self.schema, reference=self._masks[next(reversed(self._masks))])
        dense = {name: torch.ones_like(parameter) for name, parameter in self.module.named_parameters()}
        wide = replace(own, values=dense, masks=dict.fromkeys(dense), mask_id=None)
        return replace(result, payload=encode(wide))

    monkeypatch.setattr(ClientWorker, "run", greedy)
    loop, _ = run(1)
    assert list(loop.history[-1].failures) == ["c1"]
    assert "outside the support" in loop.history[-1].failures["c1"].sentence


def test_the_aggregator_follows_the_method_and_a_wrong_one_is_refused() -> None:
    same = [run(2, aggregator=aggregator)[1].state_dict() for aggregator in (None, MaskedMean())]
    assert all(torch.equal(same[0][name], same[1][name]) for name in same[0])
    with pytest.raises(ValueError, match="got 'unheld': MaskedMean averages over holders"):
        run(1, aggregator=WeightedMean())


def test_a_resumed_run_ends_like_an_uninterrupted_one(tmp_path: Any) -> None:
    evaluated = {"evaluation": Evaluation(clients=False, split="none"), "buffers": "recalibrate", "per_round": 4}
    whole, expected = run(5, default_root_dir=tmp_path / "whole", **evaluated)
    run(3, default_root_dir=tmp_path / "cut", **evaluated)
    torch.manual_seed(0)
    model = Net()
    loop = FederatedLoop(
        5, 4, fiarse(), console=False, evaluation=QUIET, buffers="recalibrate", default_root_dir=tmp_path / "cut"
    )
    loop.fit(model, federated(), ckpt_path="last")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in expected.state_dict().items())
    assert [row.bytes_down for row in loop.history] == [row.bytes_down for row in whole.history]


def test_clients_without_a_capacity_use_the_methods_own() -> None:
    own = run(2, fiarse(0.25), data=federated(None))[0]
    given_, _ = run(2, fiarse(), data=federated([0.25] * 6))
    assert all(torch.equal(own.state.weights[name], tensor) for name, tensor in given_.state.weights.items())


def test_a_method_that_uploads_something_else_is_refused() -> None:
    with pytest.raises(
        ValueError, match="expected methods that agree on what an upload holds, got .*TopKAfterTraining"
    ):
        run(1, [TopKAfterTraining(ConstantSchedule(0.5)), *fiarse()])


def test_a_floor_above_a_clients_capacity_is_said_before_it_trains() -> None:
    with pytest.raises(ValueError, match="expected a layer_floor within the capacity, got layer_floor=0.2"):
        run(1, fiarse(layer_floor=0.2))


def test_uploads_may_be_rounded_and_broadcasts_may_not() -> None:
    exact, _ = run(2)
    rounded, _ = run(2, wire=Wire(uploads="int8"))
    assert not any(record.failures for record in rounded.history)
    assert rounded.history[-1].bytes_up < 0.7 * exact.history[-1].bytes_up  # headers are much of these small payloads
    for name, weight in exact.state.weights.items():
        close(rounded.state.weights[name], weight.tolist(), atol=0.05)
    with pytest.raises(ValueError, match="a client finds its threshold from the weights that arrive"):
        run(1, wire=Wire(broadcasts="bfloat16"))


class Whole(pl.LightningDataModule):
    def train_dataloader(self) -> DataLoader[Any]:
        x = torch.randn(80, 8, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=8, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train_dataloader().dataset, batch_size=8)


@pytest.mark.parametrize("buffers", ["average", "recalibrate"])
def test_evaluation_at_sizes_and_at_every_clients_own(buffers: Any) -> None:
    capacities = CapacityShares({1.0: 0.5, 0.25: 0.5})
    data = FederatedDataModule(Whole(), IidPartition(4), validation_fraction=0.25, capacities=capacities)
    sweep = Evaluation(clients=True, capacities=[0.25, 1 / 64])
    loop, model = run(2, data=data, evaluation=sweep, per_round=4, buffers=buffers)
    metrics = loop.history[-1].metrics
    names = [*("val_loss", "val_loss@0.25", "val_loss@0.015625"), *("clients/val_loss/mean", "clients/val_loss/min")]
    names += [f"clients/val_loss/{kind}@{level}" for level in ("1", "0.25") for kind in ("mean", "min")]
    assert sorted(metrics) == sorted(names)
    both = (metrics["clients/val_loss/mean@1"] + metrics["clients/val_loss/mean@0.25"]) / 2
    assert metrics["clients/val_loss/mean"] == pytest.approx(both)
    # afterwards the module holds the whole model
    assert evaluate(model, data, "validation", {}) == {"val_loss": metrics["val_loss"]}
    assert all(torch.equal(loop.state.weights[name], weight) for name, weight in model.named_parameters())
    if buffers == "average":
        theta = importance_threshold({"a": model.first.weight, "b": model.last.weight}, 0.25)
        for layer in (model.first, model.last):
            layer.weight.data *= layer.weight.abs() >= theta
        assert evaluate(model, data, "validation", {}) == {"val_loss": metrics["val_loss@0.25"]}
