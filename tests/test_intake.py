"""Which uploads count: what waits, what goes on at once, what is not needed."""

import torch

from lightning_fedsparse.faults import FaultPolicy
from lightning_fedsparse.intake import Intake, Upload, UploadReader
from lightning_fedsparse.payload import encode
from lightning_fedsparse.rounds import UploadRule
from lightning_fedsparse.server import ServerState
from lightning_fedsparse.update import MaskSet, SparseUpdate
from lightning_fedsparse.wire import Wire

WEIGHTS = {"w": torch.zeros(3)}
DENSE = MaskSet.of({"w": None})
READER = UploadReader(ServerState(WEIGHTS, {}, DENSE), Wire(), UploadRule())


def upload(client_id, seconds=1.0):
    update = SparseUpdate({"w": torch.ones(3)}, DENSE, num_examples=1)
    return Upload(client_id, encode(update), DENSE, {}, seconds, update)


def given(intake, *uploads):
    """Who is merged on each arrival, and who when all are there."""
    steps = [[one.client_id for one in intake.add(each)] for each in uploads]
    return [*steps, [one.client_id for one in intake.settle()]]


def test_by_default_every_upload_goes_on_at_once_and_nothing_waits():
    intake = Intake(FaultPolicy(), 2, READER, None)
    assert given(intake, upload("a"), upload("b"), upload("c")) == [["a"], ["b"], [], []]
    assert intake.enough
    assert intake.unused == ["c"]


def test_all_but_one_of_those_needed_wait_encoded():
    intake = Intake(FaultPolicy(min_clients=3), 4, READER, None)
    first, second = intake.add(upload("a")), intake.add(upload("b"))
    assert [*first, *second] == []
    assert [one.update for one in intake._waiting] == [None, None]
    assert (intake.enough, intake.missing) == (False, 2)
    merged = list(intake.add(upload("c")))
    assert [one.client_id for one in merged] == ["a", "b", "c"]
    assert torch.equal(READER.read(merged[0]).values["w"], torch.ones(3))
    assert intake._waiting == []


def test_too_few_stay_for_the_next_try_and_are_unused_at_the_end():
    intake = Intake(FaultPolicy(min_clients=3), 4, READER, None)
    assert given(intake, upload("a"), upload("b")) == [[], [], []]
    assert given(intake, upload("c")) == [["a", "b", "c"], []]
    other = Intake(FaultPolicy(min_clients=3), 4, READER, None)
    given(other, upload("a"))
    other.close()
    assert (other.enough, other.unused) == (False, ["a"])


def test_the_first_to_come_are_given_in_the_order_asked():
    intake = Intake(FaultPolicy(accept="first"), 2, READER, None)
    assert given(intake, upload("a", 3.0), upload("b", 9.0), upload("c", 1.0)) == [[], [], [], ["a", "c"]]
    assert intake.unused == ["b"]
