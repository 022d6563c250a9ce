"""One data set -> many clients: iid, by Dirichlet draws, by few classes per client, or by a natural key.

Each function assigns every example to exactly one client, draws from its own generator and returns index arrays
(int64, ascending) that are slices of one array, so a hundred thousand clients cost little more than ten. The classes
below them are the same splits as recipe entries.

Iid and few-classes follow the splits of Q. Long, C. Anagnostopoulos, S. P. Parambath, D. Bi, "FedDIP: Federated
Learning with Extreme Dynamic Pruning and Incremental Regularization", ICDM 2023, https://arxiv.org/abs/2309.06805, as
in its released code; Dirichlet follows T.-M. H. Hsu, H. Qi, M. Brown, "Measuring the Effects of Non-Identical Data
Distribution for Federated Visual Classification", 2019, https://arxiv.org/abs/1909.06335, drawn per class over clients.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt

__all__ = [
    "DirichletPartition",
    "IidPartition",
    "Indices",
    "NaturalPartition",
    "Partition",
    "PathologicalPartition",
    "dirichlet_partition",
    "iid_partition",
    "natural_partition",
    "pathological_partition",
]

Indices = npt.NDArray[np.int64]

_MAX_DRAWS = 1000


def iid_partition(labels: npt.ArrayLike, num_clients: int, *, seed: int = 0) -> list[Indices]:
    """Deal the shuffled examples of class after class round-robin.

    Clients' sizes differ by at most one, and so do their counts of each class; where ``num_clients`` divides the size
    of every class, all are equal.

    Args:
        labels: Class of each example, integers of shape (n,); zeros where there are no classes to balance.
        num_clients: Number of clients, 1..n.
        seed: Seed of the shuffle.

    Returns:
        For each client the ascending int64 indices of its examples.

    Raises:
        ValueError: If ``labels`` are not a row of integers, or ``num_clients`` is not in 1..n.

    >>> [part.tolist() for part in iid_partition([0, 0, 1, 1], 2)]
    [[0, 2], [1, 3]]
    """
    labels = _checked(labels, num_clients)
    generator = np.random.default_rng(seed)
    dealt = np.concatenate([generator.permutation(members) for members in _members(labels)])
    owner = np.empty(labels.size, np.int64)
    owner[dealt] = np.arange(labels.size) % num_clients
    return _group(owner, num_clients)


def dirichlet_partition(
    labels: npt.ArrayLike, num_clients: int, *, alpha: float, min_examples: int = 1, seed: int = 0
) -> list[Indices]:
    """Share out each class by proportions drawn from a symmetric Dirichlet distribution over the clients.

    Args:
        labels: Class of each example, integers of shape (n,).
        num_clients: Number of clients, 1..n.
        alpha: Concentration, above 0: small makes clients different, large makes them alike.
        min_examples: Proportions are drawn again until each client has this many examples, at least 1.
        seed: Seed of shuffle and draws.

    Returns:
        For each client the ascending int64 indices of its examples.

    Raises:
        ValueError: If an argument is out of range, or no draw out of 1000 gives each client ``min_examples``.
    """
    labels = _checked(labels, num_clients)
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha of a Dirichlet partition must be above 0 and finite, got {alpha}")
    if min_examples < 1 or min_examples * num_clients > labels.size:
        raise ValueError(
            f"min_examples must be at least 1 and at most {labels.size // num_clients} "
            f"({labels.size} examples over {num_clients} clients), got {min_examples}"
        )
    generator = np.random.default_rng(seed)
    classes = [generator.permutation(members) for members in _members(labels)]
    sizes = np.array([[members.size] for members in classes])
    for _ in range(_MAX_DRAWS):
        shares = generator.dirichlet(np.full(num_clients, alpha), size=len(classes))
        # rounding the running sum, not the shares: the counts of a class then add up to its size
        ends = np.rint(np.cumsum(shares, axis=1) * sizes).astype(np.int64)
        ends[:, -1] = sizes[:, 0]
        counts = np.diff(ends, axis=1, prepend=0)
        if counts.sum(axis=0).min() >= min_examples:
            break
    else:
        raise ValueError(
            f"no Dirichlet({alpha}) draw out of {_MAX_DRAWS} gave each of {num_clients} clients at least "
            f"{min_examples} of {labels.size} examples: raise alpha or lower num_clients or min_examples"
        )
    owner = np.empty(labels.size, np.int64)
    for members, count in zip(classes, counts, strict=True):
        owner[members] = np.repeat(np.arange(num_clients), count)
    return _group(owner, num_clients)


def pathological_partition(
    labels: npt.ArrayLike, num_clients: int, *, classes_per_client: int = 2, seed: int = 0
) -> list[Indices]:
    """Give each client at most a few classes.

    Class after class goes to the first ``num_clients * classes_per_client // num_classes`` clients that still lack
    classes. Of those, all but the last get the largest whole number below an equal share, the last gets the rest (the
    rule of FedDIP's released code).

    Args:
        labels: Class of each example, integers of shape (n,).
        num_clients: Number of clients, 1..n.
        classes_per_client: Classes that a client holds, at least 1 and at most the number of classes.
        seed: Seed of the shuffle inside each class.

    Returns:
        For each client the ascending int64 indices of its examples.

    Raises:
        ValueError: If an argument is out of range, the clients together cannot hold all classes, a class has fewer
            examples than clients that share it, or a client is left without examples.
    """
    labels = _checked(labels, num_clients)
    classes = _members(labels)
    if not 1 <= classes_per_client <= len(classes):
        raise ValueError(f"classes_per_client must be in 1..{len(classes)}, got {classes_per_client}")
    holders_per_class = num_clients * classes_per_client // len(classes)
    if holders_per_class < 1:
        raise ValueError(
            f"{num_clients} clients with {classes_per_client} classes each cannot hold {len(classes)} classes"
        )
    generator = np.random.default_rng(seed)
    lacking = np.full(num_clients, classes_per_client)
    owner = np.empty(labels.size, np.int64)
    for index, members in enumerate(classes):
        holders = np.flatnonzero(lacking)[:holders_per_class]
        if members.size < holders.size:
            raise ValueError(f"class {index} has {members.size} examples, too few for {holders.size} clients")
        counts = np.full(holders.size, max(1, -(-members.size // holders.size) - 1))
        counts[-1] = members.size - counts[:-1].sum()
        owner[generator.permutation(members)] = np.repeat(holders, counts)
        lacking[holders] -= 1
    idle = int((lacking == classes_per_client).sum())
    if idle:
        raise ValueError(
            f"{idle} of {num_clients} clients get no class: num_clients * classes_per_client should be a multiple of "
            f"the {len(classes)} classes, got {num_clients} * {classes_per_client}"
        )
    return _group(owner, num_clients)


def natural_partition(keys: Sequence[object] | npt.NDArray[np.generic]) -> dict[str, Indices]:
    """Group examples by who made them.

    Args:
        keys: Client of each example, strings or integers, shape (n,).

    Returns:
        Client id (the key as a string) -> ascending int64 indices; clients in the order of their keys.

    Raises:
        ValueError: If ``keys`` are empty or not a row of strings or integers.

    >>> {client: part.tolist() for client, part in natural_partition(["b", "a", "b"]).items()}
    {'a': [1], 'b': [0, 2]}
    """
    array = np.asarray(keys)
    if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "iuUS":
        raise ValueError(f"client keys must be a row of strings or integers, got shape {array.shape}, {array.dtype}")
    clients, owner = np.unique(array, return_inverse=True)
    return {str(client): part for client, part in zip(clients.tolist(), _group(owner, clients.size), strict=True)}


class Partition(ABC):
    """How a data set is split into clients: an entry of a recipe.

    ``by`` says what :meth:`split` gets as ``labels``: the classes of the examples, or their natural client keys.
    """

    by: ClassVar[Literal["labels", "client_keys"]] = "labels"

    @abstractmethod
    def split(self, labels: npt.NDArray[np.generic] | None, num_examples: int, seed: int) -> dict[str, Indices]:
        """Return client id -> ascending int64 indices into the data set.

        Args:
            labels: Class (or client key) of each example, shape (num_examples,), or None if the data set has none.
            num_examples: Size of the data set.
            seed: Seed of all draws.
        """


@dataclass(frozen=True)
class IidPartition(Partition):
    """:func:`iid_partition`; without labels a plain random split into equal parts."""

    num_clients: int

    def split(self, labels: npt.NDArray[np.generic] | None, num_examples: int, seed: int) -> dict[str, Indices]:
        """See :meth:`Partition.split`."""
        classes = np.zeros(num_examples, np.int64) if labels is None else labels
        return _numbered(iid_partition(classes, self.num_clients, seed=seed))


@dataclass(frozen=True)
class DirichletPartition(Partition):
    """:func:`dirichlet_partition`."""

    num_clients: int
    alpha: float
    min_examples: int = 1

    def split(self, labels: npt.NDArray[np.generic] | None, num_examples: int, seed: int) -> dict[str, Indices]:
        """See :meth:`Partition.split`."""
        parts = dirichlet_partition(
            _needed(labels, self),
            self.num_clients,
            alpha=self.alpha,
            min_examples=self.min_examples,
            seed=seed,
        )
        return _numbered(parts)


@dataclass(frozen=True)
class PathologicalPartition(Partition):
    """:func:`pathological_partition`."""

    num_clients: int
    classes_per_client: int = 2

    def split(self, labels: npt.NDArray[np.generic] | None, num_examples: int, seed: int) -> dict[str, Indices]:
        """See :meth:`Partition.split`."""
        parts = pathological_partition(
            _needed(labels, self), self.num_clients, classes_per_client=self.classes_per_client, seed=seed
        )
        return _numbered(parts)


@dataclass(frozen=True)
class NaturalPartition(Partition):
    """:func:`natural_partition` by the data set's ``client_keys``; clients below ``min_examples`` are left out."""

    min_examples: int = 1

    by: ClassVar[Literal["labels", "client_keys"]] = "client_keys"

    def split(self, labels: npt.NDArray[np.generic] | None, num_examples: int, seed: int) -> dict[str, Indices]:
        """See :meth:`Partition.split`; nothing is drawn."""
        parts = natural_partition(_needed(labels, self))
        kept = {client: part for client, part in parts.items() if part.size >= self.min_examples}
        if not kept:
            largest = max(part.size for part in parts.values())
            raise ValueError(f"no client has {self.min_examples} examples: the largest has {largest}")
        return kept


def _checked(labels: npt.ArrayLike, num_clients: int) -> npt.NDArray[np.generic]:
    array = np.asarray(labels)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iub"):
        raise ValueError(f"labels must be a row of integers, got shape {array.shape}, {array.dtype}")
    if not 1 <= num_clients <= array.size:
        raise ValueError(f"num_clients must be in 1..{array.size}, the number of examples, got {num_clients}")
    return array


def _members(labels: npt.NDArray[np.generic]) -> list[Indices]:
    """Indices of each class, classes ascending."""
    classes, owner = np.unique(labels, return_inverse=True)
    return _group(owner, classes.size)


def _group(owner: Indices, num_owners: int) -> list[Indices]:
    """Ascending indices of each owner, as slices of one array."""
    order = np.argsort(owner, kind="stable")
    ends = np.cumsum(np.bincount(owner, minlength=num_owners)).tolist()
    # np.split takes three times as long to make as many slices
    return [order[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def _numbered(parts: list[Indices]) -> dict[str, Indices]:
    """Ids padded with zeros: their order as strings is their order as numbers."""
    width = len(str(len(parts) - 1))
    return {f"{index:0{width}d}": part for index, part in enumerate(parts)}


def _needed(labels: npt.NDArray[np.generic] | None, partition: Partition) -> npt.NDArray[np.generic]:
    if labels is None:
        what = "integer class labels" if partition.by == "labels" else "client_keys"
        raise ValueError(f"{type(partition).__name__} needs {what}, and the data set has none")
    return labels
