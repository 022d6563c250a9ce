"""Width masking: which units, what never moves, and what clients and the server exchange."""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedsparse import FederatedDataModule, FederatedLoop, SparseUpdate, load_folded
from lightning_fedsparse.aggregation import MaskedMean
from lightning_fedsparse.callbacks import Powerpropagation, SparsityCallback, TopKAfterTraining, WidthMasking
from lightning_fedsparse.capacities import CapacityList
from lightning_fedsparse.evaluation import Evaluation, evaluate
from lightning_fedsparse.failures import TooFewClientsError
from lightning_fedsparse.models import DigitsCNN, ImageClassifier
from lightning_fedsparse.quiet import QUIET_TRAINER, quiet_lightning
from lightning_fedsparse.schedules import ConstantSchedule
from tests.test_loop import QUIET, Net, clients

LEVELS = [1.0, 0.25, 0.0625, 0.25, 0.0625, 1.0]


class Wide(Net):
    """8 inputs, 16 hidden units with BatchNorm, 3 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = torch.zeros(1, 8)


def trainer(*callbacks: pl.Callback, **arguments: Any) -> pl.Trainer:
    arguments = {**QUIET_TRAINER, "limit_val_batches": 1, "accelerator": "cpu", **arguments}
    return pl.Trainer(callbacks=list(callbacks), **arguments)


def examples() -> DataLoader[Any]:
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(2))
    return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=4)


def federated(capacities: Any = LEVELS) -> FederatedDataModule:
    loaders = {name: DataLoader(part, batch_size=8, shuffle=True) for name, part in clients().items()}
    return FederatedDataModule(loaders, capacities=CapacityList(capacities) if capacities else None)


def run(
    rounds: int = 3, callbacks: Any = None, *, data: Any = None, per_round: int = 6, fit: Any = None, **arguments: Any
) -> Any:
    torch.manual_seed(0)
    model = Wide()
    arguments.setdefault("evaluation", QUIET)
    callbacks = [WidthMasking()] if callbacks is None else callbacks
    loop = FederatedLoop(rounds, per_round, callbacks, console=False, **arguments)
    loop.fit(model, data or federated(), **(fit or {}))
    return loop, model


def units_of(mask: Tensor) -> list[int]:
    return mask.flatten(1).any(1).nonzero().flatten().tolist()


# -- in a plain Trainer ------------------------------------------------------------------------------------------------


class Decayed(Wide):
    def configure_optimizers(self) -> Any:
        return AdamW(self.parameters(), lr=0.05, weight_decay=0.3)


class Watch(pl.Callback):
    """Stored weights after every batch, with the masks of that batch."""

    def __init__(self, masking: WidthMasking) -> None:
        self.masking = masking
        self.rows: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: pl.LightningModule, *args: Any) -> None:
        weights = {name: pl_module.get_parameter(name).detach().clone() for name in self.masking.masks}
        self.rows.append((weights, dict(self.masking.masks)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("selection", "windows"),
    [
        ("static", [[0, 1, 2, 3]] * 3),
        ("rolling", [[0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5]]),
        ("rolling_backward", [[0, 1, 2, 3], [0, 1, 2, 15], [0, 1, 14, 15]]),
    ],
)
def test_units_move_and_the_others_stay_under_momentum_and_decay(selection: Any, windows: list[list[int]]) -> None:
    torch.manual_seed(1)
    module = Decayed()
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    masking = WidthMasking(1 / 16, selection, refresh_every=10)
    watch = Watch(masking)
    with quiet_lightning():
        trainer(masking, watch, max_epochs=3).fit(module, examples(), examples())
    seen = [units_of(masks["first.weight"]) for _, masks in watch.rows[::10]]
    assert seen == windows
    moved = 0
    for weights, masks in watch.rows:
        assert masks.keys() == {"first.weight", "first.bias", "norm.weight", "norm.bias", "last.weight"}
        for name, weight in weights.items():
            assert torch.equal(weight[~masks[name]], before[name][~masks[name]])
            moved += int((weight != before[name]).sum())
        before |= weights
    assert moved > 100


def test_random_units_are_drawn_anew() -> None:
    masking = WidthMasking(1 / 16, "random", refresh_every=10)
    watch = Watch(masking)
    with quiet_lightning():
        trainer(masking, watch, max_epochs=3).fit(Wide(), examples(), examples())
    seen = [units_of(masks["first.weight"]) for _, masks in watch.rows[::10]]
    assert all(len(units) == 4 for units in seen)
    assert len({tuple(units) for units in seen}) == 3


def test_the_submodel_is_folded_and_loads_without_callbacks(tmp_path: Any) -> None:
    torch.manual_seed(1)
    module, plain = Wide(), Wide()
    runner = trainer(WidthMasking(0.25), max_epochs=2)
    with quiet_lightning():
        runner.fit(module, examples(), examples())
        runner.save_checkpoint(tmp_path / "end.ckpt")
    assert units_of(module.first.weight.detach()) == list(range(8))
    load_folded(tmp_path / "end.ckpt", plain)
    assert all(torch.equal(one, other) for one, other in zip(module.parameters(), plain.parameters(), strict=True))
    kept = trainer(WidthMasking(0.25, fold=False), max_epochs=2)
    with quiet_lightning():
        kept.fit(plain, examples(), examples())
    assert units_of(plain.first.weight.detach()) == list(range(8)), "what was cut before is zero and stays"


def test_an_evaluation_alone_is_of_the_submodel() -> None:
    torch.manual_seed(1)
    module, narrow = Wide(), Wide()
    narrow.load_state_dict(module.state_dict())
    for name, dim in (("first.weight", 0), ("first.bias", 0), ("norm.weight", 0), ("norm.bias", 0), ("last.weight", 1)):
        narrow.get_parameter(name).detach().narrow(dim, 8, 8).zero_()
    with quiet_lightning():
        (found,) = trainer(WidthMasking(0.25)).validate(module, examples(), verbose=False)
        (expected,) = trainer().validate(narrow, examples(), verbose=False)
        (whole,) = trainer().validate(module, examples(), verbose=False)
    assert found == expected != whole


def test_outputs_are_divided_by_the_width_in_training_only() -> None:
    class Look(pl.Callback):
        outputs: dict[bool, list[Tensor]] = {True: [], False: []}

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            # runs after the callback's own hook on the same layer
            pl_module.first.register_forward_hook(
                lambda layer, inputs, output: self.outputs[layer.training].append(
                    output / F.linear(inputs[0], layer.weight, layer.bias)
                )
            )

    with quiet_lightning():
        trainer(WidthMasking(1 / 16, scale=True), Look(), max_epochs=1).fit(Wide(), examples(), examples())
    for training, factor in ((True, 4.0), (False, 1.0)):
        assert Look.outputs[training]
        for ratio in Look.outputs[training]:
            held = ratio[~ratio.isnan()]
            torch.testing.assert_close(held, torch.full_like(held, factor))


# -- in a federation ---------------------------------------------------------------------------------------------------


class Record(SparsityCallback):
    """What each client's round got, by round and client."""

    rounds: dict[tuple[int, str], Any] = {}

    def on_client_round_start(self, trainer: Any, pl_module: Any, client_round: Any) -> None:
        Record.rounds[client_round.index, client_round.client_id] = client_round.masks


