"""The corpus of the fuzz target, and the checks that it is held against."""

from pathlib import Path

import pytest

from lightning_fedsparse.payload import PayloadError, decode
from lightning_fedsparse.update import SparseUpdate
from tests.fuzz import invariants

CORPUS = sorted((Path(__file__).parent / "fuzz" / "corpus").glob("*.bin"))


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.stem)
def test_the_corpus_is_decoded_or_refused(path):
    assert invariants.check(path.read_bytes()) is (path.stem != "cut")


def test_the_corpus_is_there():
    assert {path.stem for path in CORPUS} == {name for name, _ in invariants.seeds()}


def test_refusing_what_the_other_decoder_accepts_is_noticed(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise PayloadError("no reason")

    monkeypatch.setattr(invariants, "decode", refuse)
    with pytest.raises(AssertionError, match="only the minimal decoder accepts what was refused: no reason"):
        invariants.check(dict(invariants.seeds())["dense"])


def test_reading_another_value_than_the_other_decoder_is_noticed(monkeypatch):
    def wrong(*args, **kwargs):
        update = decode(*args, **kwargs)
        return SparseUpdate({**update.values, "a": update.values["a"] + 1}, update.masks, kind="delta", absent="zero")

    monkeypatch.setattr(invariants, "decode", wrong)
    with pytest.raises(AssertionError):
        invariants.check(dict(invariants.seeds())["dense"])
