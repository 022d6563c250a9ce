"""The interface of methods whose clients hold a part of the model: the submodel of their capacity.

In a federation the server sends each client the values of its submodel and no others; the client trains them and sends
their change; the server, whose weights stay dense, averages each weight over its holders (``MaskedMean``). Weights that
nobody holds keep their bits, under a server optimizer without momentum. A method says which weights a submodel is: by
:meth:`SubmodelCallback.submodel`.

In a plain Trainer the submodel is that of the callback's own capacity, taken anew every ``refresh_every`` optimizer
steps; the other weights wait where they are.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from typing_extensions import override

from lightning_fedsparse.callbacks.base import EffectiveWeightCallback
from lightning_fedsparse.capacities import require_capacity
from lightning_fedsparse.clients import Client
from lightning_fedsparse.effective import EffectiveWeights
from lightning_fedsparse.masks import pack_mask, unpack_mask
from lightning_fedsparse.narrowing import NarrowedBroadcasts
from lightning_fedsparse.rounds import ClientRound, ServerRound, UploadRule
from lightning_fedsparse.server import ServerState
from lightning_fedsparse.submodels import SubmodelTransform
from lightning_fedsparse.update import SparseUpdate, gather, remask

__all__ = ["SubmodelCallback"]


class SubmodelCallback(EffectiveWeightCallback):
    """Base of the methods that train submodels.

    Args:
        capacity: Share of the weights that is held, in (0, 1]: in a plain Trainer, and by clients that have no capacity of
            their own.
        refresh_every: Optimizer steps between submodels in a plain Trainer.
        fold: Whether the module holds the last submodel after a plain ``fit``; otherwise the stored weights.

    Attributes:
        masks: The submodel that is trained: bool by parameter name, None where everything is held.

    Raises:
        ValueError: For a capacity or a period out of range.
    """

    def __init__(self, capacity: float, *, refresh_every: int, fold: bool) -> None:
        super().__init__()
        if refresh_every < 1:
            raise ValueError(f"expected a period of at least 1, got refresh_every={refresh_every}")
        self.capacity = require_capacity(capacity, f"for {type(self).__name__}")
        self.refresh_every = refresh_every
        self.fold = fold
        self.masks: dict[str, Tensor | None] = {}
        self._last_step: int | None = None
        self._received: dict[str, Tensor] = {}
        self._narrowed = NarrowedBroadcasts()

    @property
    def shared(self) -> bool:
        """Whether clients of equal capacity hold the same submodel in a round."""
        return True

    @abstractmethod
    def submodel(self, weights: Mapping[str, Tensor], capacity: float, client_id: str = "") -> dict[str, Tensor]:
        """Which of the server's weights the submodel of a capacity holds.

        Args:
            weights: All of them, by parameter name.
            capacity: In (0, 1].
            client_id: Whose it is, where each client has its own; ``""`` is nobody's, to be evaluated.

        Returns:
            Bool masks by parameter name; parameters that are not named are held by all.
        """

    @abstractmethod
    def refresh(self, pl_module: pl.LightningModule, transform: SubmodelTransform, step: int) -> None:
        """Take another submodel in a plain Trainer: set :attr:`masks` and the transform's; weights are as stored."""

    def refuse_reparametrization(self, pl_module: pl.LightningModule, names: AbstractSet[str], why: str) -> None:
        """Refuse other callbacks' transforms of these weights that come before the submodel; once the fit has started.

        Raises:
            ValueError: Saying why.
        """
        for other in EffectiveWeights.of(pl_module).transforms:
            if (
                other.order < SubmodelTransform.order
                and other.changes_weights
                and (both := sorted(other.names & names))
            ):
                raise ValueError(
                    f"expected {type(self).__name__} beside no reparametrization of the same weights, got one of {both[0]!r}: "
                    f"{why}"
                )

    # -- in a Trainer ----------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit" and self.client_round is None:
            self.masks, self._last_step = {}, None

    @property
    @override
    def folds(self) -> bool:
        return self.fold

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.client_round is None:
            step = self.progress(trainer).step
            # several batches share one step under accumulation: the submodel moves once, before the first of them
            if step % self.refresh_every == 0 and step != self._last_step:
                engine = EffectiveWeights.of(pl_module)
                transform = engine.transform_of(self)
                assert isinstance(transform, SubmodelTransform)
                with engine.stored():
                    self.refresh(pl_module, transform, step)
                self._last_step = step
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    @override
    def state_dict(self) -> dict[str, Any]:
        masks = {name: pack_mask(mask) for name, mask in self.masks.items() if mask is not None}
        return {"masks": masks, "last_step": self._last_step}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.masks = {name: unpack_mask(entry) for name, entry in state_dict["masks"].items()}
        self._last_step = state_dict["last_step"]

    # -- on a client -----------------------------------------------------------------------------------------------

    @override
    def on_client_round_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, client_round: ClientRound
    ) -> None:
        self.masks = dict(client_round.masks)
        self._received = gather(dict(pl_module.named_parameters()), client_round.masks)

    @override
    def on_client_round_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, update: SparseUpdate
    ) -> SparseUpdate:
        assert self.client_round is not None
        if update.kind == "delta":
            return update  # another instance, for other weights, has done it
        if update.masks is not self.client_round.masks:
            raise ValueError(
                "expected an update on the masks of the broadcast to turn into a delta, got one on others: put callbacks "
                f"that change the upload after {type(self).__name__}"
            )
        values = {name: value - self._received[name] for name, value in update.values.items()}
        return replace(update, values=values, kind="delta", absent="unheld")

    # -- on the server ---------------------------------------------------------------------------------------------

    @override
    def client_broadcast(self, state: ServerState, client: Client, broadcast: SparseUpdate) -> SparseUpdate:
        capacity = self.capacity if client.capacity is None else client.capacity
        key = capacity, "" if self.shared else client.id
        return self._narrowed.get(broadcast, key, lambda: self._narrow(state, capacity, client.id, broadcast))

    def _narrow(self, state: ServerState, capacity: float, client_id: str, broadcast: SparseUpdate) -> SparseUpdate:
        if capacity == 1:
            return broadcast
        return remask(broadcast, state.weights, self.submodel(state.weights, capacity, client_id))

    @override
    def upload_rule(self, state: ServerState, server_round: ServerRound) -> UploadRule | None:
        return UploadRule(kind="delta", absent="unheld")

    @override
    def on_server_round_end(self, state: ServerState, server_round: ServerRound) -> ServerState:
        if self.capacity < 1:  # what the checkpoint says of the weights beside them
            self.masks = dict(self.submodel(state.weights, self.capacity))
        return state

    @override
    @torch.no_grad()
    def to_effective_(self, weights: dict[str, Tensor], capacity: float | None = None) -> None:
        masks = self.submodel(weights, self.capacity if capacity is None else capacity)
        for name, mask in masks.items():
            weights[name].mul_(mask.to(weights[name].device))