@pytest.fixture
def record() -> Record:
    Record.rounds = {}
    return Record()


def test_clients_hold_units_of_their_own_width(record: Record) -> None:
    loop, _ = run(2, [WidthMasking(), record])
    for (_, client), masks in Record.rounds.items():
        level = LEVELS[int(client[1])]
        if level == 1:
            assert masks.is_dense
            continue
        width = {0.25: 8, 0.0625: 4}[level]
        assert units_of(masks["first.weight"]) == list(range(width))
        assert masks["last.weight"].sum() == 3 * width
        assert masks["norm.bias"].sum() == masks["first.bias"].sum() == width
        assert masks["last.bias"] is None
    assert not any(row.failures for row in loop.history)
    # the second broadcast leans on the masks of the first
    assert loop.history[-1].bytes_down < loop.history[-2].bytes_down < loop.history[-1].dense_bytes_down


@pytest.mark.parametrize("selection", ["rolling", "rolling_backward"])
def test_a_window_visits_every_unit_as_often(selection: Any, record: Record) -> None:
    run(16, [WidthMasking(1 / 16, selection), record], data=federated(None), per_round=2)
    counts = torch.zeros(16, dtype=torch.int64)
    for index in range(16):
        held = {tuple(units_of(masks["first.weight"])) for (t, _), masks in Record.rounds.items() if t == index}
        (units,) = held  # the same for all clients of a round
        start = index if selection == "rolling" else -index
        assert units == tuple(sorted((start + i) % 16 for i in range(4)))
        counts[list(units)] += 1
    assert counts.tolist() == [4] * 16


def test_random_units_are_a_clients_and_a_rounds_own(record: Record) -> None:
    run(2, [WidthMasking(1 / 16, "random"), record], data=federated(None))
    drawn = {tuple(units_of(masks["first.weight"])) for masks in Record.rounds.values()}
    assert len(drawn) == len(Record.rounds) == 12


