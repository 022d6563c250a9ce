"""Client rounds in worker processes of this machine, each with a resident module and Trainer.

This process reads every broadcast once and puts it into shared memory; workers train, encode their uploads and send them
back. Results come in the order of the jobs whoever is done first, so that a federation's result does not depend on the number
of workers. At most twice as many jobs as workers are on their way; among those that wait, the one that took longest in the
past goes first.

A client whose worker dies three times over, or that takes longer than it may, has failed and the others go on.
"""

from __future__ import annotations

import os
import pickle
import signal
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.pool import ExceptionWithTraceback  # type: ignore[attr-defined]
from threading import Thread
from typing import Any

import torch
from torch import Tensor, multiprocessing
from typing_extensions import override

from lightning_fedsparse.client import ClientJob, ClientResult, ClientWorker
from lightning_fedsparse.executors.local import Executor, Outcome, attempt
from lightning_fedsparse.executors.sharing import SharedUpdate, in_shared_memory
from lightning_fedsparse.failures import ClientFailure, FailedClient, FailureReason
from lightning_fedsparse.update import SparseUpdate

__all__ = ["ProcessExecutor"]

_KEPT_BROADCASTS = 4  # in shared memory; in a round clients of one capacity mostly get the same
_TRIES = 3  # of one client round whose worker dies


class ProcessExecutor(Executor):
    """Run client rounds in worker processes.

    Args:
        workers: Processes, at least 1.
        pin: Keep each worker on a core of its own, as far as there are cores.
        timeout: Seconds that one client's round may take before its worker is taken for hung and ended, above 0.
        start_timeout: Seconds that a worker may take to start, above 0.

    Raises:
        ValueError: For a value out of range; when the run starts, for a model, data, callbacks or Trainer arguments that can't
            be pickled.
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
        self._processes: list[_Process] = []
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
        window: dict[int, _Task] = {}
        read, given = 0, 0
        shared: OrderedDict[int, tuple[SparseUpdate, SharedUpdate]] = OrderedDict()
        while True:
            while len(window) < 2 * self.workers and (job := next(source, None)) is not None:
                broadcast = worker.receive(job)
                if id(broadcast) not in shared:
                    shared[id(broadcast)] = broadcast, SharedUpdate.of(broadcast)
                    if len(shared) > _KEPT_BROADCASTS:
                        shared.popitem(last=False)
                window[read] = _Task(replace(job, payload=b""), shared[id(broadcast)][1])
                read += 1
            if not window:
                return
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
            self._pickled = worker, _pickle(worker)
        for process in self._processes:
            if process.task is not None:  # of a round that was given up
                process.end()
        self._processes = [process for process in self._processes if process.task is None]

    def _start_for(self, tasks: list[_Task]) -> None:
        """Have a worker for each task, as far as there are to be so many."""
        unfinished = sum(task.result is None for task in tasks)
        while len(self._processes) < min(self.workers, unfinished):
            self._processes.append(self._start(len(self._processes)))

    def _start(self, number: int) -> _Process:
        assert self._pickled is not None
        cores = sorted(os.sched_getaffinity(0)) if self.pin and hasattr(os, "sched_getaffinity") else []
        core = cores[number % len(cores)] if cores else None
        return _Process(self._pickled[1], core, self.start_timeout)

    def _give_out(self, tasks: list[_Task]) -> None:
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
                raise said
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

    def _replace(self, process: _Process) -> None:
        """Start another worker in place of one that died or was in the way; its client, unless it failed, waits again."""
        process.end()
        if not process.started:
            raise RuntimeError(
                f"expected a worker process to start, it ended with exit code {process.exitcode}: a script that starts "
                'workers must do so under `if __name__ == "__main__":`'
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


@dataclass
class _Task:
    """One client's round: where it stands."""

    job: ClientJob
    broadcast: SharedUpdate
    running: bool = False
    deaths: int = 0
    result: Outcome | None = None

    @property
    def where(self) -> str:
        return f"client {self.job.client_id!r} in round {self.job.index + 1}"

    def fail(self, reason: FailureReason, sentence: str) -> None:
        """End it without a result of its client."""
        self.result = FailedClient(self.job.client_id, self.job.index, ClientFailure(reason, sentence))


