"""One mask for the whole run: found after a dense warm-up, by the initial magnitudes, or at random, and frozen.

What a moving mask is worth shows beside one that does not move. With ``positions="warmup"`` (FLASH, SPDST) the warm-up is
round 1 of a federation: clients train densely and send the largest of all their weights; the server takes each layer's
density from them, an average weighted by examples, and keeps so many (truncated) of the largest averaged weights. With
``"magnitude"`` and ``"random"`` (PDST) the densities are a distribution's and the mask is there from the start. From then on
clients train on the mask, send values only, and the server averages.

In a plain Trainer the warm-up is a share of the steps; its one client's densities and its own largest weights are one
global ranking.

References: S. Babakniya, S. Kundu, S. Prakash, Y. Niu, S. Avestimehr, "Revisiting Sparsity Hunting in Federated Learning: Why
does Sparsity Consensus Matter?", TMLR 2023, https://arxiv.org/abs/2208.13092 (FLASH); the warm-up as re-implemented in the
code released with "SparsyFed", ICLR 2025, https://arxiv.org/abs/2504.05153. FLASH's own code finds the densities by sparse training with random regrowth on a
few clients, and starts again from new weights. The re-implementation freezes every parameter that is zero after round 1, and
with them the biases that start at zero; here biases train.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import lightning.pytorch as pl
import torch
from torch import Tensor
from typing_extensions import override

from lightning_fedsparse.callbacks.magnitude_pruning import MagnitudePruning
from lightning_fedsparse.distributions import erk_sparsities, uniform_sparsities
from lightning_fedsparse.masks import kept_counts, random_masks, top_masks
from lightning_fedsparse.rounds import ServerRound, Total, UploadRule
from lightning_fedsparse.schedules import ConstantSchedule, Progress
from lightning_fedsparse.seeding import derive_seed
from lightning_fedsparse.server import ServerState
from lightning_fedsparse.update import SparseUpdate, remask

__all__ = ["FixedMask"]


class FixedMask(MagnitudePruning):
    """Train under one frozen mask.

    Args:
        sparsity: Fraction of zeros over all masked weights, in [0, 1); where counts per layer are truncated, a little more.
        positions: ``"warmup"``: the largest weights after a dense warm-up; ``"magnitude"``: the largest initial weights of
            each layer; ``"random"``: seeded random ones.
        distribution: Densities of the layers without a warm-up: the same for each, or Erdos-Renyi-Kernel (ERK).
        warmup: Share of a plain Trainer's steps that are dense under ``"warmup"``, in [0, 1); in a federation it is round 1.
        include: Globs of parameter names to mask instead of all convolution and linear weights.
        exclude: Globs of parameter names to leave dense.
        fold: Whether the module holds the masked weights after a plain ``fit``; otherwise the stored ones.

    Raises:
        ValueError: At construction for a value out of range or an unknown option; at the start for a model with nothing to
            mask or a glob that matches nothing.
    """

    def __init__(
        self,
        sparsity: float,
        *,
        positions: Literal["warmup", "magnitude", "random"] = "warmup",
        distribution: Literal["uniform", "erk"] = "uniform",
        warmup: float = 0.1,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        fold: bool = True,
    ) -> None:
        super().__init__(
            ConstantSchedule(sparsity), distribution=distribution, include=include, exclude=exclude, fold=fold
        )
        if positions not in ("warmup", "magnitude", "random"):
            raise ValueError(f"expected positions 'warmup', 'magnitude' or 'random', got {positions!r}")
        if not 0 <= warmup < 1:
            raise ValueError(f"expected warmup in [0, 1), got {warmup}")
        self.sparsity = sparsity
        self.positions = positions
        self.warmup = warmup
        self._kept: dict[str, int] = {}
        self._examples = 0

    @override
    def is_due(self, progress: Progress) -> bool:
        if self._last_step is not None:
            return False
        # a warm-up may be rounded up to all steps but the last
        dense = min(self.warmup * progress.finite_total, progress.finite_total - 1)
        return self.positions != "warmup" or progress.step >= dense

    @override
    def initial_masks(self, weights: Mapping[str, Tensor], sparsity: float, seed: int) -> dict[str, Tensor]:
        if self.positions == "warmup":
            return self.masks_at(weights, sparsity)
        shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
        spread = erk_sparsities if self.distribution == "erk" else uniform_sparsities
        kept = kept_counts(shapes, spread(shapes, sparsity))
        if self.positions == "magnitude":
            return top_masks(weights, kept)
        masks = random_masks(shapes, kept, generator=torch.Generator().manual_seed(derive_seed(seed, "fixed_mask")))
        return {name: mask.to(weights[name].device) for name, mask in masks.items()}

    # -- in a federation -------------------------------------------------------------------------------------------

    @override
    def on_client_round_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, update: SparseUpdate
    ) -> SparseUpdate:
        assert self.client_round is not None
        if all(self.client_round.masks[name] is not None for name in self._names):
            return update
        parameters = dict(pl_module.named_parameters())
        weights = {name: parameters[name].detach() for name in self._names}
        return replace(remask(update, weights, self.masks_at(weights, self.sparsity)), absent="zero")

    @override
    def on_server_start(self, pl_module: pl.LightningModule, state: ServerState, seed: int) -> ServerState:
        self._kept, self._examples = {}, 0  # of a round that was cut off
        if self.positions != "warmup":
            return super().on_server_start(pl_module, state, seed)
        self.find_names(pl_module)
        self.masks, self._last_step = {}, None  # of a plain fit before
        return state

    @override
    def upload_rule(self, state: ServerState, server_round: ServerRound) -> UploadRule | None:
        return UploadRule(absent="zero") if self._warms_up(state) else None

    @override
    def on_server_receive(self, state: ServerState, server_round: ServerRound, update: SparseUpdate) -> None:
        if self._warms_up(state):
            for name in self._names:
                self._kept[name] = self._kept.get(name, 0) + update.num_examples * update.values[name].numel()
            self._examples += update.num_examples

    @override
    def on_server_received(self, state: ServerState, server_round: ServerRound, total: Total) -> None:
        if self._warms_up(state):
            kept = total({name: torch.tensor(self._kept.get(name, 0)) for name in self._names})
            self._kept = {name: int(count) for name, count in kept.items()}
            self._examples = int(total({"examples": torch.tensor(self._examples)})["examples"])

    @override
    def on_server_round_end(self, state: ServerState, server_round: ServerRound) -> ServerState:
        if self._warms_up(state):
            # a density times a size is a mean count; integers make its truncation exact
            state.set_masks(
                top_masks(self._weights(state), {name: kept // self._examples for name, kept in self._kept.items()})
            )
            self._kept, self._examples = {}, 0
        state.apply_masks()
        return state

    def _warms_up(self, state: ServerState) -> bool:
        return any(state.masks[name] is None for name in self._names)
