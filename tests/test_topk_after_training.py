"""Top-K of trained weights: exact counts, what the server makes of them, and a model that dies."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_fedsparse import FederatedDataModule, FederatedLoop, load_folded
from lightning_fedsparse.aggregation import WeightedMean
from lightning_fedsparse.callbacks import Powerpropagation, SparsityCallback, TopKAfterTraining, sparsyfed
from lightning_fedsparse.capacities import CapacityMapping
from lightning_fedsparse.masks import largest_weights
from lightning_fedsparse.models import ResNet18
from lightning_fedsparse.prunable import prunable_parameters
from lightning_fedsparse.schedules import ConstantSchedule, CubicSchedule, ExponentialSchedule, LinearSchedule, Progress
from lightning_fedsparse.update import SparseUpdate
from tests.effective_reference import WEIGHTS, loader, quiet_trainer, seeded
from tests.effective_reference import Net as SmallNet
from tests.test_loop import QUIET, Net, clients, loaders, plain_fedavg

PRUNED = ("first.weight", "last.weight")
SIZE = 8 * 16 + 16 * 3


# -- the masks ---------------------------------------------------------------------------------------------------------


def test_one_ranking_over_all_layers() -> None:
    weights = {
        "a": torch.tensor([0.9, -0.2, 0.05, 0.4]),
        "b": torch.tensor([0.01, -0.02, 0.03, 0.6, 0.15, -0.07]),
    }
    masks = largest_weights(weights, 0.7)
    assert (weights["a"] * masks["a"]).tolist() == pytest.approx([0.9, 0, 0, 0.4])
    assert (weights["b"] * masks["b"]).tolist() == pytest.approx([0, 0, 0, 0.6, 0, 0])


@given(st.integers(1, 30), st.integers(1, 30), st.floats(0, 0.99), st.integers(0, 20), st.integers(0, 99))
def test_counts_are_exact_where_there_are_weights_enough(
    a: int, b: int, sparsity: float, zeros: int, seed: int
) -> None:
    weights = torch.rand(a + b, generator=torch.Generator().manual_seed(seed)) + 0.01
    weights[:zeros] = 0
    masks = largest_weights({"a": weights[:a], "b": weights[a:]}, sparsity)
    kept = sum(int(mask.sum()) for mask in masks.values())
    assert kept == min(a + b - round(sparsity * (a + b)), int(weights.count_nonzero()))


def test_a_floor_per_layer_takes_from_the_others() -> None:
    weights = {"a": torch.tensor([9.0, 8, 7, 6]), "b": torch.tensor([0.1, 0.2, 0.3, 0.4])}
    masks = largest_weights(weights, 0.5, layer_floor=0.25)
    assert masks["a"].tolist() == [True, True, True, False]
    assert masks["b"].tolist() == [False, False, False, True]


@pytest.mark.parametrize(
    ("sparsity", "kept"), [(0.9, 1_116_435), (0.95, 558_218), (0.99, 111_644), (0.995, 55_822), (0.999, 11_164)]
)
def test_what_a_client_keeps_of_the_cifar_model(sparsity: float, kept: int) -> None:
    total = sum(weight.numel() for weight in prunable_parameters(ResNet18(num_classes=10)).values())
    assert total == 11_164_352
    assert total - round(sparsity * total) == kept


def test_the_schedule_counts_the_round_that_ends() -> None:
    topk = TopKAfterTraining(LinearSchedule(0.0, 0.8), end=0.5)
    assert [round(topk.target(Progress(done, 8)), 6) for done in (1, 2, 4, 8)] == [0.2, 0.4, 0.8, 0.8]


@pytest.mark.parametrize(
    ("initial", "final", "total", "at"),
    [
        (0.5, 0.01, 700, {0: 0.5, 1: 0.497213, 350: 0.070711, 700: 0.01}),
        (0.1, 0.001, 500, {1: 0.099083, 250: 0.01}),
    ],
)
def test_learning_rates_of_the_released_code(initial: float, final: float, total: int, at: dict[int, float]) -> None:
    schedule = ExponentialSchedule(initial, (final / initial) ** (1 / total))
    for step, rate in at.items():
        assert schedule(Progress(step, total)) == pytest.approx(rate, abs=1e-6)


# -- in a plain Trainer ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("callbacks", [[], [Powerpropagation(2.0)]])
def test_the_end_of_fit_prunes_exactly(callbacks: list[pl.Callback]) -> None:
    module, plain = seeded(SmallNet), seeded(SmallNet)
    quiet_trainer([TopKAfterTraining(LinearSchedule(0.1, 0.75)), *callbacks]).fit(module, loader())
    quiet_trainer(copy.deepcopy(callbacks)).fit(plain, loader())
    assert sum(int((module.get_parameter(name) == 0).sum()) for name in WEIGHTS) == 54
    masks = largest_weights({name: plain.get_parameter(name) for name in WEIGHTS}, 0.75)
    for name in WEIGHTS:
        assert torch.equal(module.get_parameter(name), plain.get_parameter(name) * masks[name])


@pytest.mark.parametrize("averaging", [None, "first", "last"])
def test_a_checkpoint_from_inside_fit_loads_as_if_fit_had_ended_there(averaging: str | None, tmp_path: Path) -> None:
    def callbacks() -> list[pl.Callback]:
        mine: list[pl.Callback] = [TopKAfterTraining(ConstantSchedule(0.75), layer_floor=0.1), Powerpropagation(2.0)]
        ema = [] if averaging is None else [EMAWeightAveraging(decay=0.5)]
        return [*ema, *mine] if averaging == "first" else [*mine, *ema]

    module = seeded(SmallNet)
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = quiet_trainer([*callbacks(), save], enable_checkpointing=True)
    trainer.fit(module, loader())
    ended = load_folded(tmp_path / f"step={trainer.global_step}.ckpt", seeded(SmallNet))
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    again = load_folded(tmp_path / "after.ckpt", seeded(SmallNet))
    for name in WEIGHTS:
        torch.testing.assert_close(ended.get_parameter(name), module.get_parameter(name), rtol=0, atol=0)
        torch.testing.assert_close(again.get_parameter(name), module.get_parameter(name), rtol=0, atol=0)
    middle = load_folded(tmp_path / "step=3.ckpt", seeded(SmallNet))
    assert sum(int((middle.get_parameter(name) == 0).sum()) for name in WEIGHTS) == 54


def test_the_average_of_a_federation_is_loaded_whole(tmp_path: Path) -> None:
    topk = TopKAfterTraining(ConstantSchedule(0.75))
    quiet_trainer([topk]).fit(seeded(SmallNet), loader())  # what a plain fit left must not act on the federation
    module = Net()
    loop = FederatedLoop(2, 2, [topk], evaluation=QUIET, default_root_dir=tmp_path, console=False)
    loop.fit(module, loaders(clients()))
    plain = load_folded(tmp_path / "checkpoints" / "last.ckpt", Net())
    for name, weight in module.named_parameters():
        assert torch.equal(plain.get_parameter(name), weight)


# -- in a federation ---------------------------------------------------------------------------------------------------


class Spy(SparsityCallback):
    """The global support after each round, and every upload's."""

    def __init__(self) -> None:
        self.supports: list[dict[str, Tensor]] = []
        self.uploads: list[list[SparseUpdate]] = []

    def on_server_receive(self, state: Any, server_round: Any, update: SparseUpdate) -> None:
        if len(self.uploads) == server_round.index:
            self.uploads.append([])
        self.uploads[-1].append(update)

    def on_server_round_end(self, state: Any, server_round: Any) -> Any:
        self.supports.append({name: state.masks[name] for name in PRUNED})
        return state

    def __deepcopy__(self, memo: Any) -> Spy:
        return Spy()


