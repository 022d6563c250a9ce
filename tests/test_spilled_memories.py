"""Memories in files: as of the checkpoint wherever a run is killed, within their quota, whole or refused."""

import shutil
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_fedsparse import FederatedLoop
from lightning_fedsparse.callbacks import CompressionMemory
from lightning_fedsparse.memories import HeldMemories
from lightning_fedsparse.records import RoundRecord
from lightning_fedsparse.spilled_memories import SpilledMemories
from tests.test_loop import QUIET, Net, clients, loaders


def spilled(folder, **arguments):
    memories = SpilledMemories(folder, **arguments)
    memories.start(None, fresh=not folder.exists())
    return memories


def remember(number, size=4):
    return {"method": {"residual": {"weight": torch.full((size,), float(number))}, "mask_id": None}}


def number_of(memory):
    return int(memory["method"]["residual"]["weight"][0])


def files(folder):
    return sorted(path.name for path in folder.iterdir())


# -- one store ---------------------------------------------------------------------------------------------------------


def test_what_was_put_is_taken_and_nothing_else(tmp_path):
    for memories in (HeldMemories(), spilled(tmp_path / "memories")):
        memories.put("a/b", remember(1))
        memories.put("a/b", remember(2))
        assert number_of(memories["a/b"]) == 2
        assert memories["a/b"]["method"]["mask_id"] is None
        assert "other" not in memories
        assert list(memories) == ["a/b"]
        assert len(memories) == 1
    assert len(files(tmp_path / "memories")) == 1  # whatever the client is called


def test_a_file_is_read_when_its_client_is_sampled_and_not_before(tmp_path, monkeypatch):
    memories = spilled(tmp_path)
    for number in range(3):
        memories.put(str(number), remember(number))
    memories.end_round(1, [])
    again = SpilledMemories(tmp_path)
    again.start(None, fresh=False)
    reads = []
    monkeypatch.setattr(torch, "load", lambda *args, load=torch.load, **named: reads.append(1) or load(*args, **named))
    again.load_state_dict(memories.state_dict())
    assert "1" in again
    assert reads == []
    assert number_of(again["1"]) == 1
    assert reads == [1]


def test_a_file_stays_until_no_checkpoint_needs_it(tmp_path):
    memories = spilled(tmp_path)
    memories.put("a", remember(1))
    memories.end_round(1, [])
    memories.state_dict()
    memories.saved([1])
    (first,) = files(tmp_path)
    memories.put("a", remember(2))
    memories.put("a", remember(3))  # a round that was run twice: nothing can need the 2
    memories.end_round(2, [])
    memories.state_dict()
    assert len(files(tmp_path)) == 2
    assert first in files(tmp_path)
    memories.saved([1, 2])
    assert first in files(tmp_path)
    memories.saved([2])
    assert len(files(tmp_path)) == 1
    assert first not in files(tmp_path)


def test_what_a_killed_run_left_behind_goes_after_the_next_checkpoint(tmp_path):
    memories = spilled(tmp_path)
    memories.put("a", remember(1))
    memories.end_round(1, [])
    state = memories.state_dict()
    memories.saved([1])
    kept = files(tmp_path)
    memories.put("a", remember(2))  # killed here, and while writing another
    (tmp_path / (kept[0] + ".tmp")).write_bytes(b"half")
    (tmp_path / "my.memory").write_text("mine")
    memories = spilled(tmp_path)
    memories.load_state_dict(state)
    assert number_of(memories["a"]) == 1
    assert len(files(tmp_path)) == 4
    memories.end_round(2, [])
    memories.state_dict()
    memories.saved([2])
    assert files(tmp_path) == sorted([*kept, "my.memory"])


writes = st.dictionaries(st.sampled_from("abcd"), st.integers(0, 2))


