"""What a federation carries from round to round on the server's side, as one thing to save and restore."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import lightning.pytorch as pl

from lightning_fedsparse.broadcasting import Broadcaster, pack_masks, unpack_masks
from lightning_fedsparse.callbacks.base import SparsityCallback
from lightning_fedsparse.seeding import derive_seed
from lightning_fedsparse.server import ServerOptimizer, ServerState

__all__ = ["Federation"]


@dataclass
class Federation:
    """The server's memory.

    Args:
        state: Global weights, buffers and masks, and the methods' own state.
        optimizer: The server's optimizer.
        broadcaster: Who holds which masks.
        memories: What each client's callbacks remember, by client id.
    """

    state: ServerState
    optimizer: ServerOptimizer
    broadcaster: Broadcaster = field(default_factory=Broadcaster)
    memories: dict[str, dict[str, Any]] = field(default_factory=dict)

    def start(self, module: pl.LightningModule, methods: Sequence[SparsityCallback], seed: int) -> None:
        """Let every method make its server's state, before round 0 and before a checkpoint replaces it."""
        for position, method in enumerate(methods):
            self.state = method.on_server_start(module, self.state, derive_seed(seed, "method", position))

    def resume(self, saved: dict[str, Any], methods: Sequence[SparsityCallback]) -> None:
        """Take back what :meth:`state_dict` gave, and let every method take what it keeps there.

        Raises:
            ValueError: If it is of another model, naming the first tensor that differs.
        """
        self.load_state_dict(saved)
        for method in methods:
            method.on_server_resume(self.state)

    def state_dict(self) -> dict[str, Any]:
        """Everything, as tensors and primitives."""
        return {
            "state_dict": self.state.tensors,
            "masks": pack_masks(self.state.masks),
            "methods": self.state.methods,
            "optimizer": self.optimizer.state_dict(),
            "broadcaster": self.broadcaster.state_dict(),
            "memories": self.memories,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave.

        Raises:
            ValueError: If it is of another model, naming the first tensor that differs.
        """
        tensors = saved["state_dict"]
        expected = {name: tuple(tensor.shape) for name, tensor in self.state.tensors.items()}
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if expected != found:
            name = min(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
            raise ValueError(
                f"expected a checkpoint of this model, got another's: {name!r} has shape {expected.get(name)} in the "
                f"model and {found.get(name)} in the checkpoint"
            )
        weights = {name: tensors[name] for name in self.state.weights}
        buffers = {name: tensors[name] for name in self.state.buffers}
        self.state = replace(
            self.state, weights=weights, buffers=buffers, masks=unpack_masks(saved["masks"]), methods=saved["methods"]
        )
        self.optimizer.load_state_dict(self.state, saved["optimizer"])
        self.broadcaster.load_state_dict(saved["broadcaster"])
        self.memories = saved["memories"]