def federate(callbacks: list[pl.Callback], rounds: int = 4, *, data: Any = None, **arguments: Any) -> tuple[Spy, Any]:
    torch.manual_seed(0)
    spy, model = Spy(), Net()
    loop = FederatedLoop(
        rounds, arguments.pop("per_round", 3), [*callbacks, spy], {"max_epochs": 2}, evaluation=QUIET, console=False
    )
    loop.fit(model, data or loaders(clients()))
    return spy, model


def topk(beta: float, sparsity: float = 0.8) -> list[pl.Callback]:
    return [TopKAfterTraining(ConstantSchedule(sparsity)), Powerpropagation(beta)]


@pytest.mark.parametrize("beta", [1.0, 1.25, 2.0])
def test_supports(beta: float) -> None:
    spy, _ = federate(topk(beta))
    kept = SIZE - round(0.8 * SIZE)
    for support, uploads in zip(spy.supports, spy.uploads, strict=True):
        for update in uploads:
            assert update.absent == "zero"
            assert sum(int(update.masks[name].sum()) for name in PRUNED) == kept
        for name in PRUNED:
            union = torch.stack([update.masks[name] for update in uploads]).any(0)
            assert torch.equal(support[name], union)
    nested = all(
        bool((~after[name] | before[name]).all())
        for before, after in zip(spy.supports, spy.supports[1:], strict=False)
        for name in PRUNED
    )
    # a weight of zero has a gradient only where it is not reparametrized
    assert nested == (beta > 1)


