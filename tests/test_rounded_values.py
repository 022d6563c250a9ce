"""Values rounded on the wire, through the loop."""

from dataclasses import replace

import pytest
import torch

from lightning_fedsparse import FederatedLoop
from lightning_fedsparse.callbacks import (
    CompressionMemory,
    ImportanceMasking,
    Powerpropagation,
    SparsityCallback,
    feddip,
)
from lightning_fedsparse.client import ClientWorker
from lightning_fedsparse.payload import decode, encode
from lightning_fedsparse.wire import Link, Wire
from tests.test_loop import QUIET, Net, clients, loaders
from tests.test_wire import run

LOSSY = ["bfloat16", "float16", "int8", "int4"]


def test_lossless_by_default_to_the_bit():
    _, plain = run(2, feddip(sparsity=0.7))
    _, wired = run(2, feddip(sparsity=0.7), wire=Wire(link=Link(1, 1)))
    assert all(torch.equal(plain[name], wired[name]) for name in plain)


@pytest.mark.parametrize(
    ("value_type", "error"), [("bfloat16", 2**-7), ("float16", 2**-10), ("int8", 1 / 64), ("int4", 0.3)]
)
def test_rounded_uploads_change_the_mean_by_a_share_of_the_change(value_type, error):
    torch.manual_seed(0)
    before = Net().state_dict()
    exact_loop, exact = run()
    loop, rounded = run(wire=Wire(uploads=value_type))
    for name, tensor in exact.items():
        change = (tensor - before[name]).abs().max()
        assert (rounded[name] - tensor).abs().max() <= error * change, name
        assert torch.equal(rounded[name], tensor) == (
            name.startswith("norm.") and name not in ("norm.weight", "norm.bias")
        )
    assert loop.history[1].traffic_up.values < 0.75 * exact_loop.history[1].traffic_up.values
    assert loop.history[1].traffic_down == exact_loop.history[1].traffic_down


@pytest.mark.parametrize("value_type", LOSSY)
def test_rounded_broadcasts_are_the_same_for_all_and_the_server_stays_exact(value_type, monkeypatch):
    received = []
    original = ClientWorker._load

    def spy(self, job, broadcast):
        masks = original(self, job, broadcast)
        received.append({name: parameter.clone() for name, parameter in self.module.named_parameters()})
        return masks

    monkeypatch.setattr(ClientWorker, "_load", spy)
    torch.manual_seed(0)
    start = dict(Net().named_parameters())
    loop, _ = run(wire=Wire(broadcasts=value_type, uploads="float16"))
    assert all(torch.equal(one[name], received[0][name]) for one in received for name in one)
    assert not torch.equal(received[0]["first.weight"], start["first.weight"])
    assert loop.history[1].traffic_down.values < 0.75 * loop.history[1].traffic_down.bound


class Fixed(Net):
    """Learns nothing: what moves the global weights is the wire alone."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_rounding_the_broadcast_moves_no_weight_of_the_server_where_uploads_are_changes():
    model = Fixed()
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    _, after = run(2, model=model, wire=Wire(broadcasts="int4", uploads="int8"))
    for name in ("first.weight", "last.weight"):
        torch.testing.assert_close(after[name], start[name], rtol=0, atol=1e-6)


class Constant(SparsityCallback):
    """Every client 'learns' the same change, a fifth of what int4 can say beside the largest."""

    def on_client_round_end(self, trainer, pl_module, update):
        for name, parameter in pl_module.named_parameters():
            if name == "first.weight":
                step = torch.full_like(parameter, 3e-3)
                step[0, 0] = 0.1
                parameter.data += step
                update.values[name].add_(step.view(update.values[name].shape))
        return update


def test_the_rounding_error_stays_in_the_clients_memory_and_is_sent_later():
    torch.manual_seed(0)
    start = Net().state_dict()["first.weight"]
    rounds = 12

    def drift(*memory):
        torch.manual_seed(0)
        loop = FederatedLoop(
            rounds, 6, [Constant(), *memory], {"max_epochs": 1}, seed=5, evaluation=QUIET, console=False,
            wire=Wire(uploads="int4", block=None),
        )  # fmt: skip
        model = Fixed()
        loop.fit(model, loaders(clients()))
        return loop, (model.first.weight.detach() - start).flatten()[1:]

    loop, with_memory = drift(CompressionMemory())
    _, without = drift()
    # what a perfect wire would have moved, less what is still in the clients' memories
    memories = {name: next(iter(memory.values())) for name, memory in loop._run.federation.memories.items()}
    sizes = {name: len(part) for name, part in clients().items()}
    kept = sum(sizes[name] * memory["residual"]["first.weight"] for name, memory in memories.items())
    kept = kept / sum(sizes.values())
    torch.testing.assert_close(with_memory + kept.flatten()[1:], torch.full((127,), rounds * 3e-3), rtol=0, atol=2e-5)
    assert with_memory.std() < 0.7 * without.std()


@pytest.mark.parametrize("residual", ["drop", "keep"])
@pytest.mark.parametrize("regrow", ["candidates", "nested", "dense"])
def test_feddip_carries_rounded_values(residual, regrow):
    method = feddip(sparsity=0.7, initial_sparsity=0.3, reconfigure_every=2, residual=residual, regrow=regrow)
    loop, state = run(5, method, wire=Wire(uploads="int8", broadcasts="bfloat16"))
    assert all(record.clients_failed == 0 for record in loop.history)
    for name, mask in loop.state.masks.items():
        if mask is not None:
            assert (state[name][~mask] == 0).all()
            assert state[name].isfinite().all()


def test_an_upload_that_did_not_round_is_of_another_kind(monkeypatch):
    original = ClientWorker.run

    def exact(self, job):
        result = original(self, job)
        update = decode(result.payload, schema=self.schema, reference=list(self._masks.values())[-1])
        update.kind = "weights"
        return replace(result, payload=encode(update))

    monkeypatch.setattr(
        ClientWorker, "run", lambda self, job: exact(self, job) if job.client_id == "c3" else original(self, job)
    )
    loop, _ = run(3, wire=Wire(uploads="int8"))
    reasons = [record.failures["c3"].sentence for record in loop.history if "c3" in record.failures]
    assert reasons
    assert all("expected 'delta' with what is absent 'unchanged', got 'weights'" in reason for reason in reasons)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"uploads": "int3"}, "expected uploads to be one of .*, got 'int3'"),
        ({"broadcasts": "double"}, "expected broadcasts to be one of .*, got 'double'"),
        ({"block": 0}, "expected block to be at least 1, got 0"),
    ],
)
def test_wires_that_can_not_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        Wire(**arguments)


def test_methods_say_what_they_can_not_carry():
    with pytest.raises(
        ValueError,
        match=r"that ImportanceMasking can carry, got uploads='int8' and broadcasts='bfloat16': .* threshold",
    ):
        run(callbacks=[ImportanceMasking(0.5)], wire=Wire(uploads="int8", broadcasts="bfloat16"))
    run(callbacks=[ImportanceMasking(0.5)], wire=Wire(uploads="int8"))
    with pytest.raises(ValueError, match="that Powerpropagation can carry, .* zero can't return"):
        run(callbacks=[Powerpropagation()], wire=Wire(broadcasts="int4"))
    run(callbacks=[Powerpropagation()], wire=Wire(uploads="int4", broadcasts="bfloat16"))
