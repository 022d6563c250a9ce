r"""Dynamic sparse training: sparse from start to end, while connections move to where the gradient wants them.

Every layer has its density from an Erdos-Renyi-Kernel distribution at one sparsity, and keeps it. At a reconfiguration
each layer drops the share

.. math:: f_t = \frac{\alpha}{2}\left(1 + \cos\frac{\pi t}{T_\mathrm{end}}\right)

of its weights, the smallest, and grows as many where the gradient of that step is largest, dropped ones among them. What is
grown starts at zero; off the mask weights are zero and have no gradient.

- In a plain Trainer this is RigL: every ``every`` optimizer steps, with the gradient of the batch at hand.
- In a federation it is FedDST: every ``every`` rounds each client moves its mask at the first step of its round, trains on
  what it got, and sends its weights on its own mask. The server averages each weight over the clients that hold it
  (``MaskedMean``; with ``"examples"`` as in the paper) and keeps in every layer the largest, as many as before.

FedDST's released code moves the masks after the local training, by the weights and the last gradient of then: grown
weights arrive as zeros and seldom survive the server. Here, as in RigL, they are trained before they are judged. It also
takes the share twice, :math:`\alpha f_t`, which is ``drop=alpha**2`` here. FedDIP's released code, which has FedDST as
a baseline, ranks by the weights before local training, as here, and grows by squared gradients, which is the same order.

References: S. Bibikar, H. Vikalo, Z. Wang, X. Chen, "Federated Dynamic Sparse Training: Computing Less, Communicating
Less, Yet Learning Better", AAAI 2022, https://arxiv.org/abs/2112.09824. U. Evci, T. Gale, J. Menick, P. S. Castro,
E. Elsen, "Rigging the Lottery: Making All Tickets Winners", ICML 2020, https://arxiv.org/abs/1911.11134.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from typing_extensions import override

from lightning_fedsparse.callbacks.base import EffectiveWeightCallback
from lightning_fedsparse.distributions import erk_sparsities
from lightning_fedsparse.effective import EffectiveWeights
from lightning_fedsparse.masks import kept_counts, pack_mask, top_masks, unpack_mask
from lightning_fedsparse.prunable import prunable_parameters
from lightning_fedsparse.ranking import largest
from lightning_fedsparse.rounds import ClientRound, ServerRound, Total, UploadRule
from lightning_fedsparse.schedules import Progress
from lightning_fedsparse.server import ServerState
from lightning_fedsparse.submodels import SubmodelTransform
from lightning_fedsparse.transforms import Transform, Weights
from lightning_fedsparse.update import SparseUpdate, remask

__all__ = ["DynamicSparseTraining", "moved_mask"]


@torch.no_grad()
def moved_mask(weight: Tensor, gradient: Tensor, mask: Tensor, share: float) -> Tensor:
    """Drop the smallest weights of a layer and grow as many where the gradient is largest.

    Args:
        weight: The layer's weights; among equal ones the higher flat index stays.
        gradient: Of its shape; NaN and infinities count as 0, as a scaler that overflows may leave them.
        mask: Of its shape, bool (True = kept).
        share: Of the kept weights to drop, in [0, 1], rounded down; what is dropped may grow again.

    Returns:
        A bool mask that keeps as many.

    Example:
        >>> w, g = torch.tensor([4.0, 1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 3.0, 2.0])
        >>> moved_mask(w, g, torch.tensor([True, True, False, False]), 0.5)
        tensor([ True, False,  True, False])
    """
    moved = torch.zeros_like(mask).contiguous()
    flat = moved.view(-1)
    kept = mask.reshape(-1).nonzero().squeeze(1)
    count = math.floor(share * len(kept))
    flat[kept[largest(weight.reshape(-1)[kept].abs(), len(kept) - count)]] = True
    free = (~flat).nonzero().squeeze(1)
    flat[free[largest(gradient.reshape(-1)[free].abs().nan_to_num(0.0, 0.0, 0.0), count)]] = True
    return moved


class MovingTransform(SubmodelTransform):
    """Compute with the weights of masks that move at a step for which that was asked, by its gradient."""

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        super().__init__(masks)
        self._shares: dict[str, float] = {}

    @property
    def masks(self) -> dict[str, Tensor]:
        """The masks as they are now."""
        return {name: mask.bool() for name, mask in self._masks.items()}

    def move(self, share: float) -> None:
        """Move every mask at the next step of its weight."""
        self._shares = dict.fromkeys(self.names, share)

    def chain_(self, gradients: Weights, stored: Weights, effective: Weights) -> None:
        """Move the masks by the gradients, which are dense here, and zero the gradients off them."""
        for name, gradient in gradients.items():
            if name in self._shares:
                mask = self._held(name, gradient).bool()
                self._masks[name] = moved = moved_mask(stored[name], gradient, mask, self._shares.pop(name))
                stored[name].mul_(mask & moved)
        super().chain_(gradients, stored, effective)


class DynamicSparseTraining(EffectiveWeightCallback):
    """Train at one sparsity with masks that move by magnitude and gradient.

    Args:
        sparsity: Fraction of zeros over all weights together, in [0, 1), spread over the layers by ERK; the first masks
            are each layer's largest initial weights.
        every: Rounds (federation) or optimizer steps (plain Trainer) between reconfigurations.
        drop: Share of each layer's weights that the first reconfigurations move, in (0, 1]; it falls to 0 at ``end``.
        end: Share of the run, in (0, 1], after which the masks stay.
        fold: Whether the module holds the sparse weights after a plain ``fit``; otherwise the stored ones.
        include: Globs of parameter names to mask instead of all convolution and linear weights.
        exclude: Globs of parameter names to leave dense.

    Raises:
        ValueError: At construction for a value out of range; at the start for a model with nothing to prune or a glob
            that matches nothing; in evaluation for another module than the last one.
    """

    def __init__(
        self,
        sparsity: float,
        *,
        every: int = 10,
        drop: float = 0.5,
        end: float = 0.5,
        fold: bool = True,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if not 0 <= sparsity < 1:
            raise ValueError(f"expected a sparsity in [0, 1), got {sparsity}")
        if every < 1:
            raise ValueError(f"expected a period of at least 1, got every={every}")
        for name, value in (("drop", drop), ("end", end)):
            if not 0 < value <= 1:
                raise ValueError(f"expected {name} in (0, 1], got {value}")
        self.sparsity = sparsity
        self.every = every
        self.drop = drop
        self.end = end
        self.fold = fold
        self.include = tuple(include)
        self.exclude = tuple(exclude)
        self.masks: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._held: dict[str, Tensor] = {}
        self._last_step: int | None = None
        self._key = self._generate_state_key(include=self.include, exclude=self.exclude)

    @property
    def state_key(self) -> str:
        """Tells instances with other selections apart."""
        return self._key

    def share(self, progress: Progress) -> float:
        """Share of the weights that moves at this step or round; 0 where no reconfiguration is due."""
        if progress.step == 0 or progress.step % self.every or progress.fraction >= self.end:
            return 0.0
        return self.drop * (1 + math.cos(math.pi * progress.fraction / self.end)) / 2

    def _find(self, pl_module: pl.LightningModule) -> dict[str, Tensor]:
        """Select the parameters of this module, and count what each keeps."""
        selected = prunable_parameters(pl_module, self.include, exclude=self.exclude)
        shapes = {name: tuple(parameter.shape) for name, parameter in selected.items()}
        self._counts = kept_counts(shapes, erk_sparsities(shapes, self.sparsity))
        return {name: parameter.detach() for name, parameter in selected.items()}

    # -- in a Trainer ----------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit" and self.client_round is None:
            self.masks, self._last_step = {}, None

    @override
    def transform(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Transform | None:
        weights = self._find(pl_module)
        self.masks = self.masks or top_masks(weights, self._counts)
        for name, weight in weights.items():
            if name not in self.masks or self.masks[name].shape != weight.shape:
                raise ValueError(
                    f"expected the module that DynamicSparseTraining trained last, got {type(pl_module).__name__}, whose "
                    f"{name!r} is new or of another shape"
                )
        return MovingTransform(self.masks)

    @property
    @override
    def folds(self) -> bool:
        return self.fold

    @override
    @torch.no_grad()
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        # what is off the mask must not reach momentum by weight decay, and grow from there
        weights = {name: pl_module.get_parameter(name) for name in self.masks}
        self._transform_of(pl_module).apply(weights, weights)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # in a federation the round says whether the masks move, and its first step is when
        step = self.progress(trainer).step
        if step != self._last_step and (share := self.share(self.progress(trainer))) > 0:
            self._transform_of(pl_module).move(share)
        self._last_step = step
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self.masks = self._transform_of(pl_module).masks

    def _transform_of(self, pl_module: pl.LightningModule) -> MovingTransform:
        transform = EffectiveWeights.of(pl_module).transform_of(self)
        assert isinstance(transform, MovingTransform)
        return transform

    @override
    def state_dict(self) -> dict[str, Any]:
        masks = {name: pack_mask(mask) for name, mask in self.masks.items()}
        return {"masks": masks, "last_step": self._last_step}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.masks = {name: unpack_mask(entry) for name, entry in state_dict["masks"].items()}
        self._last_step = state_dict["last_step"]

    # -- in a federation -------------------------------------------------------------------------------------------

    @override
    def on_client_round_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, client_round: ClientRound
    ) -> None:
        masks = {name: client_round.masks[name] for name in self._find(pl_module)}
        self.masks = {name: mask for name, mask in masks.items() if mask is not None}
        self._last_step = None

    @override
    def on_client_round_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, update: SparseUpdate
    ) -> SparseUpdate:
        assert self.client_round is not None
        if self.share(self.client_round.progress) == 0:
            return replace(update, absent="unheld")
        return replace(remask(update, dict(pl_module.named_parameters()), self.masks), absent="unheld")

    @override
    def on_server_start(self, pl_module: pl.LightningModule, state: ServerState, seed: int) -> ServerState:
        self.masks, self._held = {}, {}
        names = self._find(pl_module)
        state.set_masks(top_masks({name: state.weights[name] for name in names}, self._counts))
        return state

    @override
    def upload_rule(self, state: ServerState, server_round: ServerRound) -> UploadRule | None:
        share = self.share(server_round.progress)
        return UploadRule(absent="unheld", extra_values=sum(math.floor(share * n) for n in self._counts.values()))

    @override
    def on_server_receive(self, state: ServerState, server_round: ServerRound, update: SparseUpdate) -> None:
        for name in self._counts:
            mask = update.masks[name]
            held = torch.ones_like(state.weights[name], dtype=torch.bool) if mask is None else mask
            self._held[name] = self._held[name] | held if name in self._held else held

    @override
    def on_server_received(self, state: ServerState, server_round: ServerRound, total: Total) -> None:
        holders = total({name: held.to(torch.int32) for name, held in self._held.items()})
        self._held = {name: count > 0 for name, count in holders.items()}

    @override
    def on_server_round_end(self, state: ServerState, server_round: ServerRound) -> ServerState:
        held, self._held = self._held, {}
        if self.share(server_round.progress) > 0:
            # the mean leaves what nobody holds any more as it was
            weights = {name: state.weights[name] * held[name] for name in self._counts}
            state.set_masks(top_masks(weights, self._counts))
        return state