def test_weights_that_are_not_reparametrized_may_return() -> None:
    callbacks = [
        c for c in sparsyfed(sparsity=0.8, regrow=["last.*"]) if isinstance(c, (TopKAfterTraining, Powerpropagation))
    ]
    spy, _ = federate(callbacks, rounds=6)
    back = {
        name: sum(int((a[name] & ~b[name]).sum()) for b, a in zip(spy.supports, spy.supports[1:], strict=False))
        for name in PRUNED
    }
    assert back["first.weight"] == 0
    assert back["last.weight"] > 0


def test_identical_clients_meet_the_target_exactly() -> None:
    part = clients()["c0"]
    same = {name: DataLoader(part, batch_size=8) for name in ("a", "b", "c")}
    data = FederatedDataModule(same)
    spy, _ = federate(topk(1.25), data=data)
    for support in spy.supports:
        assert sum(int(mask.sum()) for mask in support.values()) == SIZE - round(0.8 * SIZE)


def test_clients_of_different_size() -> None:
    """a and b hold a twentieth, c what the schedule says: each sends, and from round 2 on gets, no more than that."""
    small = round(0.05 * SIZE)
    parts = clients(3)
    data = FederatedDataModule(
        {name: DataLoader(part, batch_size=8, shuffle=True) for name, part in parts.items()},
        capacities=CapacityMapping({"c0": 0.05, "c1": 0.05, "c2": 1.0}),
    )

    class Received(Spy):
        counts: ClassVar[list[tuple[int, str, int]]] = []

        def on_client_round_start(self, trainer: Any, pl_module: Any, client_round: Any) -> None:
            alive = sum(int(pl_module.get_parameter(name).count_nonzero()) for name in PRUNED)
            self.counts.append((client_round.index, client_round.client_id, alive))

        def __deepcopy__(self, memo: Any) -> Received:
            return Received()

    received, model = Received(), Net()
    loop = FederatedLoop(3, 3, [*topk(1.25), received], evaluation=QUIET, console=False)
    loop.fit(model, data)
    kept = SIZE - round(0.8 * SIZE)
    for uploads in received.uploads:
        counts = sorted(sum(int(update.masks[name].sum()) for name in PRUNED) for update in uploads)
        assert counts == [small, small, kept]
    for index, client, alive in Received.counts:
        if index == 0:
            assert alive == SIZE
        elif client == "c2":
            assert alive == sum(int(mask.sum()) for mask in received.supports[index - 1].values())
        else:
            assert alive == small
    loop.load_submodel(model, 0.05)
    assert sum(int(model.get_parameter(name).count_nonzero()) for name in PRUNED) == small