@dataclass
class _Process:
    """One worker process, as this one sees it."""

    pickled: Tensor
    core: int | None
    start_timeout: float
    task: _Task | None = None
    started: bool = False
    deadline: float = float("inf")
    exitcode: int | None = None
    _last: SharedUpdate | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, torch.get_num_threads(), self.core), daemon=True, name="fedsparse worker"
        )
        self._process.start()
        theirs.close()
        self.sentinel = self._process.sentinel
        self.deadline = time.monotonic() + self.start_timeout
        with suppress(OSError):  # if it died already, its sentinel says so
            self.connection.send(self.pickled)

    @property
    def handles(self) -> tuple[Connection, int]:
        return self.connection, self.sentinel

    def give(self, task: _Task, timeout: float) -> None:
        """Send a client's round, with its broadcast if that is not the last one sent."""
        with suppress(OSError):  # if it died, its sentinel says so
            # by plain pickle, here and back: what clients remember must not stay in shared memory for the whole run
            self.connection.send_bytes(pickle.dumps(task.job))
            self.connection.send(None if task.broadcast is self._last else task.broadcast)
        self._last = task.broadcast
        self.task, task.running = task, True
        self.deadline = time.monotonic() + timeout

    def listen(self) -> Outcome | BaseException | None:
        """What the worker says; None if that is only that it has started.

        Raises:
            EOFError, OSError: If it died instead.
        """
        data = self.connection.recv_bytes()
        if not data:
            self.started = True
            return None
        said: Outcome | BaseException = pickle.loads(data)
        return said

    def end(self) -> None:
        """End the process at once."""
        self._process.kill()
        self._process.join()
        self.exitcode = self._process.exitcode
        self.connection.close()


def _serve(connection: Connection, threads: int, core: int | None) -> None:
    """A worker process: takes the worker, then jobs until the other side is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that runs the rounds
    Thread(target=_end_with_parent, daemon=True).start()
    if core is not None:
        os.sched_setaffinity(0, {core})
    torch.set_num_threads(threads)
    worker: ClientWorker = pickle.loads(connection.recv().numpy())
    connection.send_bytes(b"")
    broadcast: SparseUpdate | None = None
    while True:
        try:
            job = pickle.loads(connection.recv_bytes())
            shared: SharedUpdate | None = connection.recv()
        except EOFError:
            return
        if shared is not None:
            broadcast = shared.open()
        assert broadcast is not None
        try:
            said: Any = attempt(job, partial(worker.train, job, broadcast))
            if isinstance(said, FailedClient) and said.error is not None:
                said = replace(said, error=_sendable(said.error))
        except BaseException as error:  # noqa: BLE001  # whatever it is, it is for the other side
            said = _sendable(error)
        connection.send_bytes(pickle.dumps(said))


def _end_with_parent() -> None:
    """End this process when the one that started it is gone, also in the middle of a client's round."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _sendable(error: BaseException) -> Any:
    """The error with the traceback of here as its cause, as it will arrive."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001  # an exception's own pickling may fail in any way
        error = RuntimeError(f"{type(error).__name__}: {error}").with_traceback(error.__traceback__)
    return ExceptionWithTraceback(error, error.__traceback__)


def _pickle(worker: ClientWorker) -> Tensor:
    """The worker as bytes in shared memory, for any number of processes."""
    for name, part in worker.parts.items():
        try:
            pickle.dumps(part)
        except Exception as error:
            raise ValueError(
                f"expected {name} to be sent to worker processes, got what can't be pickled: {error}"
            ) from error
    return in_shared_memory(torch.frombuffer(bytearray(pickle.dumps(worker)), dtype=torch.uint8))
