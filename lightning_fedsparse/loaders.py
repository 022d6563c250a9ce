"""One user's loader -> loaders over parts of its data set, with the same settings; labels of a data set.

A client's loader must behave as the user's own: batch size, collate function, worker settings and whether it shuffles
are carried over. What cannot be carried over to a subset (an iterable data set, an own sampler) is refused, not guessed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset, default_collate
from torch.utils.data.sampler import RandomSampler, SequentialSampler

from lightning_fedsparse.partition import Indices

__all__ = ["LoaderSettings", "class_labels", "client_keys"]

# `in_order` is newer than the oldest supported torch: what the loader lacks is left out
_CARRIED = (
    "batch_size",
    "collate_fn",
    "drop_last",
    "in_order",
    "multiprocessing_context",
    "num_workers",
    "persistent_workers",
    "pin_memory",
    "pin_memory_device",
    "prefetch_factor",
    "timeout",
    "worker_init_fn",
)


@dataclass(frozen=True)
class LoaderSettings:
    """What is needed to make a loader over a part of a data set.

    Args:
        dataset: The whole map-style data set.
        shuffle: Whether training loaders shuffle.
        arguments: Keyword arguments of :class:`torch.utils.data.DataLoader`; a generator is never among them, so each
            loader draws from torch's global one.
    """

    dataset: Dataset[Any]
    shuffle: bool
    arguments: Mapping[str, Any]

    @classmethod
    def of(cls, loader: object) -> LoaderSettings:
        """Take the settings of a loader.

        Raises:
            TypeError: If ``loader`` is not one DataLoader that iterates as torch's does over a map-style data set.
            ValueError: If it has no batch size, or another sampler than torch's sequential or random one.
        """
        if not isinstance(loader, DataLoader):
            raise TypeError(f"train_dataloader() must return one DataLoader to split, got {type(loader).__name__}")
        if type(loader).__iter__ is not DataLoader.__iter__:
            raise TypeError(f"cannot split {type(loader).__name__}: it iterates in its own way, use a plain DataLoader")
        if isinstance(loader.dataset, IterableDataset):
            raise TypeError(
                f"cannot split the iterable data set {type(loader.dataset).__name__}: "
                "use a map-style one, or give one loader per client"
            )
        if loader.batch_size is None:
            raise ValueError("cannot split a DataLoader with its own batch_sampler or without a batch size")
        sampler = loader.sampler
        plain = type(sampler) is SequentialSampler or (
            type(sampler) is RandomSampler
            and not sampler.replacement
            and sampler.num_samples == len(sampler.data_source)
        )
        if not plain:
            raise ValueError(
                f"cannot split a DataLoader with {type(sampler).__name__} as sampler: "
                "use shuffle=True or False, or give one loader per client"
            )
        arguments = {name: getattr(loader, name) for name in _CARRIED if hasattr(loader, name)}
        return cls(loader.dataset, isinstance(sampler, RandomSampler), arguments)

    def loader(self, indices: Indices, *, train: bool) -> DataLoader[Any]:
        """Make a loader over some examples.

        Args:
            indices: Positions in the data set, shape (n,).
            train: Whether to shuffle and drop the last batch as the user's loader does; else in order, all batches.
        """
        arguments = dict(self.arguments)
        if not train:
            arguments["drop_last"] = False
        # plain ints: not every data set takes numpy's, and they are quicker to look up one by one
        subset = Subset(self.dataset, indices.tolist())
        if arguments["num_workers"] == 0 and not arguments["pin_memory"]:
            return _InProcessLoader(subset, shuffle=self.shuffle and train, **arguments)
        return DataLoader(subset, shuffle=self.shuffle and train, **arguments)


class _InProcessLoader(DataLoader[Any]):
    """A DataLoader without workers: the same batches in the same order from the same draws, without what workers need.

    Tensors in memory are gathered a batch at a time instead of example by example. For a client of a few batches the
    DataLoader's own work would be a good part of a round.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # the seed that a DataLoader draws for its workers here, with or without any; a sampler draws later, when asked
        torch.empty((), dtype=torch.int64).random_(generator=self.generator)
        return self._batches(iter(self.batch_sampler))  # type: ignore[arg-type]

    def _batches(self, batches_of_indices: Iterator[list[int]]) -> Iterator[Any]:
        dataset = self.dataset
        assert isinstance(dataset, Subset)
        tensors = _tensors_of(dataset.dataset) if self.collate_fn is default_collate else None
        if tensors is None:
            for indices in batches_of_indices:
                yield self.collate_fn(dataset.__getitems__(indices))
            return
        positions = np.asarray(dataset.indices, np.int64)
        for indices in batches_of_indices:
            chosen = torch.from_numpy(positions[indices])
            # a list: what the collate function makes of the tuples of a TensorDataset
            yield [tensor.index_select(0, chosen) for tensor in tensors]


def _tensors_of(dataset: Dataset[Any]) -> Sequence[torch.Tensor] | None:
    """Tensors whose rows are the examples, if the data set is just that, on the CPU and stored row by row."""
    if type(dataset) is not TensorDataset:
        return None
    plain = all(t.is_contiguous() and t.device.type == "cpu" and not t.requires_grad for t in dataset.tensors)
    return dataset.tensors if plain else None


def class_labels(dataset: Dataset[Any]) -> npt.NDArray[np.generic] | None:
    """Find the class of each example, shape (n,), integers.

    They are the data set's ``targets``, looked up through :class:`torch.utils.data.Subset`, or the last tensor of a
    ``TensorDataset``; None where those are absent or not a row of integers.
    """
    if isinstance(dataset, TensorDataset):
        return _row_of_integers(dataset.tensors[-1])
    if isinstance(dataset, Subset) and not hasattr(dataset, "targets"):
        labels = class_labels(dataset.dataset)
        return None if labels is None else labels[np.asarray(dataset.indices)]
    return _row_of_integers(getattr(dataset, "targets", None))


def client_keys(dataset: Dataset[Any]) -> npt.NDArray[np.generic] | None:
    """Find the natural client of each example: the data set's ``client_keys``, looked up through ``Subset``; or None."""
    keys = getattr(dataset, "client_keys", None)
    if keys is None and isinstance(dataset, Subset):
        keys = client_keys(dataset.dataset)
        return None if keys is None else keys[np.asarray(dataset.indices)]
    return None if keys is None else np.asarray(keys)


def _row_of_integers(
    targets: torch.Tensor | npt.NDArray[np.generic] | Sequence[int] | None,
) -> npt.NDArray[np.generic] | None:
    if targets is None:
        return None
    array = targets.cpu().numpy() if isinstance(targets, torch.Tensor) else np.asarray(targets)
    return array if array.ndim == 1 and array.dtype.kind in "iu" else None
