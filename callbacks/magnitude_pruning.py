"""Magnitude pruning on a schedule: the smallest weights leave, at an absolute target sparsity.

At every reconfiguration the mask keeps the weights of largest magnitude so that the fraction of zeros is exactly the
scheduled sparsity. Targets are absolute: pruning twice at 0.5 is 0.5. Used alone, a pruned weight is zero and stays so
(gradual magnitude pruning: M. Zhu, S. Gupta, "To prune, or not to prune", ICLR 2018 workshop,
https://arxiv.org/abs/1710.01878); beside ``ErrorFeedback`` the stored weights stay dense, pruned ones keep learning and
may return.

- In a plain Trainer time is counted in optimizer steps; at the last one the final sparsity is reached exactly, and the
  module holds the pruned weights when ``fit`` returns.
- In a federation time is counted in rounds, the server prunes the aggregate, and clients train on the broadcast masks.

Use it for a sparse model from any Lightning training. It saves bytes and storage; dense kernels run no faster.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor
from typing_extensions import override

from lightning_fedsparse.callbacks.base import EffectiveWeightCallback
from lightning_fedsparse.distributions import erk_sparsities, uniform_sparsities
from lightning_fedsparse.effective import EffectiveWeights
from lightning_fedsparse.masks import magnitude_masks, pack_mask, unpack_mask
from lightning_fedsparse.prunable import prunable_parameters
from lightning_fedsparse.rounds import ClientRound, ServerRound
from lightning_fedsparse.schedules import Progress, Schedule, require_sparsities
from lightning_fedsparse.server import ServerState
from lightning_fedsparse.transforms import MaskTransform, Transform

__all__ = ["MagnitudePruning", "scheduled_masks"]


def scheduled_masks(
    weights: Mapping[str, Tensor],
    sparsity: float,
    *,
    scope: Literal["global", "layer"],
    distribution: Literal["uniform", "erk"],
) -> dict[str, Tensor]:
    """Magnitude masks at one sparsity for the model.

    Args:
        weights: Weights by name.
        sparsity: Fraction of zeros over all weights, in [0, 1).
        scope: ``"global"``: one ranking over all weights; ``"layer"``: one per layer.
        distribution: How ``sparsity`` is spread over the layers when ``scope`` is ``"layer"``.
    """
    if scope == "global":
        return magnitude_masks(weights, sparsity)
    shapes = {name: weight.shape for name, weight in weights.items()}
    spread = erk_sparsities if distribution == "erk" else uniform_sparsities
    return magnitude_masks(weights, spread(shapes, sparsity), scope="layer")


class MagnitudePruning(EffectiveWeightCallback):
    """Prune by magnitude along a schedule.

    Args:
        schedule: Sparsity over the pruning time, from ``start`` to ``end``; values in [0, 1), at the end not below the start.
        every: Rounds (federation) or optimizer steps (plain Trainer) between reconfigurations.
        start: Share of the run before which nothing is pruned.
        end: Share of the run at which the schedule's end is reached; from there on the masks stay as they are, so that
            the rest of the run trains the weights that are left.
        scope: One ranking over the whole model (``"global"``) or one per layer (``"layer"``).
        distribution: With ``scope="layer"``: the same sparsity in each layer, or Erdos-Renyi-Kernel (ERK).
        include: Globs of parameter names to prune instead of all convolution and linear weights.
        exclude: Globs of parameter names to leave dense.
        fold: Whether the module holds the pruned weights after a plain ``fit``; otherwise the stored ones.

    Raises:
        ValueError: At construction for a schedule or times out of range; at the start of ``fit`` for a model with
            nothing to prune or a glob that matches nothing; in evaluation for a module of other shapes than the last
            one, whose masks still hold.
    """

    def __init__(
        self,
        schedule: Schedule,
        *,
        every: int = 16,
        start: float = 0.0,
        end: float = 0.75,
        scope: Literal["global", "layer"] = "global",
        distribution: Literal["uniform", "erk"] = "uniform",
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        fold: bool = True,
    ) -> None:
        super().__init__()
        require_sparsities(schedule)
        if every < 1:
            raise ValueError(f"expected a period of at least 1, got every={every}")
        if not 0 <= start < end <= 1:
            raise ValueError(f"expected 0 <= start < end <= 1, got start={start} and end={end}")
        if scope not in ("global", "layer"):
            raise ValueError(f"expected scope 'global' or 'layer', got {scope!r}")
        if distribution not in ("uniform", "erk"):
            raise ValueError(f"expected distribution 'uniform' or 'erk', got {distribution!r}")
        self.schedule = schedule
        self.every = every
        self.start = start
        self.end = end
        self.scope = scope
        self.distribution = distribution
        self.include = tuple(include)
        self.exclude = tuple(exclude)
        self.fold = fold
        self.masks: dict[str, Tensor] = {}
        self._names: list[str] = []
        self._last_step: int | None = None
        self._key = self._generate_state_key(include=self.include, exclude=self.exclude)

    @property
    def state_key(self) -> str:
        """Tells instances with other selections apart."""
        return self._key

    def find_names(self, pl_module: pl.LightningModule) -> None:
        """Select the parameters of this module."""
        self._names = list(prunable_parameters(pl_module, self.include, exclude=self.exclude))

    def target(self, progress: Progress) -> float | None:
        """Scheduled sparsity, None before ``start``."""
        fraction = progress.fraction
        if fraction < self.start:
            return None
        return self.schedule(min(1.0, (fraction - self.start) / (self.end - self.start)))

    def is_due(self, progress: Progress) -> bool:
        """Whether masks are recomputed at this step: every ``every`` steps until the one that reaches ``end``."""
        before = (progress.step - 1) / progress.finite_total
        return before < self.end and (progress.step % self.every == 0 or self.end <= progress.fraction < 1)

    def initial_masks(self, weights: Mapping[str, Tensor], sparsity: float, seed: int) -> dict[str, Tensor]:
        """The run's first masks; ``seed`` is for methods that draw them."""
        return self.masks_at(weights, sparsity)

    def masks_at(self, weights: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
        """Masks of these weights at this sparsity."""
        return scheduled_masks(weights, sparsity, scope=self.scope, distribution=self.distribution)

    # -- in a Trainer ----------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit" and self.client_round is None:
            self.masks, self._last_step = {}, None

    @override
    def transform(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Transform | None:
        self.find_names(pl_module)
        parameters = dict(pl_module.named_parameters())
        masks = {}
        for name in self._names:
            weight = parameters[name]
            mask = self.masks.get(name, torch.ones_like(weight, dtype=torch.bool))
            if mask.shape != weight.shape:
                raise ValueError(
                    f"expected the module that {type(self).__name__} pruned last, got {type(pl_module).__name__} whose "
                    f"{name!r} has shape {tuple(weight.shape)} where the mask has {tuple(mask.shape)}"
                )
            masks[name] = mask.to(weight.device)
        self.masks = masks
        return MaskTransform(masks)

    @property
    @override
    def folds(self) -> bool:
        return self.fold

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.client_round is None:
            progress = self.progress(trainer)
            # several batches share one step under accumulation: the masks move once, before the first of them
            if progress.step != self._last_step and self.is_due(progress):
                self._prune(trainer, pl_module, progress)
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self.client_round is None:
            progress = self.progress(trainer)
            # here and not at the end of fit: the last epoch's validation and checkpoint see the final sparsity
            if self.end == 1 and progress.fraction == 1 and progress.step != self._last_step:
                self._prune(trainer, pl_module, progress)

    def _prune(self, trainer: pl.Trainer, pl_module: pl.LightningModule, progress: Progress) -> None:
        sparsity = self.target(progress)
        if sparsity is None:
            return
        engine = EffectiveWeights.of(pl_module)
        transform = engine.transform_of(self)
        assert isinstance(transform, MaskTransform)
        parameters = dict(pl_module.named_parameters())
        with engine.stored(), torch.no_grad():
            weights = {name: parameters[name].detach() for name in self._names}
            if not transform.straight_through:
                # momentum may have moved weights that are out: they stay out of the ranking
                transform.apply(weights, weights)
            if self._last_step is None:
                self.masks = self.initial_masks(weights, sparsity, torch.initial_seed())
            else:
                self.masks = self.masks_at(weights, sparsity)
            transform.set(self.masks)
            if not transform.straight_through:
                # without feedback a pruned weight is gone; left in place it would come back with its old value
                transform.apply(weights, weights)
        self._last_step = progress.step

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
        self.find_names(pl_module)
        self.masks = {name: mask for name in self._names if (mask := client_round.masks[name]) is not None}

    @override
    def on_server_start(self, pl_module: pl.LightningModule, state: ServerState, seed: int) -> ServerState:
        self.find_names(pl_module)
        self.masks, self._last_step = {}, None  # of a plain fit before
        sparsity = self.target(Progress(0, 1))
        if sparsity is not None:
            state.set_masks(self.initial_masks(self._weights(state), sparsity, seed))
        return state

    @override
    def on_server_round_end(self, state: ServerState, server_round: ServerRound) -> ServerState:
        state.apply_masks()
        self.reconfigure(state, Progress(server_round.index + 1, server_round.total))
        return state

    def reconfigures(self, coming: Progress) -> bool:
        """Whether the server's masks move before the coming round; there is none after the last."""
        return coming.fraction < 1 and self.is_due(coming)

    def reconfigure(self, state: ServerState, coming: Progress) -> None:
        """Recompute the server's masks if that is due before the coming round."""
        sparsity = self.target(coming)
        if self.reconfigures(coming) and sparsity is not None:
            state.set_masks(self.masks_at(self._weights(state), sparsity))

    def _weights(self, state: ServerState) -> dict[str, Tensor]:
        return {name: state.weights[name] for name in self._names}
