"""Clients' memories over whole federations: in files as in this process, to the bit, however the run was killed."""

import shutil
from dataclasses import replace

import pytest
import torch

from lightning_fedsparse import FederatedLoop
from lightning_fedsparse.callbacks import CompressionMemory, feddip
from lightning_fedsparse.callbacks.base import SparsityCallback
from lightning_fedsparse.checkpoint import load_checkpoint
from lightning_fedsparse.checkpointing import Checkpointing
from lightning_fedsparse.cli import main
from lightning_fedsparse.executors import ProcessExecutor
from lightning_fedsparse.memories import HeldMemories
from lightning_fedsparse.spilled_memories import SpilledMemories
from lightning_fedsparse.wire import Wire
from tests.test_loop import QUIET, Net, clients, loaders
from tests.test_spilled_memories import files, remember, spilled


class Kill(SparsityCallback):
    """Ends the run after so many uploads, as a signal would: between writes of clients and the checkpoint."""

    def __init__(self, uploads):
        super().__init__()
        self.left = uploads

    def on_server_receive(self, state, server_round, update):
        self.left -= 1
        if self.left == 0:
            raise RuntimeError("killed")


def federation(memories, folder, *, kill=-1, every=1, executor=None, checkpointing=None):
    torch.manual_seed(0)
    model = Net()
    callbacks = [*feddip(0.8, reconfigure_every=2), CompressionMemory(), Kill(kill)]
    loop = FederatedLoop(
        6, 3, callbacks, wire=Wire(uploads="int8"), buffers="local", evaluation=QUIET, seed=1, console=False,
        memories=memories, default_root_dir=folder, checkpointing=checkpointing or Checkpointing(every), executor=executor,
    )  # fmt: skip
    return loop, model


def outcome(loop, model):
    rows = [replace(record, seconds=0.0) for record in loop.history]
    return dict(model.state_dict()), dict(loop.memories), rows


def assert_same(found, expected):
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_same(found[key], value)
    else:
        assert found == expected


@pytest.fixture(scope="module")
def in_memory(tmp_path_factory):
    loop, model = federation(None, tmp_path_factory.mktemp("held"))
    loop.fit(model, loaders(clients()))
    outcomes = outcome(loop, model)
    assert any(memory["buffers"]["norm.num_batches_tracked"] > 6 for memory in outcomes[1].values())  # used again
    return dict(enumerate(outcomes))


@pytest.mark.parametrize(("uploads", "every"), [(2, 1), (4, 1), (6, 1), (7, 2), (14, 1), (14, 2), (18, 2)])
def test_spilled_is_in_memory_to_the_bit_however_it_was_killed(in_memory, tmp_path, uploads, every):
    loop, model = federation(SpilledMemories(), tmp_path, kill=uploads, every=every)
    with pytest.raises(RuntimeError, match="killed"):
        loop.fit(model, loaders(clients()))
    loop, model = federation(SpilledMemories(), tmp_path, every=every)
    loop.fit(model, loaders(clients()), ckpt_path="last")
    assert_same(dict(enumerate(outcome(loop, model))), in_memory)
    assert len(files(tmp_path / "memories")) == len(loop.memories)


def test_any_of_the_best_goes_on_as_it_was(in_memory, tmp_path):
    best = Checkpointing(monitor="train_loss", mode="max", save_top_k=2)  # the loss falls: early rounds stay
    loop, model = federation(SpilledMemories(), tmp_path / "run", checkpointing=best)
    loop.fit(model, loaders(clients()))
    assert len(files(tmp_path / "run" / "memories")) > len(loop.memories)
    kept = sorted((tmp_path / "run" / "checkpoints").glob("round=*.ckpt"))
    assert len(kept) == 2
    for checkpoint in kept:
        folder = shutil.copytree(tmp_path / "run", tmp_path / checkpoint.stem)
        loop, model = federation(SpilledMemories(), folder, checkpointing=best)
        loop.fit(model, loaders(clients()), ckpt_path=folder / "checkpoints" / checkpoint.name)
        assert_same(dict(enumerate(outcome(loop, model))), in_memory)


