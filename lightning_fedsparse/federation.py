"""What a federation carries from round to round on the server's side, as one thing to save and restore."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_fedsparse.broadcasting import Broadcaster, pack_masks, unpack_masks
from lightning_fedsparse.callbacks.base import SparsityCallback
from lightning_fedsparse.memories import ClientMemories, HeldMemories
from lightning_fedsparse.resuming import require_same_model
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
        methods: The sparsity callbacks, in the order in which they act.
        memories: What each client's callbacks remember, by client id.
        cohort: Clients whose updates are in the last server step.
    """

    state: ServerState
    optimizer: ServerOptimizer
    broadcaster: Broadcaster = field(default_factory=Broadcaster)
    methods: Sequence[SparsityCallback] = ()
    memories: ClientMemories = field(default_factory=HeldMemories)
    cohort: list[str] = field(default_factory=list)

    def start(self, module: pl.LightningModule, seed: int) -> None:
        """Let every method make its server's state, before round 0 and before a checkpoint replaces it."""
        for position, method in enumerate(self.methods):
            self.state = method.on_server_start(module, self.state, derive_seed(seed, "method", position))

    def digest(self) -> tuple[int, str]:
        """What tells whether two processes have the same weights, buffers and masks: a checksum and the masks' id."""
        checksum = 0
        for tensor in self.state.tensors.values():
            checksum = zlib.crc32(tensor.detach().reshape(-1).view(torch.uint8).numpy().data, checksum)
        return checksum, self.state.masks.id

    def state_dict(self) -> dict[str, Any]:
        """Everything, as tensors and primitives."""
        return {
            "state_dict": self.state.tensors,
            "masks": pack_masks(self.state.masks),
            "methods": self.state.methods,
            # under the name of a Trainer's checkpoint, as the weights are, so that load_folded reads both
            "callbacks": {method.state_key: method.state_dict() for method in self.methods},
            "optimizer": self.optimizer.state_dict(),
            "broadcaster": self.broadcaster.state_dict(),
            "cohort": self.cohort,
            **self.memories.state_dict(),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave, and let every method take what it keeps there.

        Raises:
            ValueError: If it is of another model, naming the first tensor that differs.
        """
        tensors = saved["state_dict"]
        require_same_model(tensors, self.state.tensors)
        weights = {name: tensors[name] for name in self.state.weights}
        buffers = {name: tensors[name] for name in self.state.buffers}
        self.state = replace(
            self.state, weights=weights, buffers=buffers, masks=unpack_masks(saved["masks"]), methods=saved["methods"]
        )
        self.optimizer.load_state_dict(self.state, saved["optimizer"])
        self.broadcaster.load_state_dict(saved["broadcaster"])
        self.cohort = saved["cohort"]
        self.memories.load_state_dict(saved)
        for method in self.methods:
            method.on_server_resume(self.state)
