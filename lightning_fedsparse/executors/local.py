"""Client rounds in this process, one after the other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TypeAlias, TypeVar

from lightning_fedsparse.client import ClientJob, ClientResult, ClientWorker
from lightning_fedsparse.failures import FailedClient

__all__ = ["Executor", "LocalExecutor", "Outcome", "attempt"]

Outcome: TypeAlias = ClientResult | FailedClient
_T = TypeVar("_T")


class Executor(ABC):
    """Where client rounds run."""

    @abstractmethod
    def run(self, worker: ClientWorker, jobs: Iterable[ClientJob]) -> Iterator[Outcome]:
        """Run the jobs and yield what becomes of them, in the order of the jobs.

        What reading a client's broadcast or its training raises is a :class:`~lightning_fedsparse.failures.FailedClient` (see
        :func:`attempt`). A job of which nothing is heard any more is left out: the round counts its client as failed.
        """

    def check(self, clients: int) -> None:  # noqa: B027  # optional
        """See that it suits a cohort of this size.

        Raises:
            ValueError: If it does not.
        """

    def stop(self) -> None:  # noqa: B027  # optional
        """Let go of what was kept for further rounds; the next :meth:`run` starts it anew."""


class LocalExecutor(Executor):
    """In this process, on the one resident worker."""

    def run(self, worker: ClientWorker, jobs: Iterable[ClientJob]) -> Iterator[Outcome]:
        """Run the jobs one after the other."""
        for job in jobs:
            yield attempt(job, partial(worker.run, job))


def attempt(job: ClientJob, act: Callable[[], _T]) -> _T | FailedClient:
    """Do a client's part; what that raises is its failure, unless it is Ctrl-C or ``SystemExit``."""
    try:
        return act()
    except Exception as error:  # noqa: BLE001  # a user's code may raise anything
        return FailedClient.of(job.client_id, job.index, error)
