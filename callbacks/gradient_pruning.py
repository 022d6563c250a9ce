r"""Gradient pruning: the weights that the gradient pulls hardest are kept, pruned ones among them.

At every reconfiguration the mask keeps the weights of largest importance at the scheduled sparsity, over the whole model,

.. math:: I_j = \Big(\sum_t g_{t,j}\Big)^2

with the gradients :math:`g_t` at the sparse weights since the last one, dense: those of pruned weights too. Kept weights keep
their values, returning ones start at zero. The first mask is by magnitude.

- In a plain Trainer gradients are summed at every optimizer step.
- In a federation clients learn densely at the sparse weights in the round before a reconfiguration, and send all their
  weights. What the server's average has moved is the sum of gradients times the learning rate, under plain SGD. Such a
  round's uploads are dense; in all others values on the mask travel.

This is PruneFL's reconfiguration. The paper adds up squared gradients of single steps, :math:`\sum_t g_t^2`, which clients would
have to send beside their weights; it divides the importance by the time that a layer takes, and begins with rounds on one
client. None of that is here.

Reference: Y. Jiang, S. Wang, V. Valls, B. J. Ko, W.-H. Lee, K. K. Leung, L. Tassiulas, "Model Pruning Enables Efficient
Federated Learning on Edge Devices", IEEE TNNLS 2022, https://arxiv.org/abs/1909.12326.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from typing_extensions import override

from lightning_fedsparse.callbacks.magnitude_pruning import MagnitudePruning
from lightning_fedsparse.masks import magnitude_masks
from lightning_fedsparse.rounds import ClientRound, ServerRound, Total, UploadRule
from lightning_fedsparse.schedules import Progress, Schedule
from lightning_fedsparse.server import ServerState
from lightning_fedsparse.transforms import MaskTransform, Transform, Weights
from lightning_fedsparse.update import SparseUpdate, remask

__all__ = ["GradientPruning"]


class _Summing(MaskTransform):
    """Masks that add up the dense gradients which they are about to cut."""

    def __init__(self, masks: Weights, sums: dict[str, Tensor]) -> None:
        super().__init__(masks)
        self._sums = sums

    def chain_(self, gradients: Weights, stored: Weights, effective: Weights) -> None:
        """Add the gradients, then mask them."""
        for name, gradient in gradients.items():
            # a scaler that overflows leaves infinities, in a step that is then skipped
            finite = gradient.nan_to_num(0.0, 0.0, 0.0)
            held = self._sums.get(name)
            self._sums[name] = finite if held is None else held.to(finite).add_(finite)
        super().chain_(gradients, stored, effective)


class GradientPruning(MagnitudePruning):
    """Prune and regrow by accumulated gradients along a schedule.

    Args:
        schedule: Sparsity over the pruning time, up to ``end``; values in [0, 1), at the end not below the start.
        every: Rounds (federation) or optimizer steps (plain Trainer) between reconfigurations.
        end: Share of the run at which the schedule's end is reached and the masks stop moving.
        fold: Whether the module holds the pruned weights after a plain ``fit``; otherwise the stored ones.
        include: Globs of parameter names to prune instead of all convolution and linear weights.
        exclude: Globs of parameter names to leave dense.

    Raises:
        ValueError: As ``MagnitudePruning``.
    """

    def __init__(
        self,
        schedule: Schedule,
        *,
        every: int = 20,
        end: float = 0.75,
        fold: bool = True,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
    ) -> None:
        super().__init__(schedule, every=every, end=end, fold=fold, include=include, exclude=exclude)
        self._sums: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}

    @override
    def masks_at(self, weights: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
        pulls = weights
        if self._sums:
            # a frozen weight has no gradient
            pulls = {name: self._sums.get(name, torch.zeros_like(weight)) for name, weight in weights.items()}
        masks = magnitude_masks(pulls, sparsity)
        self._sums.clear()
        return masks

    # -- in a Trainer ----------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._sums.clear()

    @override
    def transform(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Transform | None:
        super().transform(trainer, pl_module)
        if self.client_round is None:
            return _Summing(self.masks, self._sums)
        masks = MaskTransform(self.masks)
        # off the mask the stored weights then gather the gradients
        masks.straight_through = self.reconfigures(_coming(self.client_round))
        return masks

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "sums": dict(self._sums)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._sums = dict(state_dict["sums"])

    # -- in a federation -------------------------------------------------------------------------------------------

    @override
    def on_server_start(self, pl_module: pl.LightningModule, state: ServerState, seed: int) -> ServerState:
        self._sums, self._before = {}, {}
        return super().on_server_start(pl_module, state, seed)

    @override
    def on_client_round_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, update: SparseUpdate
    ) -> SparseUpdate:
        assert self.client_round is not None
        if not self.reconfigures(_coming(self.client_round)):
            return update
        return remask(update, dict(pl_module.named_parameters()), dict.fromkeys(self._names))

    @override
    def upload_rule(self, state: ServerState, server_round: ServerRound) -> UploadRule | None:
        if not self.reconfigures(_coming(server_round)):
            return None
        masks = [mask for name in self._names if (mask := state.masks[name]) is not None]
        return UploadRule(extra_values=sum(int((~mask).count_nonzero()) for mask in masks))

    @override
    def on_server_received(self, state: ServerState, server_round: ServerRound, total: Total) -> None:
        if self.reconfigures(_coming(server_round)):
            self._before = {name: weight.clone() for name, weight in self._weights(state).items()}

    @override
    def on_server_round_end(self, state: ServerState, server_round: ServerRound) -> ServerState:
        self._sums = {name: state.weights[name] - before for name, before in self._before.items()}
        self._before = {}
        return super().on_server_round_end(state, server_round)


def _coming(this: ClientRound | ServerRound) -> Progress:
    return Progress(this.index + 1, this.total)
