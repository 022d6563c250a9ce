r"""What a lossy upload left behind, kept on the client and added back in its next round.

.. math:: e_k \leftarrow (w_k - w_G) - \hat\Delta_k, \qquad w_k \leftarrow w_G + e_k \ \text{at the next round's start}

where :math:`w_G` is the broadcast, :math:`w_k` the client's trained weights, and :math:`\hat\Delta_k` the change that the
server reads from the upload. For FedDIP's masked uploads that is the client's weights off the mask ("residual"), and the
rounding errors where values are rounded on the wire.

When the masks have moved since, the residual is added only where the new masks keep a weight, then dropped elsewhere.

Reference: S. U. Stich, J.-B. Cordonnier, M. Jaggi, "Sparsified SGD with Memory", NeurIPS 2018,
https://arxiv.org/abs/1809.07599. Dense gradients at pruned weights are another thing: see ``ErrorFeedback``. With few
clients per round most residuals wait for long or are never used, so the memory is off by default in ``feddip``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from typing_extensions import override

from lightning_fedsparse.callbacks.base import SparsityCallback
from lightning_fedsparse.prunable import prunable_parameters
from lightning_fedsparse.rounds import ClientRound
from lightning_fedsparse.update import SparseUpdate, reconstruct

__all__ = ["CompressionMemory"]


class CompressionMemory(SparsityCallback):
    """Keep what the upload lost and add it back: what stays off its mask, and what rounding takes from its values.

    It acts in a federation only: a plain Trainer sends nothing.

    Args:
        include: Globs of parameter names to remember instead of all convolution and linear weights.
        exclude: Globs of parameter names to leave out.
    """

    def __init__(self, *, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> None:
        super().__init__()
        self.include = tuple(include)
        self.exclude = tuple(exclude)
        self._residual: dict[str, Tensor] = {}
        self._mask_id: str | None = None
        self._broadcast: dict[str, Tensor] = {}
        self._key = self._generate_state_key(include=self.include, exclude=self.exclude)

    @property
    def state_key(self) -> str:
        """Tells instances with other selections apart."""
        return self._key

    @override
    @torch.no_grad()
    def on_client_round_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, client_round: ClientRound
    ) -> None:
        weights = prunable_parameters(pl_module, self.include, exclude=self.exclude)
        self._broadcast = {name: weight.detach().clone() for name, weight in weights.items()}
        moved = self._mask_id != client_round.masks.id
        for name, residual in self._residual.items():
            mask = client_round.masks[name]
            weights[name].add_(residual * mask if moved and mask is not None else residual)
        self._mask_id = client_round.masks.id

    @override
    @torch.no_grad()
    def on_client_upload(self, trainer: pl.Trainer, pl_module: pl.LightningModule, update: SparseUpdate) -> None:
        weights = prunable_parameters(pl_module, self.include, exclude=self.exclude)
        received = reconstruct(self._broadcast, update)
        self._residual = {name: weight - received[name] for name, weight in weights.items()}
        self._broadcast = {}

    @override
    def client_state_dict(self) -> dict[str, Any]:
        return {"residual": self._residual, "mask_id": self._mask_id}

    @override
    def load_client_state_dict(self, state: dict[str, Any]) -> None:
        self._residual = state["residual"]
        self._mask_id = state["mask_id"]
