"""Links, and the accounts of a round, through the loop."""

from dataclasses import replace

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_fedsparse import FederatedLoop
from lightning_fedsparse.callbacks import (
    feddip,
)
from lightning_fedsparse.client import ClientWorker
from lightning_fedsparse.payload import decode, encode
from lightning_fedsparse.records import read_history
from lightning_fedsparse.wire import Link, Wire
from tests.test_loop import QUIET, Net, clients, loaders


def run(rounds=1, callbacks=None, *, model=None, **arguments):
    torch.manual_seed(0)
    model = model or Net()
    loop = FederatedLoop(rounds, 4, callbacks, {"max_epochs": 2}, seed=5, evaluation=QUIET, console=False, **arguments)
    loop.fit(model, loaders(clients()))
    return loop, model.state_dict()


# links


def test_seconds_by_eye():
    # 1 MB is 8 megabits: 4 s up at 2 Mbit/s, 1 s down at 8, and 0.5 s twice
    assert Link(up_mbps=2, down_mbps=8, latency_ms=500).seconds(bytes_down=10**6, bytes_up=10**6) == pytest.approx(6.0)


def test_a_link_that_is_slow_one_way_only():
    assert Link(up_mbps=0.1).seconds(bytes_down=10**9, bytes_up=12_500) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"up_mbps": 0, "down_mbps": 1}, "expected a bandwidth up_mbps above 0 megabits per second, got 0"),
        ({"up_mbps": 1, "down_mbps": -2.0}, "expected a bandwidth down_mbps above 0 megabits per second, got -2.0"),
        ({"up_mbps": float("nan"), "down_mbps": 1}, "up_mbps above 0 megabits per second, got nan"),
        ({"up_mbps": 1, "down_mbps": 1, "latency_ms": -1}, "expected latency_ms of at least 0, got -1"),
    ],
)
def test_links_that_can_not_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        Link(**arguments)


def test_bytes_become_seconds_per_client_and_the_slowest_counts():
    slow = Link(up_mbps=0.1, down_mbps=0.1)
    loop, _ = run(2, wire=Wire(link=Link(up_mbps=1, down_mbps=10, latency_ms=20), links={"c0": slow, "c1": slow}))
    assert loop.history[0].transfer_seconds is None
    for record in loop.history[1:]:
        for name, client in record.clients.items():
            expected = 0.04 + 8 * (client.down.total / 10e6 + client.up.total / 1e6)
            if name in ("c0", "c1"):
                expected = 8 * (client.down.total + client.up.total) / 0.1e6
            assert client.transfer_seconds == pytest.approx(expected)
        assert record.transfer_seconds == max(client.transfer_seconds for client in record.clients.values())


def test_links_are_of_clients_that_there_are_and_of_all():
    fast = Link(up_mbps=1, down_mbps=1)
    with pytest.raises(ValueError, match="expected links of clients that there are, got one of 'phone'"):
        run(wire=Wire(link=fast, links={"phone": fast}))
    with pytest.raises(
        ValueError, match="expected a link for every client, got none for 'c1': set link for all others"
    ):
        run(wire=Wire(links={"c0": fast}))


# accounts


def test_every_byte_is_accounted_for(tmp_path):
    logger = CSVLogger(tmp_path / "logs", name="", version="")
    callbacks = feddip(sparsity=0.8, initial_sparsity=0.4, reconfigure_every=2)
    loop, _ = run(5, callbacks, default_root_dir=tmp_path / "run", logger=logger)
    for record in loop.history[1:]:
        assert len(record.clients) == record.clients_sampled == 4
        for total, traffic, parts, dense in (
            (
                record.bytes_down,
                record.traffic_down,
                [c.down for c in record.clients.values()],
                record.dense_bytes_down,
            ),
            (record.bytes_up, record.traffic_up, [c.up for c in record.clients.values()], record.dense_bytes_up),
        ):
            assert total == traffic.total == traffic.positions + traffic.values + traffic.header
            assert traffic.dense == dense
            for name in ("total", "positions", "values", "header", "dense", "bound"):
                assert getattr(traffic, name) == sum(getattr(part, name) for part in parts)
            for coding in ("dense", "known", "changes", "gaps", "packed_bitmap", "bitmap"):
                assert traffic.codings.get(coding, 0) == sum(part.codings.get(coding, 0) for part in parts)
            assert sum(traffic.codings.values()) == 4 * len(loop.state.weights)
            assert traffic.values <= traffic.bound
    # nobody holds the first mask; in the second round those who took part in the first know it, and send no positions
    first, second = loop.history[1:3]
    assert first.traffic_down.positions > 0
    assert first.traffic_up.positions == 0
    assert first.traffic_up.codings.keys() == {"dense", "known"}
    assert second.traffic_down.positions < first.traffic_down.positions
    assert read_history(tmp_path / "run" / "history.jsonl") == loop.history
    assert loop.history[1].scalars["bound_bytes_up"] == first.traffic_up.bound
    logger.save()
    assert "positions_bytes_down" in (tmp_path / "logs" / "metrics.csv").read_text()


