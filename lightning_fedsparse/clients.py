"""One client of a federation, as its data describe it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader

__all__ = ["Client"]


@dataclass(frozen=True)
class Client:
    """One client's data.

    Args:
        id: Its name, unique in the federation.
        num_examples: Its training examples, at least 1.
        train: Makes its training loader.
        val: Makes its validation loader; None if it has no validation data.
        capacity: Share of the model's weights that it can hold, in (0, 1]; None if it has none of its own.
    """

    id: str
    num_examples: int
    train: Callable[[], DataLoader[Any]]
    val: Callable[[], DataLoader[Any]] | None = None
    capacity: float | None = None

    def train_loader(self) -> DataLoader[Any]:
        """Return the loader to train on."""
        return self.train()

    def val_loader(self) -> DataLoader[Any] | None:
        """Return the loader to validate on, not shuffled, or None."""
        return None if self.val is None else self.val()
