"""Which checkpoints stay: the last one and the best."""

import pytest
import torch

from lightning_fedsparse import FederatedLoop, load_folded
from lightning_fedsparse.checkpoint import load_checkpoint
from lightning_fedsparse.checkpointing import Checkpointing
from lightning_fedsparse.records import read_history
from tests.run_folders import fit, names, rows
from tests.test_loop import Net


@pytest.mark.parametrize(
    ("mode", "k", "kept"), [("min", 1, [4]), ("min", 2, [2, 4]), ("max", 1, [1]), ("max", -1, [1, 2, 3, 4])]
)
def test_the_best_rounds_stay(mode, k, kept, tmp_path, monkeypatch):
    losses = iter([0.9, 0.8, 0.3, 0.3, 0.2])
    monkeypatch.setattr("lightning_fedsparse.evaluation.Evaluator.is_due", lambda *_: True)
    monkeypatch.setattr("lightning_fedsparse.evaluation.Evaluator.run", lambda *_: {"loss": next(losses)})
    loop, _ = fit(tmp_path, 4, checkpointing=Checkpointing(monitor="loss", mode=mode, save_top_k=k))
    assert names(tmp_path / "checkpoints") == ["last.ckpt", *(f"round={number}.ckpt" for number in kept)]
    for number in kept:
        assert load_checkpoint(tmp_path / "checkpoints" / f"round={number}.ckpt")["round"] == number
    served = load_folded(tmp_path / "checkpoints" / f"round={kept[-1]}.ckpt", Net())
    if kept[-1] == 4:
        assert all(torch.equal(loop.state.tensors[name], tensor) for name, tensor in served.state_dict().items())


def test_a_resumed_run_keeps_the_best_of_the_whole_run(tmp_path):
    best = {"checkpointing": Checkpointing(monitor="train_loss", save_top_k=2)}
    fit(tmp_path / "whole", 5, **best)
    fit(tmp_path / "cut", 3, **best)
    (tmp_path / "cut" / "checkpoints" / "round=4.ckpt").write_bytes(b"of a round that is done again")
    fit(tmp_path / "cut", 5, ckpt_path="last", **best)
    kept = names(tmp_path / "whole" / "checkpoints")
    assert len(kept) == 3
    assert names(tmp_path / "cut" / "checkpoints") == kept
    for name in kept:
        one, other = (load_checkpoint(tmp_path / run / "checkpoints" / name) for run in ("whole", "cut"))
        assert all(torch.equal(one["state_dict"][key], tensor) for key, tensor in other["state_dict"].items())


def test_a_run_goes_back_to_a_best_round_also_if_it_ends_at_once(tmp_path, monkeypatch):
    fit(tmp_path, 4, checkpointing=Checkpointing(monitor="train_loss", save_top_k=-1))
    whole = rows(tmp_path)

    def power_cut(*arguments):
        raise RuntimeError("power cut")

    monkeypatch.setattr(FederatedLoop, "_round", power_cut)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(tmp_path, 4, ckpt_path=tmp_path / "checkpoints" / "round=2.ckpt")
    monkeypatch.undo()
    assert rows(tmp_path) == whole[:3]
    fit(tmp_path, 4, ckpt_path="last")
    assert rows(tmp_path) == whole


def test_a_monitored_number_that_no_round_has_is_named_after_the_first(tmp_path):
    with pytest.raises(ValueError, match="expected 'val_los', which is monitored, among a round's numbers, got bound_"):
        fit(tmp_path, 4, checkpointing=Checkpointing(monitor="val_los"))
    assert [record.round for record in read_history(tmp_path / "history.jsonl")] == [0, 1]


class Scalars:
    def __init__(self, **scalars):
        self.scalars = scalars


def test_where_all_stay_only_the_last_round_is_looked_at():
    keep = Checkpointing(monitor="loss", save_top_k=-1)
    before = {1: None, 3: None}
    assert keep.best({5, 1, 3, 7}, {**before, 5: Scalars(loss=0.1)}) == [1, 3, 5]  # 7 is not in the history
    assert keep.best({5, 1, 3}, {**before, 5: Scalars(other=0.1)}) == [1, 3]
    assert keep.best(set(), {}) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every_n_rounds": 0}, "expected a checkpoint every 1 or more rounds, got every_n_rounds=0"),
        ({"monitor": "loss", "mode": "best"}, "expected mode 'min' or 'max', got 'best'"),
        ({"monitor": "loss", "save_top_k": 0}, "expected save_top_k of at least 1, or -1 for all, got 0"),
        ({"save_top_k": 2}, "expected monitor, by which rounds are compared, with save_top_k=2, got none"),
    ],
)
def test_bad_checkpointing(arguments, message):
    with pytest.raises(ValueError, match=message):
        Checkpointing(**arguments)


def test_checkpointing_is_an_object():
    with pytest.raises(TypeError, match=r"expected checkpointing of type Checkpointing, such as .*, got int"):
        FederatedLoop(1, 1, checkpointing=5)
