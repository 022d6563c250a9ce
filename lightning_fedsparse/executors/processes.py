"""Client rounds in worker processes of this machine, each with a resident module and Trainer.

This process reads every broadcast once and puts it into shared memory; workers train, encode their uploads and send them
back. Results come in the order of the jobs whoever is done first, so that a federation's result does not depend on the number
of workers. At most twice as many jobs as workers are on their way; among those that wait, the one that took longest in the
past goes first.

A client whose worker dies three times over, or that takes longer than it may, has failed and the others go on.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from multiprocessing.connection import wait
from typing import TypeAlias

from torch import Tensor
from typing_extensions import override

from lightning_fedsparse.client import ClientJob, ClientResult, ClientWorker
from lightning_fedsparse.executors.local import Executor, Outcome, attempt
from lightning_fedsparse.executors.sharing import SharedUpdate
from lightning_fedsparse.executors.worker_process import ClientTask, WorkerProcess, pickled
from lightning_fedsparse.failures import FailedClient, FailureReason
from lightning_fedsparse.last_few import LastFew
from lightning_fedsparse.launching import environment_local_rank
from lightning_fedsparse.update import SparseUpdate

__all__ = ["ProcessExecutor"]

# beside what is shared what it was made of, which keeps its id from being given to another object
_Shared: TypeAlias = LastFew[tuple[SparseUpdate, SharedUpdate]]

_KEPT_BROADCASTS = 4  # in shared memory; in a round clients of one capacity mostly get the same
_TRIES = 3  # of one client round whose worker dies


class ProcessExecutor(Executor):
    """Run client rounds in worker processes.

    Args:
        workers: Processes, at least 1.
        pin: Keep each worker on a core of its own, among those of all ranks on the machine, as far as there are cores.
        timeout: Seconds that one client's round may take before its worker is taken for hung and ended, above 0.
        start_timeout: Seconds that a worker may take to start, above 0.

    Raises:
        ValueError: For a value out of range; when the run starts, for a model, data, callbacks or Trainer arguments that can't
            be pickled, or that a worker can't load.
        RuntimeError: If a worker does not start.
    """

    def __init__(
        self, workers: int = 2, *, pin: bool = False, timeout: float = 3600.0, start_timeout: float = 300.0
    ) -> None:
        if workers < 1:
            raise ValueError(f"expected workers to be at least 1, got {workers}")
        for name, value in (("timeout", timeout), ("start_timeout", start_timeout)):
            if not value > 0:
                raise ValueError(f"expected {name} above 0 seconds, got {value}")
        self.workers = workers
        self.pin = pin
        self.timeout = timeout
        self.start_timeout = start_timeout
        self._pickled: tuple[ClientWorker, Tensor] | None = None
        self._processes: list[WorkerProcess] = []
        self._seconds: dict[str, float] = {}

    @override
    def check(self, clients: int) -> None:
        if self.workers > clients:
            raise ValueError(
                f"expected at most as many workers as clients per round, got {self.workers} for {clients} clients: "
                "the others would never have work"
            )

    @override
    def run(self, worker: ClientWorker, jobs: Iterable[ClientJob]) -> Iterator[Outcome]:
        self._use(worker)
        source = iter(jobs)
        window: dict[int, ClientTask] = {}
        read, given = 0, 0
        shared = _Shared(_KEPT_BROADCASTS)
        while True:
            while len(window) < 2 * self.workers and (job := next(source, None)) is not None:
                window[read] = _received(worker, job, shared)
                read += 1
            if not window:
                return
            if window[given].result is None:
                self._start_for(list(window.values()))
                self._give_out(list(window.values()))
                self._collect()
            while given in window and window[given].result is not None:
                result = window.pop(given).result
                assert result is not None
                given += 1
                yield result

    @override
    def stop(self) -> None:
        for process in self._processes:
            process.end()
        self._processes.clear()
        self._pickled = None

    # -- workers ---------------------------------------------------------------------------------------------------

    def _use(self, worker: ClientWorker) -> None:
        """Have workers that are copies of this one."""
        if self._pickled is None or self._pickled[0] is not worker:
            self.stop()
            self._pickled = worker, pickled(worker)
        for process in self._processes:
            if process.task is not None:  # of a round that was given up
                process.end()
        self._processes = [process for process in self._processes if process.task is None]

    def _start_for(self, tasks: list[ClientTask]) -> None:
        """Have a worker for each task, as far as there are to be so many."""
        unfinished = sum(task.result is None for task in tasks)
        while len(self._processes) < min(self.workers, unfinished):
            self._processes.append(self._start(len(self._processes)))

    def _start(self, number: int) -> WorkerProcess:
        assert self._pickled is not None
        cores = sorted(os.sched_getaffinity(0)) if self.pin and hasattr(os, "sched_getaffinity") else []
        # under torchrun, the workers of the ranks before this one on its machine have the first cores
        core = cores[(environment_local_rank() * self.workers + number) % len(cores)] if cores else None
        return WorkerProcess(self._pickled[1], core, self.start_timeout)

    def _give_out(self, tasks: list[ClientTask]) -> None:
        waiting = [task for task in tasks if not task.running and task.result is None]
        # clients that never ran come first: they may be the longest
        waiting.sort(key=lambda task: -self._seconds.get(task.job.client_id, float("inf")))
        for process in self._processes:
            if process.started and process.task is None and waiting:
                task = waiting.pop(0)
                process.give(task, self._limit(task.job)[1])

    def _collect(self) -> None:
        """Wait for a worker to say something, to die, or to take too long."""
        active = [process for process in self._processes if process.task is not None or not process.started]
        limit = min(process.deadline for process in active) - time.monotonic()
        ready = wait([handle for process in active for handle in process.handles], timeout=max(0.0, limit))
        for process in active:
            try:
                said = process.listen() if process.connection in ready else None
            except (EOFError, OSError):  # the latter if it died in the middle of a message
                self._replace(process)
                continue
            task = process.task
            if isinstance(said, BaseException):
                process.task = None
                if process.started:
                    raise said
                process.end()
                raise ValueError(
                    "expected a worker process to load the model, data, callbacks and Trainer arguments that it was sent, "
                    f"got {type(said).__name__}: {said}; their classes must be in files that it can import"
                ) from said
            if said is not None and task is not None:
                process.task, task.result = None, said
                if isinstance(said, ClientResult):
                    self._seconds[said.client_id] = said.seconds
            elif process.sentinel in ready:
                self._replace(process)
            elif time.monotonic() >= process.deadline:
                if task is None:
                    process.end()
                    raise RuntimeError(f"expected a worker process to start within {self.start_timeout:g} seconds")
                reason, limit = self._limit(task.job)
                task.fail(reason, f"expected {task.where} to take at most {limit:g} seconds, its worker was ended")
                self._replace(process)

    def _limit(self, job: ClientJob) -> tuple[FailureReason, float]:
        """How long a client's round may take, and what it has done if it takes longer."""
        if job.deadline is not None and job.deadline < self.timeout:
            return FailureReason.LATE, job.deadline
        return FailureReason.TIMED_OUT, self.timeout

    def _replace(self, process: WorkerProcess) -> None:
        """Start another worker in place of one that died or was in the way; its client, unless it failed, waits again."""
        process.end()
        if not process.started:
            assert process.exitcode is not None
            reason = (
                "the system ends processes that need more memory than there is"
                if process.exitcode < 0  # a signal
                else 'a script that starts workers must do so under `if __name__ == "__main__":`'
            )
            raise RuntimeError(
                f"expected a worker process to start, it ended with exit code {process.exitcode}: {reason}"
            )
        task = process.task
        assert task is not None
        task.running = False
        if task.result is None:
            task.deaths += 1
        if task.deaths == _TRIES:
            task.fail(
                FailureReason.WORKER_DIED,
                f"expected a worker to run {task.where}, {_TRIES} workers died in it, the last with exit code "
                f"{process.exitcode}: the system ends processes that need more memory than there is",
            )
        number = self._processes.index(process)
        self._processes[number] = self._start(number)


def _received(worker: ClientWorker, job: ClientJob, shared: _Shared) -> ClientTask:
    """A job with its broadcast in shared memory; one whose broadcast can't be read has failed."""
    broadcast = attempt(job, partial(worker.receive, job))
    if isinstance(broadcast, FailedClient):
        return ClientTask(job, None, result=broadcast)
    _, in_memory = shared.get(id(broadcast), lambda: (broadcast, SharedUpdate.of(broadcast)))
    return ClientTask(replace(job, payload=b""), in_memory)