@pytest.mark.parametrize(("capacity", "floor"), [(1e-4, 0.0), (0.05, 0.1)])
def test_a_capacity_that_holds_too_little_is_refused_before_the_first_round(capacity: float, floor: float) -> None:
    topk = TopKAfterTraining(ConstantSchedule(0.8), layer_floor=floor)
    wanted = "above the layer_floor of 0.1" if floor else f"that holds at least one of {SIZE} weights"
    loop = FederatedLoop(3, 1, [topk], evaluation=QUIET, console=False)
    data = loaders(clients(3), {"c0": 1.0, "c1": 1.0, "c2": capacity})
    with pytest.raises(ValueError, match=rf"expected a capacity {wanted}, got {capacity} for client 'c2'"):
        loop.fit(Net(), data)
    assert not loop.history
    with pytest.raises(ValueError, match=rf"expected a capacity {wanted}, got {capacity} to evaluate at"):
        topk.to_effective_(dict(Net().named_parameters()), capacity)


def test_no_exponent_and_no_sparsity_is_fedavg_to_the_bit() -> None:
    torch.manual_seed(0)
    expected = plain_fedavg(Net(), clients(), rounds=3, per_round=3, epochs=2, seed=0)
    _, model = federate(topk(1.0, 0.0), rounds=3)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_the_aggregate_of_two_clients() -> None:
    def upload(values: list[float], examples: int) -> SparseUpdate:
        dense = torch.tensor(values, dtype=torch.float64)
        return SparseUpdate({"w": dense[dense != 0]}, {"w": dense != 0}, num_examples=examples, absent="zero")

    for scale in (1, 7):
        mean = WeightedMean()
        mean.start({"w": torch.full((4,), 9.0, dtype=torch.float64)})
        mean.add(upload([0.9, 0, 0, 0.4], 30 * scale))
        mean.add(upload([0.5, -0.3, 0, 0], 10 * scale))
        assert mean.result()["w"].tolist() == pytest.approx([0.8, -0.075, 0, 0.3])


def test_sending_changes_would_give_the_same_average() -> None:
    broadcast = torch.tensor([1.0, 2.0, 0.0, 4.0], dtype=torch.float64)
    sent = [torch.tensor([0.5, 0, 0, 3.0], dtype=torch.float64), torch.tensor([0, 0, 0, 5.0], dtype=torch.float64)]
    mean = WeightedMean()
    mean.start({"w": broadcast})
    for weights, examples in zip(sent, (3, 1), strict=True):
        mean.add(SparseUpdate({"w": weights[weights != 0]}, {"w": weights != 0}, num_examples=examples, absent="zero"))
    changes = sum(n * (weights - broadcast) for weights, n in zip(sent, (3, 1), strict=True)) / 4
    assert torch.equal(mean.result()["w"], broadcast + changes)


def test_round_one_is_dense_down_and_the_others_are_sparse() -> None:
    callbacks = sparsyfed(sparsity=0.8)
    torch.manual_seed(0)
    loop = FederatedLoop(3, 6, callbacks, evaluation=QUIET, console=False)
    loop.fit(Net(), loaders(clients()))
    first, second, third = loop.history[1:]
    assert second.bytes_down < first.bytes_down
    assert third.bytes_down <= second.bytes_down
    assert first.bytes_up < first.bytes_down
    assert all(not record.failures for record in loop.history)


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "options", "message"),
    [
        (ConstantSchedule(1.0), {}, r"expected a sparsity schedule with values in \[0, 1\), got 1.0"),
        (CubicSchedule(0.5, 0.2), {}, "expected a sparsity schedule that does not decrease, got 0.5 to 0.2"),
        (ConstantSchedule(0.5), {"end": 0.0}, r"expected end in \(0, 1\], got 0.0"),
        (ConstantSchedule(0.95), {"layer_floor": 0.1}, r"expected layer_floor in \[0, 0.05\), below .* got 0.1"),
    ],
)
def test_bad_options(schedule: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TopKAfterTraining(schedule, **options)


def test_bad_options_of_the_composition() -> None:
    with pytest.raises(ValueError, match=r"expected ramp in \[0, 1\], got 2"):
        sparsyfed(ramp=2)
