"""Why a client has no part in a round: a reason to count by, and a sentence to read.

What a client's own training raises is that client's failure and not the run's. Ctrl-C and ``SystemExit`` are nobody's
failure: they end the run.
"""

from __future__ import annotations

import re
import traceback
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from lightning.pytorch.utilities.memory import is_oom_error

__all__ = [
    "ClientFailure",
    "FailedClient",
    "FailureReason",
    "LossNotFiniteError",
    "NoStepError",
    "RankLostError",
    "TooFewClientsError",
    "count_reasons",
    "failure_of",
]

_LONGEST_SENTENCE = 600  # characters: it stays in the history
_LONGEST_MESSAGE = 400  # of an error, beside its type and place
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


class FailureReason(str, Enum):
    """What failures are counted by."""

    EXCEPTION = "exception"
    """The client's training raised."""
    NO_STEP = "no_step"
    """It ended without an optimizer step."""
    LOSS_NOT_FINITE = "loss_not_finite"
    """Its mean training loss is NaN or infinite."""
    OUT_OF_MEMORY = "out_of_memory"
    """It asked for more memory than there is."""
    WORKER_DIED = "worker_died"
    """Every worker process that ran it died."""
    TIMED_OUT = "timed_out"
    """It took longer than the executor allows."""
    LATE = "late"
    """It took longer than the round's deadline."""
    NO_UPLOAD = "no_upload"
    """Nothing came back."""
    INVALID_UPLOAD = "invalid_upload"
    """What came back can't be read, or is not what the round expects."""
    SCREENED = "screened"
    """What came back differs too much from what the cohort sent."""

    @property
    def words(self) -> str:
        """For a reader."""
        return self.value.replace("_", " ")


@dataclass(frozen=True)
class ClientFailure:
    """What the record keeps of one client's failure.

    Args:
        reason: To count by.
        sentence: What happened, in one sentence; a long one is cut.
    """

    reason: FailureReason
    sentence: str

    def __post_init__(self) -> None:
        # some of it may be a client's own words, such as the names of tensors that the model does not have
        object.__setattr__(self, "sentence", _cut(self.sentence, _LONGEST_SENTENCE))


@dataclass(frozen=True)
class FailedClient:
    """What an executor gives instead of a result.

    Args:
        client_id: Id of the client.
        index: Round, from 0.
        failure: Why.
        error: What the training raised, if it did; the frames of its traceback hold no variables any more.
    """

    client_id: str
    index: int
    failure: ClientFailure
    error: Exception | None = None

    @classmethod
    def of(cls, client_id: str, index: int, error: Exception) -> FailedClient:
        """Take in what a client's training raised."""
        failure = failure_of(error)
        # an error is kept until the round ends: what its frames hold, a batch on a GPU for one, must not be
        traceback.clear_frames(error.__traceback__)
        return cls(client_id, index, failure, error)


class NoStepError(RuntimeError):
    """A client's fit took no optimizer step."""


class LossNotFiniteError(RuntimeError):
    """A client's training loss is not finite."""


class RankLostError(RuntimeError):
    """Another process of the federation ended, or was not heard of in time."""


class TooFewClientsError(RuntimeError):
    """Too few clients of a round returned; its cause is what the first that raised did raise."""


def failure_of(error: Exception) -> ClientFailure:
    """The reason and the sentence of an error.

    Example:
        >>> failure_of(NoStepError("expected at least one optimizer step, got none"))
        ClientFailure(reason=<FailureReason.NO_STEP: 'no_step'>, sentence='expected at least one optimizer step, got none')
    """
    if isinstance(error, NoStepError):
        return ClientFailure(FailureReason.NO_STEP, str(error))
    if isinstance(error, LossNotFiniteError):
        return ClientFailure(FailureReason.LOSS_NOT_FINITE, str(error))
    oom = isinstance(error, MemoryError) or is_oom_error(error)
    return ClientFailure(FailureReason.OUT_OF_MEMORY if oom else FailureReason.EXCEPTION, _sentence(error))


def count_reasons(failures: Iterable[ClientFailure]) -> str:
    """How often each reason came, the most frequent first, for a reader.

    Example:
        >>> late, silent = ClientFailure(FailureReason.LATE, "..."), ClientFailure(FailureReason.NO_UPLOAD, "...")
        >>> count_reasons([silent, late, late])
        '2 late, 1 no upload'
    """
    counts = Counter(failure.reason.words for failure in failures)
    return ", ".join(f"{count} {words}" for words, count in counts.most_common())


def _sentence(error: Exception) -> str:
    """Type, message and place of an error in one line; no folder, for records are shared."""
    # an object's address differs from run to run, and a run that is resumed writes the same record again
    lines = [line.strip() for line in _ADDRESS.sub("", str(error)).splitlines() if line.strip()]
    # a loader's worker process puts its whole traceback into the message: what matters is its last line
    message = _cut(" ... ".join(dict.fromkeys([lines[0], lines[-1]])), _LONGEST_MESSAGE) if lines else ""
    text = f"{type(error).__name__}: {message}" if message else type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return text
    return f"{text} (line {frames[-1].lineno} of {Path(frames[-1].filename).name}, in {frames[-1].name})"


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 4] + " ..."