def largest_units(weights: Any, count: int) -> list[int]:
    size = weights["first.weight"].double().square().sum(1) + weights["last.weight"].double().square().sum(0)
    return sorted(size.argsort(descending=True)[:count].tolist())


def test_units_of_the_largest_weights_are_the_servers_and_nested(record: Record) -> None:
    torch.manual_seed(0)
    before = Wide().state_dict()
    loop, model = run(1, [WidthMasking(selection="largest"), record])
    by_level = {len(units_of(masks["first.weight"])): masks for masks in Record.rounds.values() if not masks.is_dense}
    for count in (4, 8):
        assert units_of(by_level[count]["first.weight"]) == largest_units(before, count)
    # what is evaluated and exported next is of the new weights
    loop.callbacks[0].to_effective_(weights := {name: p.detach().clone() for name, p in model.named_parameters()}, 0.25)
    assert units_of(weights["first.weight"] != 0) == largest_units(model.state_dict(), 8)


class Shrinking(Wide):
    """What is held shrinks, and other units are soon larger."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01, weight_decay=5.0)


def test_units_of_the_largest_weights_in_a_plain_trainer() -> None:
    torch.manual_seed(1)
    module = Shrinking()
    masking = WidthMasking(1 / 16, "largest", refresh_every=10)
    watch = Watch(masking)
    expected = [largest_units(module.state_dict(), 4)]
    with quiet_lightning():
        trainer(masking, watch, max_epochs=3).fit(module, examples())
    seen = [units_of(masks["first.weight"]) for _, masks in watch.rows]
    expected += [largest_units(watch.rows[step][0], 4) for step in (9, 19)]
    assert seen == [units for units in expected for _ in range(10)]
    assert len({tuple(units) for units in expected}) == 3


def test_units_of_the_largest_weights_beside_powers_are_refused() -> None:
    masking = WidthMasking(1 / 4, "largest")
    with (
        quiet_lightning(),
        pytest.raises(ValueError, match="WidthMasking beside no reparametrization .*: units are ranked"),
    ):
        trainer(Powerpropagation(2.0), masking, max_epochs=1).fit(Wide(), examples())
    with quiet_lightning():
        trainer(Powerpropagation(2.0), WidthMasking(1 / 4), max_epochs=1).fit(Wide(), examples())


def test_what_nobody_holds_keeps_its_bits() -> None:
    torch.manual_seed(0)
    start = Wide().state_dict()
    _, model = run(1, data=federated([0.25] * 6))
    for name, dim in (("first.weight", 0), ("first.bias", 0), ("norm.weight", 0), ("norm.bias", 0), ("last.weight", 1)):
        held, rest = (part.narrow(dim, at, 8) for part in (model.state_dict()[name],) for at in (0, 8))
        assert torch.equal(rest, start[name].narrow(dim, 8, 8))
        assert not torch.equal(held, start[name].narrow(dim, 0, 8))


def test_full_capacities_are_unweighted_fedavg() -> None:
    one = run(3, [], aggregator=MaskedMean(), data=federated(None))[1].state_dict()
    other = run(3, [WidthMasking()], data=federated([1.0] * 6))[1].state_dict()
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize("buffers", ["average", "recalibrate"])
def test_a_size_is_evaluated_as_the_coming_round_would_send_it(buffers: Any) -> None:
    class Whole(pl.LightningDataModule):
        def val_dataloader(self) -> DataLoader[Any]:
            return examples()

    loaders = {name: DataLoader(part, batch_size=8) for name, part in clients().items()}
    data = FederatedDataModule(loaders, evaluation=Whole(), capacities=CapacityList(LEVELS))
    sweep = Evaluation(capacities=[1 / 16])
    loop, model = run(3, [WidthMasking(selection="rolling")], data=data, evaluation=sweep, buffers=buffers)
    metrics = loop.history[-1].metrics
    assert evaluate(model, data, "validation", {}) == {"val_loss": metrics["val_loss"]}
    assert all(torch.equal(loop.state.weights[name], weight) for name, weight in model.named_parameters())
    if buffers == "average":
        narrow = copy.deepcopy(model)
        units = [3, 4, 5, 6]
        narrow.first = nn.Linear(8, 4)
        narrow.first.load_state_dict({"weight": model.first.weight[units], "bias": model.first.bias[units]})
        narrow.norm = nn.BatchNorm1d(4)
        state = model.norm.state_dict()
        narrow.norm.load_state_dict({name: v[units] if v.ndim else v for name, v in state.items()})
        narrow.last = nn.Linear(4, 3)
        narrow.last.load_state_dict({"weight": model.last.weight[:, units], "bias": model.last.bias})
        found = evaluate(narrow, data, "validation", {})["val_loss"]
        assert found == pytest.approx(metrics["val_loss@0.0625"], abs=1e-6)


@pytest.mark.parametrize("selection", ["rolling", "random", "largest"])
def test_a_resumed_run_ends_like_an_uninterrupted_one(selection: Any, tmp_path: Any) -> None:
    whole, expected = run(5, [WidthMasking(selection=selection)], per_round=4, default_root_dir=tmp_path / "whole")
    run(3, [WidthMasking(selection=selection)], per_round=4, default_root_dir=tmp_path / "cut")
    loop, model = run(
        5,
        [WidthMasking(selection=selection)],
        per_round=4,
        default_root_dir=tmp_path / "cut",
        fit={"ckpt_path": "last"},
    )
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in expected.state_dict().items())
    assert [row.bytes_down for row in loop.history] == [row.bytes_down for row in whole.history]


def test_a_finished_run_that_is_resumed_returns_the_submodel_that_it_ended_with(tmp_path: Any) -> None:
    def once(**fit: Any) -> Any:
        rolling = WidthMasking(0.25, selection="rolling")
        return run(2, [rolling], data=federated(None), per_round=2, default_root_dir=tmp_path, fit=fit)[1].state_dict()

    expected = once()
    found = once(ckpt_path="last")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_checkpoint_of_the_server_holds_the_whole_model(tmp_path: Any) -> None:
    _, model = run(2, default_root_dir=tmp_path)
    plain = load_folded(tmp_path / "checkpoints" / "last.ckpt", Wide())
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), plain.parameters(), strict=True))


def test_an_image_classifier_with_the_shape_of_its_images() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(16, 1, 8, 8, generator=generator), torch.arange(16) % 10
    data = FederatedDataModule({name: DataLoader(TensorDataset(x, y), batch_size=8) for name in "ab"})
    model = ImageClassifier(DigitsCNN(), image_shape=(1, 8, 8))
    loop = FederatedLoop(1, 2, [WidthMasking(0.25)], evaluation=QUIET, console=False)
    (_, row) = loop.fit(model, data)
    # 9,802 of 38,282 parameters, whose values code to a little less; no positions, which the server knows
    assert 0.2 < row.bytes_up / row.dense_bytes_up < 9802 / 38282


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity": 0.0}, r"expected a capacity in \(0, 1\], got 0.0 for WidthMasking"),
        ({"selection": "first"}, "expected selection to be one of 'static', 'rolling', .*, got 'first'"),
        ({"norm": "max"}, "expected norm to be 'l2' or 'mean', got 'max'"),
        ({"refresh_every": 0}, "expected a period of at least 1, got refresh_every=0"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WidthMasking(**options)


def test_a_module_without_an_example_is_refused() -> None:
    message = "expected an example_input_array of Net to find its channels with, got none: set it in its __init__"
    with pytest.raises(ValueError, match=message):
        trainer(WidthMasking(0.5), max_epochs=1).fit(Net(), examples(), examples())
    with pytest.raises(ValueError, match=message):
        FederatedLoop(1, 1, [WidthMasking()], evaluation=QUIET, console=False).fit(Net(), federated())


def test_another_module_than_the_one_that_was_narrowed_is_refused() -> None:
    class Wider(Wide):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(8, 20), nn.BatchNorm1d(20), nn.Linear(20, 3)

    runner = trainer(WidthMasking(0.5), max_epochs=1)
    with quiet_lightning():
        runner.fit(Wide(), examples(), examples())
        with pytest.raises(ValueError, match="expected the module that WidthMasking narrowed last, got Wider"):
            runner.validate(Wider(), examples(), verbose=False)


def test_a_changed_upload_before_the_delta_is_refused() -> None:
    class Cut(TopKAfterTraining):
        def upload_rule(self, *args: Any) -> None:
            return None

    with pytest.raises(TooFewClientsError, match="put callbacks that change the upload after WidthMasking"):
        run(1, [Cut(ConstantSchedule(0.5)), WidthMasking()])


def test_an_update_is_a_change_on_the_units_alone() -> None:
    class Sent(SparsityCallback):
        updates: list[SparseUpdate] = []

        def on_client_upload(self, trainer: Any, pl_module: Any, update: SparseUpdate) -> None:
            Sent.updates.append(update)

    run(1, [WidthMasking(), Sent()], data=federated([0.25] * 6), per_round=1)
    (update,) = Sent.updates
    assert (update.kind, update.absent) == ("delta", "unheld")
    assert update.num_values == 8 * 8 + 8 + 2 * 8 + 3 * 8 + 3
