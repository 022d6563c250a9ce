"""Who can hold how much: a capacity, the share of a model's weights, for every client.

Capacities are listed in client order, named by client, given as shares of the clients per level, or computed by a
function of the client. Methods whose clients differ in size or sparsity read them; they are fixed for the run.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lightning_fedsparse.clients import Client

__all__ = [
    "Capacities",
    "CapacityFunction",
    "CapacityList",
    "CapacityMapping",
    "CapacityShares",
    "held_count",
    "listed_capacities",
    "mapped_capacities",
    "require_capacity",
    "shared_capacities",
]


def require_capacity(capacity: float, where: str) -> float:
    """Return the capacity if it is in (0, 1].

    Raises:
        ValueError: Naming ``where`` the number comes from.
    """
    if not 0 < capacity <= 1:
        raise ValueError(f"expected a capacity in (0, 1], got {capacity} {where}")
    return float(capacity)


def held_count(capacity: float, total: int, where: str) -> int:
    """How many of ``total`` weights a capacity holds: all but ``round((1 - capacity) * total)``, as a sparsity leaves.

    Raises:
        ValueError: If none is left, naming ``where`` the capacity comes from.

    Example:
        >>> held_count(0.25, 10, "for an example")
        2
    """
    count = total - round((1 - capacity) * total)
    if count == 0:
        raise ValueError(f"expected a capacity that holds at least one of {total} weights, got {capacity} {where}")
    return count


def listed_capacities(client_ids: Sequence[str], values: Sequence[float]) -> dict[str, float]:
    """One capacity per client, in the order of the clients.

    Raises:
        ValueError: If there are more or fewer than clients, or one is outside (0, 1].
    """
    if len(values) != len(client_ids):
        raise ValueError(f"expected one capacity for each of the {len(client_ids)} clients, got {len(values)}")
    return {
        client_id: require_capacity(value, f"for client {client_id!r}")
        for client_id, value in zip(client_ids, values, strict=True)
    }


def mapped_capacities(client_ids: Sequence[str], by_client: Mapping[str, float]) -> dict[str, float]:
    """The capacity that each client is given by its id.

    Raises:
        ValueError: If one is for a client that does not exist, a client has none, or one is outside (0, 1].
    """
    if unknown := sorted(by_client.keys() - set(client_ids)):
        raise ValueError(f"expected capacities of clients that exist, got one for {unknown[0]!r}")
    if missing := [client_id for client_id in client_ids if client_id not in by_client]:
        raise ValueError(f"expected a capacity for every client, got none for {missing[0]!r}")
    return listed_capacities(client_ids, [by_client[client_id] for client_id in client_ids])


def shared_capacities(
    client_ids: Sequence[str], shares: Mapping[float, float], *, shuffle_seed: int | None = None
) -> dict[str, float]:
    """Levels of capacity, each for a share of the clients.

    The first share of the clients gets the first level, and so on; where shares are no whole numbers of clients, the
    bounds between levels are rounded.

    Args:
        client_ids: The clients, in order.
        shares: Capacity -> share of the clients; shares sum to 1.
        shuffle_seed: Draws which clients get which level; None assigns in client order, as FIARSE's released code does.

    Raises:
        ValueError: If a capacity is outside (0, 1], a share is not positive, they do not sum to 1, or a level gets no
            client.

    >>> shared_capacities(["a", "b", "c", "d"], {1.0: 0.25, 0.5: 0.75})
    {'a': 1.0, 'b': 0.5, 'c': 0.5, 'd': 0.5}
    """
    for level, share in shares.items():
        require_capacity(level, "as a level")
        if not share > 0:
            raise ValueError(f"expected positive shares of the clients, got {share} for capacity {level}")
    if not math.isclose(sum(shares.values()), 1, abs_tol=1e-9):
        raise ValueError(
            f"expected shares of the clients that sum to 1, got {sum(shares.values())} from {dict(shares)}"
        )
    bounds = [round(float(end) * len(client_ids)) for end in np.cumsum([0.0, *shares.values()])]
    values: list[float] = []
    for level, start, end in zip(shares, bounds[:-1], bounds[1:], strict=True):
        if start == end:
            raise ValueError(
                f"expected at least one client for each level, got none of {len(client_ids)} for capacity {level} "
                f"with a share of {shares[level]}"
            )
        values += [float(level)] * (end - start)
    if shuffle_seed is not None:
        values = np.random.default_rng(shuffle_seed).permutation(values).tolist()
    return listed_capacities(client_ids, values)


class Capacities(ABC):
    """A way to give every client its capacity."""

    @abstractmethod
    def assign(self, clients: Mapping[str, Client], *, seed: int) -> dict[str, float]:
        """Capacities by client id.

        Args:
            clients: Clients by id, in order, none with a capacity yet; a client is built when it is looked up.
            seed: For capacities that are drawn.
        """


@dataclass(frozen=True)
class CapacityList(Capacities):
    """:func:`listed_capacities`."""

    values: list[float]

    def assign(self, clients: Mapping[str, Client], *, seed: int) -> dict[str, float]:
        """See :meth:`Capacities.assign`; nothing is drawn."""
        return listed_capacities(list(clients), self.values)


@dataclass(frozen=True)
class CapacityMapping(Capacities):
    """:func:`mapped_capacities`."""

    by_client: dict[str, float]

    def assign(self, clients: Mapping[str, Client], *, seed: int) -> dict[str, float]:
        """See :meth:`Capacities.assign`; nothing is drawn."""
        return mapped_capacities(list(clients), self.by_client)


@dataclass(frozen=True)
class CapacityShares(Capacities):
    """:func:`shared_capacities`; ``shuffle`` draws who gets which level from the data module's seed."""

    shares: dict[float, float]
    shuffle: bool = False

    def assign(self, clients: Mapping[str, Client], *, seed: int) -> dict[str, float]:
        """See :meth:`Capacities.assign`."""
        return shared_capacities(list(clients), self.shares, shuffle_seed=seed if self.shuffle else None)


@dataclass(frozen=True)
class CapacityFunction(Capacities):
    """A function of the client: of its id, its number of examples."""

    function: Callable[[Client], float]

    def assign(self, clients: Mapping[str, Client], *, seed: int) -> dict[str, float]:
        """See :meth:`Capacities.assign`; nothing is drawn."""
        return listed_capacities(list(clients), [self.function(client) for client in clients.values()])
