"""Client rounds in this process, one after the other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator

from lightning_fedsparse.client import ClientJob, ClientResult, ClientWorker

__all__ = ["Executor", "LocalExecutor"]


class Executor(ABC):
    """Where client rounds run."""

    @abstractmethod
    def run(self, worker: ClientWorker, jobs: Iterable[ClientJob]) -> Iterator[ClientResult]:
        """Run the jobs and yield their results in the order of the jobs."""

    def check(self, clients_per_round: int) -> None:  # noqa: B027  # optional
        """See that it suits a cohort of this size.

        Raises:
            ValueError: If it does not.
        """

    def stop(self) -> None:  # noqa: B027  # optional
        """Let go of what was kept for further rounds; the next :meth:`run` starts it anew."""


class LocalExecutor(Executor):
    """In this process, on the one resident worker."""

    def run(self, worker: ClientWorker, jobs: Iterable[ClientJob]) -> Iterator[ClientResult]:
        """Run the jobs one after the other."""
        return map(worker.run, jobs)
