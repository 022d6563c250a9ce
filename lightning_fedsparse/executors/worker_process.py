"""One worker process: what the executor knows of it, and what runs inside it.

The pipe between them carries the pickled worker once, then for each client round the job and its broadcast, and back what
became of it. Arrays of updates that were not encoded come back through shared memory, which every worker has for itself and
writes anew each time.
"""

from __future__ import annotations

import os
import pickle
import signal
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from multiprocessing.connection import Connection
from multiprocessing.pool import ExceptionWithTraceback  # type: ignore[attr-defined]
from threading import Thread
from typing import Any

import torch
from torch import Tensor, multiprocessing

from lightning_fedsparse.client import ClientJob, ClientWorker
from lightning_fedsparse.executors.local import Outcome, attempt
from lightning_fedsparse.executors.sharing import SharedUpdate, in_shared_memory
from lightning_fedsparse.failures import ClientFailure, FailedClient, FailureReason
from lightning_fedsparse.update import SparseUpdate

__all__ = ["ClientTask", "WorkerProcess", "pickled"]


@dataclass
class ClientTask:
    """One client's round: where it stands; without a broadcast if that could not be read, which is then its result."""

    job: ClientJob
    broadcast: SharedUpdate | None
    running: bool = False
    deaths: int = 0
    result: Outcome | None = None

    @property
    def where(self) -> str:
        """Client and round, for messages."""
        return f"client {self.job.client_id!r} in round {self.job.index + 1}"

    def fail(self, reason: FailureReason, sentence: str) -> None:
        """End it without a result of its client."""
        self.result = FailedClient(self.job.client_id, self.job.index, ClientFailure(reason, sentence))


@dataclass
class WorkerProcess:
    """One worker process, as this one sees it."""

    pickled: Tensor
    core: int | None
    start_timeout: float
    task: ClientTask | None = None
    started: bool = False
    deadline: float = float("inf")
    exitcode: int | None = None
    _last: SharedUpdate | None = field(default=None, repr=False)
    _outbox: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve,
            args=(theirs, torch.get_num_threads(), self.core, multiprocessing.get_start_method(allow_none=True)),
            daemon=True,
            name="fedsparse worker",
        )
        self._process.start()
        theirs.close()
        self.sentinel = self._process.sentinel
        self.deadline = time.monotonic() + self.start_timeout
        with suppress(OSError):  # if it died already, its sentinel says so
            self.connection.send(self.pickled)

    @property
    def handles(self) -> tuple[Connection, int]:
        """What to wait on: one is ready when the worker says something, the other when it has died."""
        return self.connection, self.sentinel

    def give(self, task: ClientTask, timeout: float) -> None:
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
        outbox, sizes = self.connection.recv()
        self._outbox = self._outbox if outbox is None else outbox
        view = memoryview(b"") if self._outbox is None else self._outbox.numpy().data
        # copied: the worker will write there again
        arrays = [bytearray(view[end - size : end]) for size, end in zip(sizes, accumulate(sizes), strict=True)]
        said: Outcome | BaseException = pickle.loads(data, buffers=arrays)
        return said

    def end(self) -> None:
        """End the process at once."""
        self._process.kill()
        self._process.join()
        self.exitcode = self._process.exitcode
        self.connection.close()


def pickled(worker: ClientWorker) -> Tensor:
    """The worker as bytes in shared memory, for any number of processes."""
    for name, part in worker.parts.items():
        try:
            pickle.dumps(part)
        except Exception as error:
            raise ValueError(
                f"expected {name} to be sent to worker processes, got what can't be pickled: {error}"
            ) from error
    return in_shared_memory(torch.frombuffer(bytearray(pickle.dumps(worker)), dtype=torch.uint8))


def _serve(connection: Connection, threads: int, core: int | None, start_method: str | None) -> None:
    """A worker process: takes the worker, then jobs until the other side is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that runs the rounds
    Thread(target=_end_with_parent, daemon=True).start()
    # loaders may have workers, which start as where the run began, and end by themselves when this process is gone; by
    # default a daemonic process may have no children, and a spawned one spawns its own, which takes seconds
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    multiprocessing.set_start_method(start_method, force=True)
    if core is not None:
        os.sched_setaffinity(0, {core})
    torch.set_num_threads(threads)
    outbox = _Outbox(connection)
    try:
        worker: ClientWorker = pickle.loads(connection.recv().numpy())
    except Exception as error:  # noqa: BLE001  # a class that this process can't import, or a user's own unpickling
        outbox.send(_sendable(error))
        return
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
        try:
            outbox.send(said)
        except Exception as error:  # noqa: BLE001  # what a method remembers may fail to pickle in any way
            outbox.send(
                ValueError(
                    f"expected what client {job.client_id!r} remembers to be sent from its worker process, got what can't be "
                    f"pickled: {error}"
                )
            )


class _Outbox:
    """What a worker says, with its arrays in shared memory that is kept for the next time."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._memory = torch.empty(0, dtype=torch.uint8)

    def send(self, said: Any) -> None:
        arrays: list[pickle.PickleBuffer] = []
        data = pickle.dumps(said, protocol=5, buffer_callback=arrays.append)
        parts = [array.raw() for array in arrays]
        sizes = [part.nbytes for part in parts]
        grows = sum(sizes) > len(self._memory)
        if grows:
            self._memory = in_shared_memory(torch.empty(sum(sizes), dtype=torch.uint8))
        view = self._memory.numpy().data
        for part, end in zip(parts, accumulate(sizes), strict=True):
            view[end - part.nbytes : end] = part
        self._connection.send_bytes(data)
        self._connection.send((self._memory if grows else None, sizes))


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
