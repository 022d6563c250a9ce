"""FedDIP's masks within masks: what a client of a smaller capacity holds, and what the server makes of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_fedsparse import FederatedLoop
from lightning_fedsparse.callbacks import DynamicPruning, SparsityCallback, feddip
from lightning_fedsparse.callbacks.dynamic_pruning import candidate_masks, masks_within
from lightning_fedsparse.clients import Client
from lightning_fedsparse.schedules import ConstantSchedule
from lightning_fedsparse.server import ServerState
from lightning_fedsparse.update import SparseUpdate
from lightning_fedsparse.wire import Wire
from tests.test_loop import QUIET, Net, clients, loaders

PRUNED = ("first.weight", "last.weight")
SIZE = 8 * 16 + 16 * 3
CAPACITIES = {"c0": 0.1, "c1": 1.0, "c2": 0.4, "c3": 0.75, "c4": 0.1, "c5": 0.4}


def test_masks_within_masks() -> None:
    weights = {"a": torch.tensor([9.0, -3.0, 0.0, 1.0]), "b": torch.tensor([[2.0, -4.0]])}
    masks = {"a": torch.tensor([False, True, True, True]), "b": torch.tensor([[True, True]])}
    found = masks_within(weights, masks, 2)
    assert found["a"].tolist() == [False, True, False, False]
    assert found["b"].tolist() == [[False, True]]
    assert all(torch.equal(masks_within(weights, masks, 5)[name], masks[name]) for name in masks)


@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.5, -0.5, 2.0, 1e-42]), st.booleans()), min_size=1), st.integers(0, 99)
)
def test_they_are_inside_and_exact(entries: list[tuple[float, bool]], count: int) -> None:
    weights = {"w": torch.tensor([weight for weight, _ in entries])}
    masks = {"w": torch.tensor([kept for _, kept in entries])}
    inside = masks_within(weights, masks, count)["w"]
    assert not bool((inside & ~masks["w"]).any())
    assert int(inside.sum()) == min(count, int(masks["w"].sum()))
    if bool(inside.any()) and bool((masks["w"] & ~inside).any()):
        assert float(weights["w"][inside].abs().min()) >= float(weights["w"][masks["w"] & ~inside].abs().max()) - 1e-38


def test_no_room_for_candidates() -> None:
    weights, masks = {"w": torch.tensor([1.0, 2.0, 3.0])}, {"w": torch.tensor([True, False, False])}
    assert candidate_masks(weights, masks, 0.34, 0)["w"].tolist() == [False, False, False]


class Spy(SparsityCallback):
    """What every client of the last round was sent and sent."""

    def __init__(self) -> None:
        self.broadcasts: dict[str, SparseUpdate] = {}
        self.uploads: list[SparseUpdate] = []
        self.before: dict[str, Any] = {}

    def client_broadcast(self, state: ServerState, client: Client, broadcast: SparseUpdate) -> SparseUpdate:
        self.broadcasts[client.id] = broadcast
        self.before = {name: weight.clone() for name, weight in state.weights.items()}
        self.uploads = []
        return broadcast

    def on_server_receive(self, state: ServerState, server_round: Any, update: SparseUpdate) -> None:
        self.uploads.append(update)

    def __deepcopy__(self, memo: Any) -> Spy:
        return Spy()


def federate(rounds: int = 3, per_round: int = 6, capacities: Any = CAPACITIES, **options: Any) -> Any:
    torch.manual_seed(0)
    model, spy = Net(), Spy()
    method = feddip(sparsity=0.5, initial_sparsity=0.5, reconfigure_every=options.pop("every", 2))
    loop = FederatedLoop(rounds, per_round, [*method, spy], evaluation=QUIET, console=False, **options)
    loop.fit(model, loaders(clients(), capacities))
    assert not any(record.failures for record in loop.history)
    return loop, model, spy


def test_every_client_holds_the_largest_of_the_mask_that_it_can() -> None:
    loop, _, spy = federate()
    for client, broadcast in spy.broadcasts.items():
        kept = {name: broadcast.masks[name] for name in PRUNED}
        count = sum(int(mask.sum()) for mask in kept.values())
        assert count == min(round(CAPACITIES[client] * SIZE), SIZE // 2)
        assert all(not bool((kept[name] & ~spy.broadcasts["c1"].masks[name]).any()) for name in PRUNED)
    small = spy.broadcasts["c0"].masks
    inside = torch.cat([spy.before[name][small[name]].abs() for name in PRUNED])
    outside = torch.cat([spy.before[name][~small[name]].abs() for name in PRUNED])
    assert float(inside.min()) >= float(outside.max())
    # clients of one size get one payload
    assert spy.broadcasts["c0"] is spy.broadcasts["c4"]
    assert loop.history[-1].clients["c0"].down.total < 0.7 * loop.history[-1].clients["c1"].down.total


def test_weights_that_nobody_holds_keep_their_bits() -> None:
    _, model, spy = federate(rounds=2, per_round=2, capacities=dict.fromkeys(CAPACITIES, 0.1), every=10)
    after = model.state_dict()
    held = {name: torch.stack([update.masks[name] for update in spy.uploads]).any(0) for name in PRUNED}
    for name in PRUNED:
        unheld = ~held[name] & (spy.before[name] != 0)
        assert bool(unheld.any())
        assert torch.equal(after[name][unheld], spy.before[name][unheld])
    first = held["first.weight"]
    assert not torch.equal(after["first.weight"][first], spy.before["first.weight"][first])


def test_submodels_are_evaluated_at_their_size() -> None:
    loop, model, _ = federate()
    whole = {name: model.get_parameter(name).detach().clone() for name in PRUNED}
    loop.load_submodel(model, 0.1)
    assert sum(int(model.get_parameter(name).count_nonzero()) for name in PRUNED) == round(0.1 * SIZE)
    loop.load_submodel(model, 0.9)
    assert all(torch.equal(model.get_parameter(name), whole[name]) for name in PRUNED)


def test_a_resumed_run_ends_like_an_uninterrupted_one(tmp_path: Any) -> None:
    class Stop(SparsityCallback):
        at: int | None = None

        def on_server_round_end(self, state: ServerState, server_round: Any) -> ServerState:
            if server_round.index == self.at:
                raise RuntimeError("power cut")
            return state

    def run(*, folder: str, ckpt_path: str | None = None, at: int | None = None) -> Any:
        torch.manual_seed(0)
        model = Net()
        method = feddip(sparsity=0.7, initial_sparsity=0.5, reconfigure_every=2, residual="keep")
        stop = Stop()
        stop.at = at
        loop = FederatedLoop(6, 3, [*method, stop], evaluation=QUIET, console=False, default_root_dir=tmp_path / folder)
        loop.fit(model, loaders(clients(), CAPACITIES), ckpt_path=ckpt_path)
        return loop, model

    whole, expected = run(folder="whole")
    with pytest.raises(RuntimeError, match="power cut"):
        run(folder="cut", at=3)
    resumed, model = run(folder="cut", ckpt_path="last")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in expected.state_dict().items())
    assert [row.bytes_up for row in resumed.history] == [row.bytes_up for row in whole.history]
    assert [row.bytes_down for row in resumed.history] == [row.bytes_down for row in whole.history]


def test_rounded_uploads_mean_the_same() -> None:
    _, model, _ = federate(wire=Wire(uploads="bfloat16"))
    _, exact, _ = federate()
    for name in PRUNED:
        difference = float((model.get_parameter(name) - exact.get_parameter(name)).detach().norm())
        assert 0 < difference < 0.1 * float(exact.get_parameter(name).detach().norm())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"upload": "dense", "regrow": "nested"}, "where clients have capacities, got dense uploads"),
        ({"regrow": "dense"}, "where clients have capacities, got dense uploads"),
        ({"erk_positions": "random_per_client"}, "capacities, got erk_positions='random_per_client'"),
    ],
)
def test_dense_exchange_and_capacities_are_refused(options: Any, message: str) -> None:
    loop = FederatedLoop(2, 2, [DynamicPruning(ConstantSchedule(0.5), **options)], evaluation=QUIET, console=False)
    with pytest.raises(ValueError, match=message):
        loop.fit(Net(), loaders(clients(), CAPACITIES))


def test_a_capacity_that_holds_nothing_is_refused_before_the_first_round() -> None:
    loop = FederatedLoop(3, 1, feddip(), evaluation=QUIET, console=False)
    wanted = f"expected a capacity that holds at least one of {SIZE} weights, got 0.0001"
    with pytest.raises(ValueError, match=f"{wanted} for client 'c5'"):
        loop.fit(Net(), loaders(clients(), CAPACITIES | {"c5": 1e-4}))
    assert not loop.history
    method = DynamicPruning(ConstantSchedule(0.5))
    FederatedLoop(1, 1, [method], evaluation=QUIET, console=False).fit(Net(), loaders(clients()))
    with pytest.raises(ValueError, match=f"{wanted} to evaluate at"):
        method.to_effective_(dict(Net().named_parameters()), 1e-4)


class Masks(SparsityCallback):
    """After each round: the masks, and whether uploads held more than the round's."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.candidates: list[bool] = []

    def on_server_receive(self, state: ServerState, server_round: Any, update: SparseUpdate) -> None:
        pairs = [(update.masks[name], state.masks[name]) for name in PRUNED]
        beyond = [sent & ~mask for sent, mask in pairs if sent is not None and mask is not None]
        self.candidates[server_round.index :] = [any(bool(more.any()) for more in beyond)]

    def on_server_round_end(self, state: ServerState, server_round: Any) -> ServerState:
        self.ids.append(state.masks.id)
        return state

    def __deepcopy__(self, memo: Any) -> Masks:
        return Masks()


