"""What a federation over several ranks asks of its parts, what its ranks start from, and what device each has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_fedsparse.aggregation import Aggregator
from lightning_fedsparse.callbacks.base import SparsityCallback
from lightning_fedsparse.data import FederatedDataModule
from lightning_fedsparse.launching import environment_local_rank, environment_size
from lightning_fedsparse.ranks import Ranks

if TYPE_CHECKING:
    from lightning_fedsparse.loop import FederatedLoop

__all__ = ["require_ranks_can_share", "start_alike", "with_own_device"]


def require_ranks_can_share(loop: FederatedLoop, size: int) -> None:
    """Require a federation to be one that so many ranks can run together.

    Raises:
        ValueError: If there are more ranks than clients in a round, or uploads have to be held against each other.
        TypeError: If the aggregator, or a callback, adds up what only one process sees.
    """
    if size == 1:
        return
    if size > loop.clients_per_round:
        raise ValueError(
            f"expected at most as many ranks as clients per round, got {size} for {loop.clients_per_round} clients: the others "
            "would never have work"
        )
    if loop.screen is not None:
        raise ValueError(
            f"expected no screen with {size} ranks, got {loop.screen}: it holds uploads against each other, and each is with "
            "the rank that trained its client"
        )
    if loop.aggregator is not None and type(loop.aggregator).reduce is Aggregator.reduce:
        raise TypeError(
            f"expected an aggregator that overrides reduce(ranks), for {size} ranks, got {type(loop.aggregator).__name__}"
        )
    for method in loop.callbacks:
        if (
            isinstance(method, SparsityCallback)
            and is_overridden("on_server_receive", method, SparsityCallback)
            and not is_overridden("on_server_received", method, SparsityCallback)
        ):
            raise TypeError(
                f"expected callbacks that override on_server_received beside on_server_receive, for {size} ranks, got "
                f"{type(method).__name__}: every rank sees only its own clients' uploads"
            )


def start_alike(ranks: Ranks, model: pl.LightningModule, data: FederatedDataModule) -> None:
    """Have all ranks start from the same data on their disks and from the first rank's weights."""
    if ranks.size == 1:
        return
    # one process of each machine downloads what is missing; the others then find it
    if environment_local_rank() == 0:
        data.prepare_data()
    ranks.share(None)
    # a script need not seed its model
    model.load_state_dict(ranks.deal([model.state_dict()] * ranks.size))


def with_own_device(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """A Trainer's arguments with this rank's GPU, where there are several ranks and a GPU is what they are to use."""
    arguments = dict(trainer)
    wanted = (
        arguments.get("accelerator", "auto") in ("auto", "gpu", "cuda") and arguments.get("strategy", "auto") == "auto"
    )
    named = isinstance(arguments.get("devices"), list | tuple)
    if environment_size() > 1 and wanted and not named and torch.cuda.is_available():
        # more ranks than GPUs share them
        arguments |= {"accelerator": "gpu", "devices": [environment_local_rank() % torch.cuda.device_count()]}
    return arguments
