"""What each client is sent: values on masks that it holds, changes of masks that it held, else the masks."""

import pytest
import torch

from lightning_fedsparse import broadcasting
from lightning_fedsparse.broadcasting import Broadcaster
from lightning_fedsparse.clients import Client
from lightning_fedsparse.payload import decode
from lightning_fedsparse.server import ServerState
from lightning_fedsparse.update import MaskSet

SIZE = 20_000


def client(number):
    return Client(f"c{number}", 10, train=list)


@pytest.fixture
def state():
    weights = {"w": 0.02 * torch.randn(SIZE), "bias": torch.randn(3)}
    return ServerState(weights, {"steps": torch.tensor(7)}, MaskSet.of(dict.fromkeys(weights)))


def sent(broadcaster, state, *numbers):
    clients = [client(number) for number in numbers]
    broadcaster.start(state, clients, [])
    return [broadcaster.send(one) for one in clients]


def move_masks(state, seed):
    """Drop a few of the kept weights, and bring as many others back; 5 % of the first mask are kept."""
    generator = torch.Generator().manual_seed(seed)
    mask = state.masks["w"]
    if mask is None:
        mask = torch.rand(SIZE, generator=generator) < 0.05
    else:
        flips = torch.rand(SIZE, generator=generator)
        mask = torch.where(mask, flips > 0.04, flips < 0.002)
    state.set_masks({"w": mask})


def codings(broadcast):
    return dict(broadcast.traffic.codings)


def test_a_dense_first_round_is_coded(state):
    (broadcast,) = sent(Broadcaster(), state, 0)
    assert codings(broadcast) == {"dense": 2}
    assert broadcast.traffic.dense == 4 * (SIZE + 3) + 8
    assert 0.8 < broadcast.traffic.total / broadcast.traffic.dense < 0.86


def test_a_client_gets_the_masks_once_then_their_changes_and_else_values_alone(state):
    broadcaster = Broadcaster()
    move_masks(state, 0)
    (first,) = sent(broadcaster, state, 0)
    assert codings(first) == {"gaps": 1, "dense": 1}
    (again,) = sent(broadcaster, state, 0)
    assert codings(again) == {"known": 1, "dense": 1}
    assert again.traffic.positions == 0
    move_masks(state, 1)
    (moved,) = sent(broadcaster, state, 0)
    assert codings(moved) == {"changes": 1, "dense": 1}
    assert 0 < moved.traffic.positions < first.traffic.positions / 3


def test_who_missed_rounds_gets_the_changes_from_what_it_holds_or_all_of_the_masks(state):
    broadcaster = Broadcaster()
    move_masks(state, 0)
    sent(broadcaster, state, 0, 1)
    held = {"c1": state.masks}
    for seed in (1, 2):
        move_masks(state, seed)
        sent(broadcaster, state, 0)
    up_to_date, behind, newcomer = sent(broadcaster, state, 0, 1, 2)
    assert [broadcast.reference_id for broadcast in (up_to_date, behind, newcomer)] == [
        state.masks.id, held["c1"].id, None
    ]  # fmt: skip
    assert codings(up_to_date)["known"] == codings(behind)["changes"] == codings(newcomer)["gaps"] == 1
    assert up_to_date.traffic.positions == 0 < behind.traffic.positions < newcomer.traffic.positions
    update = decode(behind.payload, schema=state.schema, reference=held["c1"])
    assert update.masks.id == state.masks.id
    assert torch.equal(update.values["w"], state.weights["w"][state.masks["w"]])

    for seed in range(3, 3 + broadcaster.kept_versions):  # more than the server remembers
        move_masks(state, seed)
        sent(broadcaster, state, 0)
    (behind,) = sent(broadcaster, state, 1)
    assert behind.reference_id is None
    assert codings(behind) == {"gaps": 1, "dense": 1}
    assert len(broadcaster.versions) == broadcaster.kept_versions


def test_of_whom_nothing_is_known_gets_full_positions(state):
    broadcaster = Broadcaster()
    move_masks(state, 0)
    sent(broadcaster, state, 0, 1)
    broadcaster.forget("c0")
    broadcaster.forget("c7")  # who was never sent anything
    unknown, known = sent(broadcaster, state, 0, 1)
    assert (unknown.reference_id, known.reference_id) == (None, state.masks.id)


def test_what_many_clients_get_is_coded_once(state, monkeypatch):
    calls = []
    original = broadcasting.Wire.encode_broadcast
    monkeypatch.setattr(
        broadcasting.Wire, "encode_broadcast", lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs)
    )
    broadcaster = Broadcaster()
    move_masks(state, 0)
    sent(broadcaster, state, *range(10))
    assert len(calls) == 1
    move_masks(state, 1)
    broadcasts = sent(broadcaster, state, *range(8), 10, 11)  # eight hold the masks before, two hold nothing
    assert len(calls) == 3
    assert len({id(broadcast.payload) for broadcast in broadcasts}) == 2


def test_saved_and_loaded_it_sends_the_same(state):
    broadcaster, other = Broadcaster(), Broadcaster()
    move_masks(state, 0)
    sent(broadcaster, state, 0)
    other.load_state_dict(broadcaster.state_dict())
    move_masks(state, 1)
    assert [b.payload for b in sent(broadcaster, state, 0, 1)] == [b.payload for b in sent(other, state, 0, 1)]