def masks_of_rounds(rounds: int, **options: Any) -> Masks:
    torch.manual_seed(0)
    masks = Masks()
    callbacks = feddip(sparsity=0.8, initial_sparsity=0.3, max_candidates=1.0, **options)
    loop = FederatedLoop(rounds, 6, [*callbacks, masks], {"max_epochs": 3}, evaluation=QUIET, console=False)
    loop.fit(Net(), loaders(clients()))
    return masks


def test_candidates_are_sent_in_the_round_that_ends_with_new_masks() -> None:
    # the released code's masks come at the end of rounds 0, R, 2R...: at the end of round 0 there was none to be outside of
    found = masks_of_rounds(7, reconfigure_every=3, erk_positions="random_per_client")
    moved = [index for index in range(1, 7) if found.ids[index] != found.ids[index - 1]]
    assert moved == [3, 6]
    assert [index for index, more in enumerate(found.candidates) if more] == [3, 6]
    found = masks_of_rounds(7, reconfigure_every=3)
    assert [index for index in range(1, 7) if found.ids[index] != found.ids[index - 1]] == [2, 5]
    assert [index for index, more in enumerate(found.candidates) if more] == [2, 5]


def test_random_first_masks_stop_moving_at_the_end_too() -> None:
    found = masks_of_rounds(8, reconfigure_every=1, end=0.25, erk_positions="random_per_client", regrow="dense")
    moved = [index for index in range(1, 8) if found.ids[index] != found.ids[index - 1]]
    assert moved == [1, 2]
