"""FedDIP's masks: an ERK start, then global magnitude with a way back for pruned weights.

Round 0 uses the densities of an Erdos-Renyi-Kernel distribution; every ``every`` rounds the server recomputes one
global magnitude mask at the scheduled sparsity. Between reconfigurations clients train with ``ErrorFeedback`` and send
the values on the mask. What a client's pruned weights have learned would be lost: ``regrow`` says how much of it
reaches the server.

A client whose capacity, the share of the prunable weights that it can hold, is below the mask's density gets the largest
weights of the mask, as many as it can hold, trains and sends these. The server then averages every weight over the clients
that hold it, weighted by examples, and what none holds stays as it is; candidates come from clients that hold the whole mask.

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
from lightning_fedsparse.capacities import held_count
from lightning_fedsparse.clients import Client
from lightning_fedsparse.distributions import erk_sparsities
from lightning_fedsparse.masks import kept_counts, magnitude_masks, random_masks, top_masks
from lightning_fedsparse.narrowing import NarrowedBroadcasts
from lightning_fedsparse.ranking import largest
from lightning_fedsparse.rounds import ClientRound, ServerRound, Total, UploadRule
from lightning_fedsparse.schedules import Progress, Schedule
from lightning_fedsparse.seeding import derive_seed
from lightning_fedsparse.server import ServerState
from lightning_fedsparse.update import SparseUpdate, remask

__all__ = ["DynamicPruning", "candidate_masks", "masks_within"]

Positions = Literal["magnitude", "random", "random_per_client"]
Regrow = Literal["candidates", "nested", "dense"]


@torch.no_grad()
def masks_within(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Masks of the largest of those weights that the given masks keep, in one ranking.

    Args:
        weights: Weights by name.
        masks: Bool masks by the same names.
        count: How many to keep, at least 0; among equal ones the higher flat index first.

    Returns:
        New masks inside the given ones, or these where they keep no more than ``count``.

    Example:
        >>> masks_within({"w": torch.tensor([4.0, 1.0, -3.0])}, {"w": torch.tensor([False, True, True])}, 1)
        {'w': tensor([False, False,  True])}
    """
    if sum(int(mask.count_nonzero()) for mask in masks.values()) <= count:
        return dict(masks)
    # a weight of zero that a mask keeps ranks above all that it doesn't
    pool = [weight.abs().clamp_min(torch.finfo(weight.dtype).tiny) * masks[name] for name, weight in weights.items()]
    kept = largest(torch.cat([part.reshape(-1) for part in pool]), count)
    parts = torch.split(kept, [part.numel() for part in pool])
    return {name: part.view(weights[name].shape).clone() for name, part in zip(weights, parts, strict=True)}


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
    return masks_within(weights, {name: kept[name] & ~masks[name] for name in weights}, limit)


