"""FedDIP's masks: an ERK start, then global magnitude with a way back for pruned weights.

Round 0 uses the densities of an Erdos-Renyi-Kernel distribution; every ``every`` rounds the server recomputes one
global magnitude mask at the scheduled sparsity. Between reconfigurations clients train with ``ErrorFeedback`` and send
the values on the mask. What a client's pruned weights have learned would be lost: ``regrow`` says how much of it
reaches the server.

Reference: Q. Long, C. Anagnostopoulos, S. P. Parambath, D. Bi, "FedDIP: Federated Learning with Extreme Dynamic
Pruning and Incremental Regularization", ICDM 2023, https://arxiv.org/abs/2309.06805. The paper's abstract claims dynamic
pruning with error feedback; the released code re-applies the old mask before it computes the new one, so its masks only
shrink. That behaviour is ``regrow="nested"`` with ``upload="dense"`` and ``erk_positions="random_per_client"``; the
defaults here follow the abstract.
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
from lightning_fedsparse.distributions import erk_sparsities
from lightning_fedsparse.masks import kept_counts, magnitude_masks, random_masks, top_masks
from lightning_fedsparse.rounds import ClientRound, ServerRound, UploadRule
from lightning_fedsparse.schedules import Progress, Schedule
from lightning_fedsparse.seeding import derive_seed
from lightning_fedsparse.server import ServerState
from lightning_fedsparse.update import MaskSet, SparseUpdate, gather

__all__ = ["DynamicPruning", "candidate_masks"]

Positions = Literal["magnitude", "random", "random_per_client"]
Regrow = Literal["candidates", "nested", "dense"]


@torch.no_grad()
def candidate_masks(
    weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], sparsity: float, limit: int
) -> dict[str, Tensor]:
    """Pruned weights that would be kept at the next sparsity: what a client proposes to regrow.

    Args:
        weights: The client's dense weights by name.
        masks: The masks in force, bool, by the same names.
        sparsity: Fraction of zeros at the coming reconfiguration, in [0, 1).
        limit: At most so many candidates, the largest first; among equal ones the higher flat index first.

    Returns:
        Bool masks that are True at the candidates only.
    """
    kept = magnitude_masks(weights, sparsity)
    candidates = {name: kept[name] & ~masks[name] for name in weights}
    count = sum(int(mask.count_nonzero()) for mask in candidates.values())
    if count <= limit:
        return candidates
    total = sum(weight.numel() for weight in weights.values())
    outside = {name: torch.where(candidates[name], weight, 0) for name, weight in weights.items()}
    largest = magnitude_masks(outside, (total - limit) / total)
    return {name: largest[name] & candidates[name] for name in weights}


class DynamicPruning(MagnitudePruning):
    """Magnitude pruning with FedDIP's start and regrowth.

    Args:
        schedule: Sparsity over the run; values in [0, 1), not decreasing.
        every: Rounds (federation) or optimizer steps (plain Trainer) between reconfigurations.
        erk_positions: Positions of the first mask inside each layer's ERK density: ``"magnitude"``, the largest initial
            weights; ``"random"``, one seeded mask; ``"random_per_client"`` (released code), a dense broadcast in round
            0 and a random mask of each client's own, the first common mask at that round's end.
        regrow: ``"candidates"``: in the round before a reconfiguration clients also send pruned weights that belong to
            their own largest at the next sparsity; ``"nested"`` (released code): weights never return; ``"dense"``:
            dense uploads and a dense aggregate.
        upload: ``"masked"``: values on the mask; ``"dense"`` (released code): all of them. ``regrow="dense"`` uploads
            all values in any case.
        max_candidates: Most candidates that one upload may hold, as a share of the mask's kept weights.
        end: Share of the run at which the final sparsity is reached and the masks stop moving; FedDIP's never stop.
        include: Globs of parameter names to prune instead of all convolution and linear weights.
        exclude: Globs of parameter names to leave dense.

    Raises:
        ValueError: As ``MagnitudePruning``; for an unknown option; for dense uploads with candidates, which they hold.
    """

    def __init__(
        self,
        schedule: Schedule,
        *,
        every: int = 5,
        erk_positions: Positions = "magnitude",
        regrow: Regrow = "candidates",
        upload: Literal["masked", "dense"] = "masked",
        max_candidates: float = 0.1,
        end: float = 1.0,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
    ) -> None:
        super().__init__(schedule, every=every, end=end, include=include, exclude=exclude)
        for name, value, allowed in (
            ("erk_positions", erk_positions, ("magnitude", "random", "random_per_client")),
            ("regrow", regrow, ("candidates", "nested", "dense")),
            ("upload", upload, ("masked", "dense")),
        ):
            if value not in allowed:
                raise ValueError(f"expected {name} to be one of {', '.join(map(repr, allowed))}, got {value!r}")
        if upload == "dense" and regrow == "candidates":
            raise ValueError(
                "expected regrow='nested' or regrow='dense' with upload='dense', got regrow='candidates': a dense "
                "upload holds every pruned weight already"
            )
        if not 0 <= max_candidates <= 1:
            raise ValueError(f"expected max_candidates in [0, 1], got {max_candidates}")
        self.erk_positions = erk_positions
        self.regrow = regrow
        self.uploads_all = upload == "dense" or regrow == "dense"
        self.max_candidates = max_candidates

    @override
    def initial_masks(self, weights: Mapping[str, Tensor], sparsity: float, seed: int) -> dict[str, Tensor]:
        shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
        kept = kept_counts(shapes, erk_sparsities(shapes, sparsity))
        if self.erk_positions == "magnitude":
            return top_masks(weights, kept)
        masks = random_masks(shapes, kept, generator=torch.Generator().manual_seed(derive_seed(seed, "erk")))
        return {name: mask.to(weights[name].device) for name, mask in masks.items()}

    @override
    def on_client_round_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, client_round: ClientRound
    ) -> None:
        super().on_client_round_start(trainer, pl_module, client_round)
        sparsity = self.target(client_round.progress)
        if self.erk_positions == "random_per_client" and not self.masks and sparsity is not None:
            self.masks = self.initial_masks(self._client_weights(pl_module), sparsity, client_round.seed)

    @override
    def on_client_round_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, update: SparseUpdate
    ) -> SparseUpdate:
        assert self.client_round is not None
        if self.uploads_all:
            return self._with_masks(pl_module, update, dict.fromkeys(self._names))
        coming = Progress(self.client_round.index + 1, self.client_round.total)
        masks = {name: mask for name in self._names if (mask := self.client_round.masks[name]) is not None}
        sparsity = self.target(coming)
        if self.regrow != "candidates" or not masks or sparsity is None or not self.reconfigures(coming):
            return update
        candidates = candidate_masks(self._client_weights(pl_module), masks, sparsity, self._max_candidates(masks))
        return self._with_masks(pl_module, update, {name: masks[name] | candidates[name] for name in masks})

    @override
    def on_server_start(self, pl_module: pl.LightningModule, state: ServerState, seed: int) -> ServerState:
        if self.erk_positions != "random_per_client":
            return super().on_server_start(pl_module, state, seed)
        self.find_names(pl_module)
        return state

    @override
    def on_server_round_end(self, state: ServerState, server_round: ServerRound) -> ServerState:
        if self.regrow == "nested":
            state.apply_masks()
        if self.erk_positions == "random_per_client":
            # the released code makes a mask at the end of round 0, R, 2R... with that round's sparsity
            progress = server_round.progress
            sparsity = self.target(progress)
            if progress.step % self.every == 0 and sparsity is not None:
                state.set_masks(self.masks_at(self._weights(state), sparsity))
        else:
            self.reconfigure(state, Progress(server_round.index + 1, server_round.total))
        state.apply_masks()
        return state

    @override
    def upload_rule(self, state: ServerState, server_round: ServerRound) -> UploadRule | None:
        masks = {name: mask for name in self._names if (mask := state.masks[name]) is not None}
        if self.uploads_all:
            return UploadRule(extra_values=sum(int((~mask).count_nonzero()) for mask in masks.values()))
        coming = Progress(server_round.index + 1, server_round.total)
        if self.regrow == "candidates" and self.reconfigures(coming):
            return UploadRule(extra_values=self._max_candidates(masks))
        return None

    def _max_candidates(self, masks: Mapping[str, Tensor]) -> int:
        return int(self.max_candidates * sum(int(mask.count_nonzero()) for mask in masks.values()))

    def _client_weights(self, pl_module: pl.LightningModule) -> dict[str, Tensor]:
        parameters = dict(pl_module.named_parameters())
        return {name: parameters[name].detach() for name in self._names}

    def _with_masks(
        self, pl_module: pl.LightningModule, update: SparseUpdate, masks: Mapping[str, Tensor | None]
    ) -> SparseUpdate:
        values = gather(dict(pl_module.named_parameters()), masks)
        # the order of names is the model's: a mapping that is merged keeps it
        merged = MaskSet.of({**update.masks, **masks})
        mask_id = None if merged.is_dense else merged.id
        return replace(update, values={**update.values, **values}, masks=merged, mask_id=mask_id)
