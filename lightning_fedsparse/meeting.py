"""How the ranks of a federation find each other: by the environment that ``torchrun`` or another launcher gives them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING
from uuid import uuid4

from lightning_fedsparse.failures import RankLostError
from lightning_fedsparse.launching import environment_rank, environment_size
from lightning_fedsparse.ranks import Alone, GlooRanks, Ranks

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

__all__ = ["joined_ranks"]

_NEEDED = ("RANK", "MASTER_ADDR", "MASTER_PORT")
_POLL = 0.02  # seconds


@contextmanager
def joined_ranks(timeout: float) -> Iterator[Ranks]:
    """The ranks that the environment names: ``WORLD_SIZE``, ``RANK``, ``MASTER_ADDR`` and ``MASTER_PORT``.

    Args:
        timeout: Seconds that one rank waits for the others, each time.

    Raises:
        ValueError: If some of these are missing.
        RankLostError: If not all ranks come.
    """
    if environment_size() == 1:
        yield Alone()
        return
    ranks = _join(timeout)
    try:
        yield ranks
    finally:
        ranks.close()


def _join(timeout: float) -> GlooRanks:
    missing = [name for name in _NEEDED if not os.environ.get(name)]
    if missing:
        raise ValueError(
            f"expected {', '.join(_NEEDED)} in the environment beside WORLD_SIZE={environment_size()}, found no "
            f"{missing[0]}: start the processes with torchrun"
        )
    from torch.distributed.distributed_c10d import PrefixStore

    rank, size = environment_rank(), environment_size()
    try:
        store = _rendezvous(timeout)
        name = _meet(store, size, timeout) if rank == 0 else _be_met(store, rank, timeout)
    except RuntimeError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise RankLostError(
            f"expected {size} ranks to meet at {where} within {timeout:g} seconds, got not all of them"
        ) from error
    return GlooRanks(PrefixStore(name, store), rank, size, timeout=timeout)


def _meet(store: Store, size: int, timeout: float) -> str:
    """On the first rank: a name for this meeting, once all others have taken it.

    A store may outlive the processes: torchrun's has what those left that it has restarted. So nothing is believed that does
    not answer a word of now.
    """
    name = f"fedsparse/{uuid4()}"
    told: dict[int, bytes] = {}
    end = time.monotonic() + timeout
    while not store.check([f"{name}/met/{rank}" for rank in range(1, size)]):
        for rank in range(1, size):
            word = store.get(f"fedsparse/word/{rank}") if store.check([f"fedsparse/word/{rank}"]) else None
            if word is not None and told.get(rank) != word:
                told[rank] = word
                store.set(f"fedsparse/answer/{word.decode()}", name)
        if time.monotonic() > end:
            raise RuntimeError("not all ranks came")
        time.sleep(_POLL)
    return name


def _be_met(store: Store, rank: int, timeout: float) -> str:
    """On any other rank: the name that the first rank gives this meeting."""
    word = str(uuid4())
    store.set(f"fedsparse/word/{rank}", word)
    store.wait([f"fedsparse/answer/{word}"], timedelta(seconds=timeout))
    name = store.get(f"fedsparse/answer/{word}").decode()
    store.set(f"{name}/met/{rank}", "")
    return name


@cache
def _rendezvous(timeout: float) -> Store:
    # for the life of the process: the port of a store that was closed may not be free for the next fit
    from torch.distributed.rendezvous import rendezvous

    store: Store = next(iter(rendezvous("env://", timeout=timedelta(seconds=timeout))))[0]
    return store