class DynamicPruning(MagnitudePruning):
    """Magnitude pruning with FedDIP's start and regrowth.

    Args:
        schedule: Sparsity over the run; values in [0, 1), at the end not below the start.
        every: Rounds (federation) or optimizer steps (plain Trainer) between reconfigurations.
        erk_positions: Positions of the first mask inside each layer's ERK density: ``"magnitude"``, the largest initial
            weights; ``"random"``, one seeded mask; ``"random_per_client"`` (released code), a dense broadcast in round
            0 and a random mask of each client's own, the first common mask at that round's end.
        regrow: In a federation, ``"candidates"``: in the round before a reconfiguration clients also send pruned weights that belong to
            their own largest at the next sparsity; ``"nested"`` (released code): weights never return; ``"dense"``:
            dense uploads and a dense aggregate.
        upload: ``"masked"``: values on the mask; ``"dense"`` (released code): all of them. ``regrow="dense"`` uploads
            all values in any case.
        max_candidates: Most candidates that one upload may hold, as a share of the mask's kept weights.
        end: Share of the run at which the final sparsity is reached and the masks stop moving; FedDIP's never stop.
        include: Globs of parameter names to prune instead of all convolution and linear weights.
        exclude: Globs of parameter names to leave dense.

    Raises:
        ValueError: As ``MagnitudePruning``; for an unknown option; for dense uploads with candidates, which they hold; at the
            start of a federation for a capacity that holds nothing, or capacities beside dense uploads or broadcasts.
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
        self._narrowed = NarrowedBroadcasts()
        self._proposers: dict[str, Tensor] = {}
        self._able = 0

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
            return remask(update, dict(pl_module.named_parameters()), dict.fromkeys(self._names))
        capacity = self.client_round.capacity
        if capacity is not None:
            update = replace(update, absent="unheld")
        deciding = self._deciding(self.client_round)
        masks = {name: mask for name in self._names if (mask := self.client_round.masks[name]) is not None}
        sparsity = self.target(deciding)
        if self.regrow != "candidates" or not masks or sparsity is None or not self.reconfigures(deciding):
            return update
        weights = self._client_weights(pl_module)
        limit = self._max_candidates(masks)
        if capacity is not None:
            limit = min(limit, self._held(capacity, weights, "of this client") - _kept(masks))
        candidates = candidate_masks(weights, masks, sparsity, limit)
        return remask(update, weights, {name: masks[name] | candidates[name] for name in masks})

    @override
    def on_server_start(self, pl_module: pl.LightningModule, state: ServerState, seed: int) -> ServerState:
        self._proposers, self._able = {}, 0  # of a round that was cut off
        if self.erk_positions == "random_per_client":
            self.find_names(pl_module)
            self.masks = {}
        else:
            state = super().on_server_start(pl_module, state, seed)
        for client_id, capacity in state.capacities.items():
            self._held(capacity, self._weights(state), f"for client {client_id!r}")
        if state.capacities and (self.uploads_all or self.erk_positions == "random_per_client"):
            raise ValueError(
                "expected masked uploads and a common first mask where clients have capacities, got "
                + ("dense uploads" if self.uploads_all else "erk_positions='random_per_client'")
            )
        return state

    @override
    def client_broadcast(self, state: ServerState, client: Client, broadcast: SparseUpdate) -> SparseUpdate:
        if client.capacity is None:
            return broadcast
        capacity = client.capacity
        return self._narrowed.get(broadcast, capacity, lambda: self._narrow(state, capacity, broadcast))

    def _narrow(self, state: ServerState, capacity: float, broadcast: SparseUpdate) -> SparseUpdate:
        weights, masks = self._weights(state), self._masks(state)
        count = self._held(capacity, weights, "of a client")
        return broadcast if _kept(masks) <= count else remask(broadcast, weights, masks_within(weights, masks, count))

    @override
    def on_server_receive(self, state: ServerState, server_round: ServerRound, update: SparseUpdate) -> None:
        # among holders alone a candidate would count as if the clients that could propose it, and didn't, had agreed
        if not state.capacities or not self._takes_candidates(server_round):
            return
        masks, sent = self._masks(state), {name: update.masks[name] for name in self._names}
        outside = {name: mask & ~masks[name] for name, mask in sent.items() if mask is not None}
        if sum(int(mask.count_nonzero()) for mask in outside.values()) + _kept(masks) == _kept(sent):
            self._able += update.num_examples
            for name, mask in outside.items():
                self._proposers[name] = self._proposers.get(name, 0) + update.num_examples * mask.long()

    @override
    def on_server_received(self, state: ServerState, server_round: ServerRound, total: Total) -> None:
        self._proposers = total(self._proposers)
        self._able = int(total({"able": torch.tensor(self._able)})["able"])

    @override
    @torch.no_grad()
    def on_server_round_end(self, state: ServerState, server_round: ServerRound) -> ServerState:
        for name, proposers in self._proposers.items():
            weight = state.weights[name]
            weight.mul_(torch.where(self._masks(state)[name], 1, proposers.to(weight.dtype) / self._able))
        self._proposers, self._able = {}, 0
        if self.regrow == "nested":
            state.apply_masks()
        self.reconfigure(state, self._deciding(server_round))
        state.apply_masks()
        return state

    @override
    def upload_rule(self, state: ServerState, server_round: ServerRound) -> UploadRule | None:
        masks = self._masks(state)
        extra = 0
        if self.uploads_all:
            extra = sum(int((~mask).count_nonzero()) for mask in masks.values())
        elif self._takes_candidates(server_round):
            extra = self._max_candidates(masks)
        if state.capacities:
            return UploadRule(absent="unheld", extra_values=extra, weighting="examples")
        return UploadRule(extra_values=extra) if extra else None

    @override
    @torch.no_grad()
    def to_effective_(self, weights: dict[str, Tensor], capacity: float | None = None) -> None:
        if capacity is not None:
            mine = {name: weights[name] for name in self._names}
            count = self._held(capacity, mine, "to evaluate at")
            for name, mask in masks_within(mine, {name: weight != 0 for name, weight in mine.items()}, count).items():
                mine[name].mul_(mask)

    def _takes_candidates(self, server_round: ServerRound) -> bool:
        return self.regrow == "candidates" and self.reconfigures(self._deciding(server_round))

    def _deciding(self, this: ClientRound | ServerRound) -> Progress:
        """Whether masks are made at the end of this round, and how sparse ones, is decided by the progress of the next one.

        In the released code it is decided by that of the round itself: masks come at the end of rounds 0, R, 2R...
        """
        return Progress(this.index + (self.erk_positions != "random_per_client"), this.total)

    def _max_candidates(self, masks: Mapping[str, Tensor]) -> int:
        return int(self.max_candidates * _kept(masks))

    def _held(self, capacity: float, weights: Mapping[str, Tensor], where: str) -> int:
        return held_count(capacity, sum(weight.numel() for weight in weights.values()), where)

    def _masks(self, state: ServerState) -> dict[str, Tensor]:
        return {name: mask for name in self._names if (mask := state.masks[name]) is not None}

    def _client_weights(self, pl_module: pl.LightningModule) -> dict[str, Tensor]:
        parameters = dict(pl_module.named_parameters())
        return {name: parameters[name].detach() for name in self._names}


def _kept(masks: Mapping[str, Tensor | None]) -> int:
    return sum(int(mask.count_nonzero()) for mask in masks.values() if mask is not None)