@given(rounds=st.lists(writes, min_size=2, max_size=6), every=st.integers(1, 3), data=st.data())
def test_every_checkpoint_that_is_kept_gives_the_memories_of_its_round(tmp_path_factory, rounds, every, data):
    folder = tmp_path_factory.mktemp("memories")
    quota = data.draw(st.sampled_from([None, 4000, 6000]))
    memories = spilled(folder, quota_bytes=quota)
    memories._warned = True
    expected, checkpoints, current = {}, {}, {}
    for done, written in enumerate(rounds, start=1):
        for client, number in written.items():
            memories.put(client, remember(number))
            current[client] = number
        for client in memories.end_round(done, written):
            del current[client]
        if done % every == 0:
            state = memories.state_dict()
            kept = {*data.draw(st.sets(st.sampled_from(sorted(checkpoints)))), done} if checkpoints else {done}
            checkpoints = {r: s for r, s in {**checkpoints, done: state}.items() if r in kept}
            expected[done] = dict(current)
            memories.saved(kept)
    for client, number in data.draw(writes).items():
        memories.put(client, remember(number))  # of a round that was killed
    for done, state in checkpoints.items():
        again = spilled(folder, quota_bytes=quota)
        again.load_state_dict(state)
        assert {client: number_of(memory) for client, memory in again.items()} == expected[done]
        assert again._bytes == sum(
            path.stat().st_size for c, f in again._files.items() for path in [again._place(c, f)]
        )
    shutil.rmtree(folder)


# -- the quota ---------------------------------------------------------------------------------------------------------


def test_those_not_sampled_for_longest_are_given_up(tmp_path):
    memories = spilled(tmp_path)
    memories.put("0", remember(0))
    size = memories._bytes
    memories = spilled(tmp_path / "quota", quota_bytes=3 * size)
    for number in range(3):
        memories.put(str(number), remember(number))
    assert memories.end_round(1, ["0", "1", "2"]) == []
    memories.put("8", remember(8))
    memories.put("7", remember(7))  # uploads come in any order: what counts is that of the cohort
    assert len(memories) == 5  # nobody of this round loses anything before the round is over
    with pytest.warns(UserWarning, match="need more than their quota_bytes=.* first '1' in round 2"):
        # 0 was sampled again, whether it comes back or not
        assert memories.end_round(2, ["0", "7", "8"]) == ["1", "2"]
    assert list(memories) == ["0", "7", "8"]
    memories.put("9", remember(9))
    assert memories.end_round(3, ["9"]) == ["0"]  # told once
    assert "1" not in memories


def test_an_evicted_memory_is_in_the_record_and_in_the_summary(tmp_path, capsys):
    loop = FederatedLoop(
        2,
        2,
        [CompressionMemory()],
        evaluation=QUIET,
        memories=SpilledMemories(quota_bytes=1),
        default_root_dir=tmp_path,
    )
    with pytest.warns(UserWarning, match="quota_bytes=1"):
        loop.fit(Net(), loaders(clients(2)))
    assert [sorted(record.evicted_memories) for record in loop.history] == [[], ["c0", "c1"], ["c0", "c1"]]
    assert "memories   4 given up for their quota" in capsys.readouterr().out
    line = (tmp_path / "history.jsonl").read_text().splitlines()[1]
    assert RoundRecord.from_json(line).evicted_memories == loop.history[1].evicted_memories
    older = replace(loop.history[1], evicted_memories=[]).to_json().replace(', "evicted_memories": []', "")
    assert RoundRecord.from_json(older).evicted_memories == []


# -- what is refused --------------------------------------------------------------------------------------------------


def test_a_damaged_file_is_one_sentence(tmp_path):
    memories = spilled(tmp_path)
    memories.put("a", remember(1))
    state = memories.state_dict()
    (name,) = files(tmp_path)
    content = bytearray((tmp_path / name).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / name).write_bytes(content)
    with pytest.raises(
        ValueError, match="expected the memory of client 'a' as it was written, got a damaged file: .*" + name
    ):
        memories["a"]
    (tmp_path / name).write_bytes(content[:100])
    again = spilled(tmp_path)
    with pytest.raises(ValueError, match=f"expected {len(content)} bytes of memory for client 'a', found 100 bytes at"):
        again.load_state_dict(state)
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match="expected .* bytes of memory for client 'a', found no file at"):
        again.load_state_dict(state)
    with pytest.raises(ValueError, match="expected the memory of client 'a' at .*, got: No such file"):
        memories["a"]


def test_other_objects_are_one_sentence(tmp_path):
    memories = spilled(tmp_path)
    memories.put("a", {"method": SpilledMemories()})
    with pytest.raises(
        ValueError, match="expected tensors and primitives in the memory of client 'a', got other objects"
    ):
        memories["a"]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    memories = SpilledMemories(tmp_path / "file" / "memories")
    memories.start(None, fresh=True)
    with pytest.raises(OSError, match="expected to write the memory of client 'a' to .*, got: Not a directory"):
        memories.put("a", remember(1))