def test_a_refused_upload_is_counted_and_believed_nothing(monkeypatch):
    original = ClientWorker.run

    def cut(self, job):
        result = original(self, job)
        return replace(result, payload=result.payload[:50])

    run_whole, failed = ClientWorker.run, []
    monkeypatch.setattr(
        ClientWorker, "run", lambda self, job: cut(self, job) if job.client_id == "c3" else original(self, job)
    )
    loop, _ = run(3)
    failed = [record.clients["c3"].up for record in loop.history if "c3" in record.failures]
    assert failed
    assert all((up.total, up.header, up.values, up.bound) == (50, 50, 0, 0) for up in failed)
    assert run_whole is original


def damaged(damage):
    return lambda payload, schema, reference: damage(payload)


def changed(**parts):
    def change(payload, schema, reference):
        update = decode(payload, schema=schema, reference=reference)
        return encode(replace(update, **{name: part(update) for name, part in parts.items()}))

    return change


def first_of(update):
    return next(name for name, mask in update.masks.items() if mask is not None)


def dense_first(update):
    return {**update.values, first_of(update): torch.ones(update.masks[first_of(update)].shape)}


def but_one(tensors):
    return dict(list(tensors.items())[1:])


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (damaged(lambda payload: b""), "0 bytes, fewer than its frame"),
        (damaged(lambda payload: payload[:-1]), "checksum"),
        (damaged(lambda payload: payload + b"\0"), "checksum"),
        (damaged(lambda payload: payload[:40] + bytes([payload[40] ^ 1]) + payload[41:]), "checksum"),
        (damaged(lambda payload: b"PK" + payload), "not a payload"),
        (damaged(lambda payload: payload[:4] + b"\x09" + payload[5:]), "version 9 is unknown"),
        (changed(values=lambda u: {name: value * torch.nan for name, value in u.values.items()}), "not finite"),
        (changed(values=lambda u: {name: value + torch.inf for name, value in u.values.items()}), "not finite"),
        (changed(values=lambda u: but_one(u.values), masks=lambda u: but_one(u.masks)), "parameters of the model"),
        (changed(values=dense_first, masks=lambda u: {**u.masks, first_of(u): None}), "outside the support"),
        (changed(num_examples=lambda u: 0), "at least 1 example"),
        (changed(num_examples=lambda u: 10**15), "num_examples is 1000000000000000, more than the limit"),
        (changed(kind=lambda u: "delta"), "expected 'weights'"),
        (changed(buffers=lambda u: {"x": torch.ones(2)}), "expected the buffers of the model"),
    ],
)
def test_a_hostile_upload_costs_the_round_one_client(monkeypatch, spoil, reason):
    original, spoilt = ClientWorker.run, []

    def hostile(self, job):
        result = original(self, job)
        if spoilt:
            return result
        spoilt.append(job.client_id)
        return replace(result, payload=spoil(result.payload, self.schema, list(self._masks.values())[-1]))

    monkeypatch.setattr(ClientWorker, "run", hostile)
    loop, state = run(1, feddip(sparsity=0.7, initial_sparsity=0.3))
    record = loop.history[-1]
    assert list(record.failures) == spoilt
    assert reason in record.failures[spoilt[0]].sentence
    assert (record.clients_failed, record.clients_returned) == (1, 3)
    assert all(tensor.isfinite().all() for tensor in state.values())


def test_closing_summary(capsys):
    torch.manual_seed(0)
    loop = FederatedLoop(2, 4, wire=Wire(uploads="int8", link=Link(1, 1, 1000)), evaluation=QUIET)
    loop.fit(Net(), loaders(clients()))
    summary = capsys.readouterr().out.split("\n\n")[1]
    assert "of these" in summary
    assert "x the entropy bound of the masks with raw values" in summary
    assert "transfer" in summary
    assert "4.0 s on the clients' links, the slowest of each round" in summary


# tied parameters


class Tied(Net):
    """Two layers that share one weight."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.norm = nn.Linear(8, 8, bias=False)
        self.norm.weight = self.first.weight
        self.last = nn.Linear(8, 3)


def test_tied_parameters_travel_and_count_once():
    loop, state = run(2, model=Tied())
    assert torch.equal(state["first.weight"], state["norm.weight"])
    assert list(loop.state.weights) == ["first.weight", "first.bias", "last.weight", "last.bias"]
    model_bytes = 4 * (64 + 8 + 3 * 8 + 3)
    record = loop.history[1]
    assert record.dense_bytes_up == 4 * model_bytes
    assert record.traffic_up.bound == 4 * model_bytes
