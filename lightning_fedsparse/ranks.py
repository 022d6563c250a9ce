"""Processes that run one federation together, as ``torchrun`` and other launchers of ``torch.distributed`` start them.

Every process, a rank, runs the same ``FederatedLoop.fit``. What this module gives them is the little that they have to tell
each other: small objects, sums of tensors, and what goes from all to the first rank and back.
"""

from __future__ import annotations

import pickle
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_fedsparse.failures import RankLostError

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import ProcessGroup, Store

__all__ = ["Alone", "GlooRanks", "Ranks"]


class Ranks(ABC):
    """The processes of a federation, seen from one of them.

    Attributes:
        rank: This process, from 0.
        size: How many there are.
        moment: Where the run is, for errors; every rank says so itself.
    """

    rank: int
    size: int
    moment = "the start"

    @abstractmethod
    def share(self, thing: Any) -> list[Any]:
        """Give every rank what each of them has, by rank."""

    @abstractmethod
    def gather(self, thing: Any) -> list[Any]:
        """Give the first rank what each of them has, by rank; the others get nothing."""

    @abstractmethod
    def deal(self, things: Sequence[Any]) -> Any:
        """Give each rank its one of what the first rank has, by rank; what the others pass does not matter."""

    @abstractmethod
    def total(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sum named tensors over the ranks; one that a rank does not have counts as zero.

        Args:
            tensors: Of any shape and numeric dtype, on the CPU; a name has the same on every rank that has it.

        Returns:
            The sums, the same to the bit on every rank.
        """

    def close(self) -> None:  # noqa: B027  # optional
        """Leave the others."""

    def require_same(self, what: str, digest: Callable[[], object]) -> None:
        """Require something to be equal on all ranks; ``digest`` says what it is on this one, if anybody asks.

        Raises:
            RuntimeError: Naming the ranks that differ from the first.
        """
        digests = self.share(digest()) if self.size > 1 else []
        others = [rank for rank, other in enumerate(digests) if other != digests[0]]
        if others:
            raise RuntimeError(
                f"expected {what} on every rank, got others in {self.moment} on {_named(others)}: start the same script or "
                "recipe on all, with the same versions of everything and on the same kind of processor"
            )


class Alone(Ranks):
    """One process by itself."""

    rank = 0
    size = 1

    def share(self, thing: Any) -> list[Any]:
        """See :meth:`Ranks.share`."""
        return [thing]

    def gather(self, thing: Any) -> list[Any]:
        """See :meth:`Ranks.gather`."""
        return [thing]

    def deal(self, things: Sequence[Any]) -> Any:
        """See :meth:`Ranks.deal`."""
        return things[0]

    def total(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See :meth:`Ranks.total`."""
        return dict(tensors)


class GlooRanks(Ranks):
    """Ranks that talk by gloo, on whatever network they find each other.

    It is a process group of its own and never the default one: where that is initialized, torchmetrics and Lightning take
    every rank to train the same model and would wait, in the middle of a client's training, for ranks that train others.

    Args:
        store: Where the ranks find each other, and leave how far they are.
        rank: This process, from 0.
        size: How many there are.
        timeout: Seconds that one rank waits for the others.

    Raises:
        RankLostError: In this and all else, if not all ranks take part in time.
    """

    def __init__(self, store: Store, rank: int, size: int, *, timeout: float) -> None:
        from torch.distributed import ProcessGroupGloo

        self.rank = rank
        self.size = size
        self._store = store
        self._timeout = timedelta(seconds=timeout)
        self._number = 0
        self._closed = False
        with self._together():
            self._group: ProcessGroup = ProcessGroupGloo(store, rank, size, timeout=self._timeout)  # type: ignore[assignment]

    def share(self, thing: Any) -> list[Any]:
        """See :meth:`Ranks.share`."""
        mine = _packed(thing)
        with self._together():
            sizes = self._sizes(mine)
            found = [torch.empty(max(sizes), dtype=torch.uint8) for _ in sizes]
            padded = torch.nn.functional.pad(mine, (0, max(sizes) - len(mine)))
            self._group.allgather([found], [padded]).wait()
        return [thing if rank == self.rank else _unpacked(found[rank][: sizes[rank]]) for rank in range(self.size)]

    def gather(self, thing: Any) -> list[Any]:
        """See :meth:`Ranks.gather`."""
        mine = _packed(thing) if self.rank else torch.empty(0, dtype=torch.uint8)
        things = [thing]
        with self._together():
            sizes = self._sizes(mine)
            if self.rank:
                self._group.send([mine], 0, 0).wait(self._timeout)
                return []
            for rank in range(1, self.size):
                found = torch.empty(sizes[rank], dtype=torch.uint8)
                self._group.recv([found], rank, 0).wait(self._timeout)
                things.append(_unpacked(found))
        return things

    def deal(self, things: Sequence[Any]) -> Any:
        """See :meth:`Ranks.deal`."""
        packed = [_packed(thing) for thing in things[1:]] if self.rank == 0 else []
        sizes = self.share([len(data) for data in packed])[0]
        with self._together():
            if self.rank == 0:
                for rank, data in enumerate(packed, start=1):
                    self._group.send([data], rank, 0).wait(self._timeout)
                return things[0]
            found = torch.empty(sizes[self.rank - 1], dtype=torch.uint8)
            self._group.recv([found], 0, 0).wait(self._timeout)
        return _unpacked(found)

    def total(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See :meth:`Ranks.total`; one reduction per dtype."""
        layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for held in self.share({name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}):
            for name, kind in held.items():
                if layout.setdefault(name, kind) != kind:
                    raise ValueError(
                        f"expected {name!r} of one dtype and shape on all ranks, got {layout[name]} and {kind}"
                    )
        sums = {}
        for dtype in dict.fromkeys(dtype for dtype, _ in layout.values()):
            shapes = {name: shape for name, (kind, shape) in layout.items() if kind == dtype}
            flat = torch.zeros(sum(map(prod, shapes.values())), dtype=dtype)
            start = 0
            for name, shape in shapes.items():
                part = sums[name] = flat[start : start + prod(shape)].view(shape)
                start += prod(shape)
                if name in tensors:
                    part.copy_(tensors[name])
            with self._together():
                self._group.allreduce([flat]).wait()
        return {name: sums[name] for name in layout}

    def close(self) -> None:
        """See :meth:`Ranks.close`; those that wait for this rank then know at once."""
        if not self._closed:
            self._closed = True
            del self._group

    def _sizes(self, data: Tensor) -> list[int]:
        found = [torch.empty(1, dtype=torch.int64) for _ in range(self.size)]
        self._group.allgather([found], [torch.tensor([len(data)])]).wait()
        return [int(size) for size in found]

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Count what all ranks do together, so that those that did not come to it can be named."""
        self._number += 1
        started = time.monotonic()
        try:
            self._store.set(f"at/{self.rank}", str(self._number))
            yield
        except RuntimeError as error:
            seconds = self._timeout.total_seconds()
            why = f"was not heard of for {seconds:g} seconds" if time.monotonic() - started >= seconds else "ended"
            raise RankLostError(
                f"expected all {self.size} ranks in {self.moment}, but {_named(self._behind())} {why}: start the job again to go "
                "on from the last checkpoint, as torchrun --max-restarts does by itself"
            ) from error

    def _behind(self) -> list[int]:
        """Ranks that have not come to where this one is, as far as can be known."""
        behind = []
        with suppress(RuntimeError):
            for rank in range(self.size):
                key = f"at/{rank}"
                if not self._store.check([key]) or int(self._store.get(key)) < self._number:
                    behind.append(rank)
        return behind


def _named(ranks: Sequence[int]) -> str:
    if not ranks:
        return "one of them"
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _packed(thing: Any) -> Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(thing)), dtype=torch.uint8)


def _unpacked(data: Tensor) -> Any:
    # as torch.distributed does for objects: the ranks of a job are one owner's
    return pickle.loads(data.numpy().data)