def test_uninterrupted_spilled_is_in_memory_to_the_bit(in_memory, tmp_path):
    loop, model = federation(SpilledMemories(tmp_path / "elsewhere"), None)
    loop.fit(model, loaders(clients()))
    assert_same(dict(enumerate(outcome(loop, model))), in_memory)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:client memories need more:UserWarning")
def test_workers_lose_and_keep_the_same(tmp_path):
    found = []
    for name, executor in (("one", None), ("two", ProcessExecutor(2))):
        loop, model = federation(SpilledMemories(quota_bytes=12_000), tmp_path / name, executor=executor)
        loop.fit(model, loaders(clients()))
        assert sum(len(record.evicted_memories) for record in loop.history) > 3
        found.append(dict(enumerate((*outcome(loop, model), list(loop.memories)))))
    assert_same(*found)


def test_a_checkpoint_refers_to_the_files(tmp_path):
    loop, model = federation(SpilledMemories(), tmp_path)
    loop.fit(model, loaders(clients()))
    content = load_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    assert content["memories"] == {}
    assert list(content["memory_files"]["files"]) == list(loop.memories)


@pytest.mark.parametrize("memories", [HeldMemories, SpilledMemories])
def test_a_checkpoint_asks_for_the_memories_once(memories, tmp_path, monkeypatch):
    asked = []
    original = memories.state_dict
    monkeypatch.setattr(memories, "state_dict", lambda self: asked.append(len(self)) or original(self))
    loop, model = federation(memories(), tmp_path)
    loop.fit(model, loaders(clients()))
    assert len(asked) == len(loop.history)
    assert asked[0] < asked[-1]


def test_a_run_may_go_on_with_files(in_memory, tmp_path):
    loop, model = federation(None, tmp_path, kill=8)
    with pytest.raises(RuntimeError, match="killed"):
        loop.fit(model, loaders(clients()))
    loop, model = federation(SpilledMemories(), tmp_path)
    loop.fit(model, loaders(clients()), ckpt_path="last")
    assert_same(dict(enumerate(outcome(loop, model))), in_memory)


def test_but_not_without_them_again(tmp_path):
    loop, model = federation(SpilledMemories(), tmp_path)
    loop.fit(model, loaders(clients()))
    loop, model = federation(None, tmp_path)
    with pytest.raises(
        ValueError, match="expected SpilledMemories for a checkpoint whose client memories are in files"
    ):
        loop.fit(model, loaders(clients()), ckpt_path="last")


def test_a_recipe_names_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spill = [
        "--loop.memories=lightning_fedsparse.spilled_memories.SpilledMemories",
        "--loop.memories.quota_bytes=100000000",
    ]
    short = ["--loop.rounds=1", "--loop.trainer.max_steps=1", "--loop.callbacks.residual=keep"]
    assert main(["run", "quickstart", *short, *spill]) == 0
    assert len(files(tmp_path / "runs" / "quickstart" / "memories")) == 5
    assert "quota_bytes: 100000000" in (tmp_path / "runs" / "quickstart" / "recipe.yaml").read_text()


def test_a_run_needs_a_folder_without_memories(tmp_path):
    with pytest.raises(
        ValueError, match="expected a folder for SpilledMemories in a run without default_root_dir, got none"
    ):
        FederatedLoop(1, 2, memories=SpilledMemories(), console=False, evaluation=QUIET).fit(Net(), loaders(clients()))
    spilled(tmp_path).put("a", remember(1))
    with pytest.raises(ValueError, match="expected no client memories where a run begins, found some in"):
        SpilledMemories(tmp_path).start(None, fresh=True)


def test_values_out_of_range():
    with pytest.raises(ValueError, match="expected quota_bytes to be at least 1, got 0"):
        SpilledMemories(quota_bytes=0)
    with pytest.raises(
        TypeError, match=r"expected memories of type ClientMemories, such as SpilledMemories\(\), got str"
    ):
        FederatedLoop(1, 2, memories="runs")
