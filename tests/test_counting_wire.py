"""A wire that encodes nothing: the same federation, and bytes that are counted."""

import math
import pickle
import re
from dataclasses import replace

import pytest
import torch

from lightning_fedsparse import FederatedLoop, SparseUpdate
from lightning_fedsparse.bounded_reading import PayloadError
from lightning_fedsparse.callbacks import CompressionMemory, feddip, fiarse, sparsyfed
from lightning_fedsparse.counting_wire import CountingWire
from lightning_fedsparse.executors import LocalExecutor, ProcessExecutor
from lightning_fedsparse.schema import Schema
from lightning_fedsparse.testing_faults import Fault, FaultyExecutor
from lightning_fedsparse.update import MaskSet
from lightning_fedsparse.wire import Link, Uncoded, Wire
from tests.test_loop import QUIET, Net, clients, loaders

DENSE = MaskSet.of({"w": None})


def run(callbacks=None, **arguments):
    torch.manual_seed(0)
    model = Net()
    loop = FederatedLoop(
        3, 4, callbacks, {"max_epochs": 1}, seed=5, evaluation=QUIET, **{"console": False, **arguments}
    )
    loop.fit(model, loaders(clients()))
    return loop.history, model.state_dict()


@pytest.mark.parametrize("method", [list, lambda: feddip(0.8), lambda: sparsyfed(0.8), lambda: fiarse(0.3)])
def test_the_result_is_that_of_encoded_updates_to_the_bit(method):
    history, weights = run(method(), wire=CountingWire(link=Link(up_mbps=1)))
    encoded, expected = run(method(), wire=Wire())
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    for record, other in zip(history, encoded, strict=True):
        assert (record.train_loss, record.sparsity, record.metrics) == (other.train_loss, other.sparsity, other.metrics)
        assert record.bytes_up == record.traffic_up.bound == other.traffic_up.bound
        assert record.bytes_down == other.traffic_down.bound
        assert record.dense_bytes_up == other.dense_bytes_up
    assert set(history[-1].traffic_up.codings) == set(history[-1].traffic_down.codings) == {"counted"}
    assert history[-1].transfer_seconds > 0


def test_count_is_its_short_name(capsys):
    history, _ = run(wire="count", console=True)
    assert re.search(r"encoded +nothing: these bytes are counted", capsys.readouterr().out)
    assert set(history[-1].traffic_up.codings) == {"counted"}
    with pytest.raises(TypeError, match="expected wire of type Wire, such as .*, got str"):
        run(wire="counted")


def test_workers_hand_over_the_same():
    history, weights = run(feddip(0.8), wire=CountingWire(), executor=ProcessExecutor(workers=2))
    alone, expected = run(feddip(0.8), wire=CountingWire())
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert [record.bytes_up for record in history] == [record.bytes_up for record in alone]


def test_it_pickles_as_it_is():
    values = {
        "w": torch.randn(2, 3).to(torch.bfloat16),
        "b": torch.ones(()),
        "s": torch.tensor([2.0], dtype=torch.float64),
    }
    masks = MaskSet.of({"w": None, "b": None, "s": torch.tensor([False, True])})
    update = SparseUpdate(values, masks, num_examples=7, buffers={"n": torch.tensor([3])}, metrics={"train_loss": 0.5})
    copy = pickle.loads(pickle.dumps(Uncoded(update))).update
    for name, value in {**values, **update.buffers}.items():
        again = {**copy.values, **copy.buffers}[name]
        assert torch.equal(again, value)
        assert (again.dtype, again.shape) == (value.dtype, value.shape)
    assert copy.masks.id == masks.id
    assert (copy.num_examples, copy.metrics) == (7, {"train_loss": 0.5})
    copy.values["w"].zero_()  # it is the receiver's


