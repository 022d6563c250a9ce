"""Why a client has no part in a round: reasons, sentences, and the record that keeps them."""

import json
from dataclasses import replace

import pytest
import torch
from torch.utils.data import TensorDataset

from lightning_fedsparse.executors import LocalExecutor
from lightning_fedsparse.failures import ClientFailure, FailureReason, failure_of
from lightning_fedsparse.payload import encode
from lightning_fedsparse.records import RoundRecord
from lightning_fedsparse.testing import Fault
from lightning_fedsparse.update import SparseUpdate
from tests.failing_clients import reasons, run
from tests.test_loop import Net, clients, loaders


def test_failures_come_back_from_json_and_from_records_that_had_only_sentences():
    record = run({(0, "c1"): Fault.RAISES}, per_round=6, rounds=1).history[1]
    again = RoundRecord.from_json(record.to_json())
    assert again == record
    assert isinstance(again.failures["c1"].reason, FailureReason)
    row = json.loads(record.to_json())
    for name in ("clients_unused", "stray_results", "tries", "accept", "skipped"):
        del row[name]
    row["failures"] = {"c1": "checksum"}
    old = RoundRecord.from_json(json.dumps(row))
    assert old.failures == {"c1": ClientFailure(FailureReason.INVALID_UPLOAD, "checksum")}
    assert (old.tries, old.accept, old.skipped) == (1, "sampled", False)
    assert record.scalars["skipped"] == 0


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (ValueError("no"), ClientFailure(FailureReason.EXCEPTION, "ValueError: no")),
        (KeyError(), ClientFailure(FailureReason.EXCEPTION, "KeyError")),
        (ValueError(object()), ClientFailure(FailureReason.EXCEPTION, "ValueError: <object object>")),
        (MemoryError(), ClientFailure(FailureReason.OUT_OF_MEMORY, "MemoryError")),
        (
            RuntimeError("CUDA out of memory. Tried"),
            ClientFailure(FailureReason.OUT_OF_MEMORY, "RuntimeError: CUDA out of memory. Tried"),
        ),
    ],
)
def test_errors_have_a_reason_and_a_sentence(error, failure):
    assert failure_of(error) == failure


def test_a_client_can_not_fill_the_history():
    class Talkative(LocalExecutor):
        def run(self, worker, jobs):
            names = [f"{number:0500}" for number in range(900)]
            payload = encode(SparseUpdate(dict.fromkeys(names, torch.zeros(0)), dict.fromkeys(names)))
            for result in super().run(worker, jobs):
                yield replace(result, payload=payload) if result.client_id == "c3" else result

    failure = run(executor=Talkative(), per_round=6, rounds=1).history[1].failures["c3"]
    assert failure.sentence.startswith("expected the parameters of the model, got none for ['first.bias'")
    assert len(failure.sentence) == 600
    assert replace(failure) == failure  # what was cut once stays as it is


def test_a_long_message_is_cut_and_its_place_is_kept():
    try:
        raise ValueError("x" * 10_000)
    except ValueError as error:
        sentence = failure_of(error).sentence
    assert sentence.startswith("ValueError: xxx")
    assert "xxx ... (line " in sentence
    assert len(sentence) < 600


def test_a_loss_that_is_nan_and_a_fit_without_a_step_have_reasons_of_their_own():
    class Choosy(Net):
        def on_train_batch_start(self, batch, batch_idx):
            return None if batch[0].count_nonzero() else -1

    parts = clients()
    parts["c1"] = TensorDataset(torch.zeros(20, 8), torch.zeros(20, dtype=torch.long))
    parts["c4"] = TensorDataset(torch.full((20, 8), torch.nan), torch.zeros(20, dtype=torch.long))
    loop = run(data=loaders(parts), model=Choosy(), per_round=6, rounds=1)
    assert reasons(loop) == [{"c1": FailureReason.NO_STEP, "c4": FailureReason.LOSS_NOT_FINITE}]
    assert "expected at least one optimizer step, got none from client 'c1'" in loop.history[1].failures["c1"].sentence
