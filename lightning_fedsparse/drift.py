"""Clients whose data change in the middle of a run: to see whether a method's masks follow.

Two splits, each a :class:`~lightning_fedsparse.data.FederatedDataModule` of its own, hold the same clients: other images
(:class:`~lightning_fedsparse.datasets.OptdigitsDataModule` turns them), other label shares (another ``alpha`` or seed of the
partition), other data altogether. The global model is evaluated on both from the start: what the first split's figures lose
after the change has been forgotten, what the second's gain has been learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.types import EVAL_DATALOADERS

from lightning_fedsparse.clients import Client
from lightning_fedsparse.data import FederatedDataModule
from lightning_fedsparse.schedules import Progress

__all__ = ["DriftingDataModule"]


class DriftingDataModule(FederatedDataModule):
    """One split until a point of the run, another from there on.

    Its validation and test loaders are those of ``before`` and ``after``, one after the other: a module whose
    ``test_step`` takes ``dataloader_idx`` logs ``NAME/dataloader_idx_0`` for ``before`` and ``NAME/dataloader_idx_1`` for
    ``after``.

    Args:
        before: The clients at first.
        after: The clients from ``start`` on, with the same ids.
        start: Share of the rounds after which the data change, in (0, 1).

    Raises:
        ValueError: If ``start`` is out of range; when the clients are built, if the two have other ids or capacities.
    """

    def __init__(self, before: FederatedDataModule, after: FederatedDataModule, *, start: float = 0.5) -> None:
        # not FederatedDataModule's: there is no data to split here, only two splits to choose from
        LightningDataModule.__init__(self)
        if not 0 < start < 1:
            raise ValueError(f"expected start in (0, 1), a share of the rounds, got {start}")
        self.before = before
        self.after = after
        self.start = start
        self._now = before

    @property
    def client_ids(self) -> list[str]:
        """All clients, in a fixed order."""
        ids = self.before.client_ids
        if self.after.client_ids != ids:
            raise ValueError(
                f"expected the same clients before and after, got {len(ids)} and {len(self.after.client_ids)}, which differ"
            )
        if self.after.capacities != self.before.capacities:
            raise ValueError("expected the same capacities before and after: a client's is fixed for the run")
        return ids

    def start_round(self, progress: Progress) -> None:
        """Choose the split that holds in the coming round."""
        self._now = self.before if progress.fraction < self.start else self.after

    def client(self, client_id: str) -> Client:
        """Return one client with the data that it has now."""
        return self._now.client(client_id)

    @property
    def capacities(self) -> dict[str, float]:
        """Every client's capacity, by its id; empty where clients have none."""
        return self.before.capacities

    def prepare_data(self) -> None:
        """Prepare both."""
        self.before.prepare_data()
        self.after.prepare_data()

    def setup(self, stage: str) -> None:
        """Set both up."""
        self.before.setup(stage)
        self.after.setup(stage)

    def val_dataloader(self) -> EVAL_DATALOADERS:
        """Validation loaders of both."""
        return [*_listed(self.before.val_dataloader()), *_listed(self.after.val_dataloader())]

    def test_dataloader(self) -> EVAL_DATALOADERS:
        """Test loaders of both."""
        return [*_listed(self.before.test_dataloader()), *_listed(self.after.test_dataloader())]


def _listed(loaders: EVAL_DATALOADERS) -> list[Any]:
    return list(loaders) if isinstance(loaders, Sequence) else [loaders]