def test_masks_that_the_server_holds_do_not_travel():
    mask = torch.zeros(100_000, dtype=torch.bool).index_fill_(0, torch.arange(0, 100_000, 50), True)
    reference = MaskSet.of({"w": mask, "b": None})
    update = SparseUpdate({"w": torch.ones(2_000), "b": torch.ones(3)}, reference)
    schema = Schema.of({"w": torch.zeros(100_000), "b": torch.zeros(3)}, {})
    wire = CountingWire()
    message, read = wire.encode_upload(update, {}, schema=schema, reference=reference, seed=0)
    assert read is update
    assert len(pickle.dumps(message)) < 4 * 2_003 + 2_000
    found = wire.decode(pickle.loads(pickle.dumps(message)), schema=schema, reference=reference)
    assert found.masks is reference
    assert torch.equal(found.values["w"], update.values["w"])
    with pytest.raises(PayloadError, match="expected the masks that an update leans on, got none"):
        wire.decode(message, schema=schema, reference=None)
    others = replace(
        update, masks=MaskSet.of({"w": ~mask, "b": None}), values={"w": torch.ones(98_000), "b": torch.ones(3)}
    )
    message, _ = wire.encode_upload(others, {}, schema=schema, reference=reference, seed=0)
    found = wire.decode(pickle.loads(pickle.dumps(message)), schema=schema, reference=reference)
    assert (found.masks.id, found.masks["b"]) == (others.masks.id, None)
    assert torch.equal(found.masks["w"], ~mask)


@pytest.mark.parametrize("rounding", [{"uploads": "int8"}, {"broadcasts": "float16"}])
def test_rounding_is_for_wires_that_encode(rounding):
    with pytest.raises(ValueError, match="expected a wire that only counts to lose nothing, got uploads="):
        CountingWire(**rounding)


def test_methods_that_remember_what_a_wire_loses_have_nothing_to_remember():
    _, weights = run([*feddip(0.8), CompressionMemory()], wire=CountingWire())
    _, expected = run([*feddip(0.8), CompressionMemory()], wire=Wire())
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_what_comes_is_not_trusted_more_than_bytes():
    schema = Schema.of({"w": torch.zeros(2)}, {})
    with pytest.raises(PayloadError, match="expected an update that was not encoded, got bytes"):
        CountingWire().decode(b"FSP", schema=schema, reference=DENSE)
    broken = Uncoded(SparseUpdate({"w": torch.tensor([1.0, float("nan")])}, DENSE))
    with pytest.raises(PayloadError, match="expected bytes, got Uncoded"):
        Wire().decode(broken, schema=schema, reference=DENSE)


@pytest.mark.parametrize(
    ("weight", "variance", "sentences"),
    [
        (1.0, 1.0, []),
        (math.nan, 1.0, ["'w' holds values that are not finite, 1 of 4"]),
        (math.inf, 1.0, ["'w' holds values that are not finite, 1 of 4"]),
        (1.0, math.nan, ["'var' holds values that are not finite, 1 of 2"]),
        (1.0, math.inf, []),
    ],
)
def test_what_is_not_finite_is_refused_as_where_it_is_encoded(weight, variance, sentences):
    weights = {"w": torch.tensor([[1.0, 2.0], [weight, 3.0]]).T}
    buffers = {"var": torch.tensor([variance, 1.0]), "steps": torch.tensor(3)}
    update = SparseUpdate(weights, DENSE, buffers=buffers)
    schema = Schema.of(weights, buffers)
    refused = []
    for wire in (CountingWire(), Wire()):
        message, _ = wire.encode_upload(update, {}, schema=schema, reference=DENSE, seed=0)
        try:
            wire.decode(message, schema=schema, reference=DENSE)
        except PayloadError as error:
            refused.append(str(error))
    assert refused == 2 * sentences


def test_a_fault_in_the_bytes_needs_bytes():
    executor = FaultyExecutor(LocalExecutor(), lambda index, client_id: Fault.CORRUPTED if client_id == "c1" else None)
    history, _ = run(wire=CountingWire(), executor=executor)
    failures = [record.failures["c1"] for record in history if "c1" in record.failures]
    assert failures
    assert all("expected a wire that encodes, for a fault in an upload" in failure.sentence for failure in failures)
