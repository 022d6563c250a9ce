r"""Top-K after training: the largest weights survive the round, the rest is zero and is not sent.

After its local training each client keeps the :math:`n - \mathrm{round}(s\,n)` weights of largest magnitude, ranked over all
its prunable layers together, and sends these. The server averages, what is absent counting as zero:

.. math:: \tilde w_i = \mathrm{TopK}(w_i), \qquad w \leftarrow \sum_i n_i \tilde w_i \Big/ \sum_i n_i

so the global support is the union of the clients', a little denser than one client's. It is never stored: the next round's
masks are the non-zeros of the average. The first broadcast is dense.

A client with a capacity of its own, the share of the prunable weights that it can hold, keeps no more than that; from
round 2 on it is also sent no more than that, the largest of the global weights.

Alone, with a ``ConstantSchedule``, this is the Top-K baseline that sparse federated methods are compared with
(``tests/test_sparsyfed_reference.py`` holds it against one written by hand). Under plain weights a zero receives gradients and
can return; under ``Powerpropagation`` it can't. Nothing keeps a layer from losing all its weights: a small network that is cut
to its target after the first round may die for good, of which ``CollapseMonitor`` warns; a schedule that ramps up and a floor
per layer prevent it.

In a plain Trainer, ``fit`` is the local training: its end prunes to the schedule's end. Put the callback before
``Powerpropagation``, which folds its exponents in at that moment too. Validation during ``fit`` sees weights that are not
cut yet; ``load_folded`` cuts those of a checkpoint that was written meanwhile.

Reference: "SparsyFed", ICLR 2025, https://arxiv.org/abs/2504.05153, released code. Its text prunes the update; its code, like
this, the weights: a sum of old weights and a pruned difference would not be sparse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from typing_extensions import override

from lightning_fedsparse.callbacks.base import SparsityCallback
from lightning_fedsparse.capacities import held_count
from lightning_fedsparse.clients import Client
from lightning_fedsparse.masks import largest_weights
from lightning_fedsparse.metrics import DensityExcess
from lightning_fedsparse.narrowing import NarrowedBroadcasts
from lightning_fedsparse.prunable import prunable_parameters
from lightning_fedsparse.rounds import ServerRound, UploadRule
from lightning_fedsparse.schedules import Progress, Schedule, require_sparsities
from lightning_fedsparse.server import ServerState
from lightning_fedsparse.update import SparseUpdate, remask

__all__ = ["TopKAfterTraining"]


class TopKAfterTraining(SparsityCallback):
    """Keep the largest weights after local training.

    Args:
        schedule: Sparsity over the run, from its start to ``end``; values in [0, 1), at the end not below the start.
        end: Share of the run at which the schedule's end is reached.
        layer_floor: Share of each layer's weights that is kept at least; below ``1 - sparsity`` at the schedule's end.
        include: Globs of parameter names to prune instead of all convolution and linear weights.
        exclude: Globs of parameter names to leave dense.

    Raises:
        ValueError: At construction for a value out of range; at the start for a model with nothing to prune, a glob that
            matches nothing, or a client's capacity that holds nothing or less than the floor.
    """

    def __init__(
        self,
        schedule: Schedule,
        *,
        end: float = 1.0,
        layer_floor: float = 0.0,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
    ) -> None:
        super().__init__()
        require_sparsities(schedule)
        last = schedule(1.0)
        if not 0 < end <= 1:
            raise ValueError(f"expected end in (0, 1], got {end}")
        if not 0 <= layer_floor < 1 - last:
            raise ValueError(
                f"expected layer_floor in [0, {1 - last:.6g}), below the density at the schedule's end, got {layer_floor}"
            )
        self.schedule = schedule
        self.end = end
        self.layer_floor = layer_floor
        self.include = tuple(include)
        self.exclude = tuple(exclude)
        self._names: list[str] = []
        self._narrowed = NarrowedBroadcasts()
        # what load_folded does with a checkpoint of a plain fit; a federation's holds averages, which may be denser
        self._rule: dict[str, Any] = {}
        self._key = self._generate_state_key(include=self.include, exclude=self.exclude)

    @property
    def state_key(self) -> str:
        """Tells instances with other selections apart."""
        return self._key

    def target(self, done: Progress) -> float:
        """Scheduled sparsity once so much of the run is done."""
        return self.schedule(min(1.0, done.fraction / self.end))

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.client_round is None:
            names = list(prunable_parameters(pl_module, self.include, exclude=self.exclude))
            self._rule = {"names": names, "sparsity": self.target(Progress(1, 1)), "layer_floor": self.layer_floor}

    @override
    @torch.no_grad()
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.client_round is not None:
            return
        weights = dict(prunable_parameters(pl_module, self.include, exclude=self.exclude))
        masks = largest_weights(weights, self.target(Progress(1, 1)), layer_floor=self.layer_floor)
        for name, weight in weights.items():
            weight.mul_(masks[name])

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"largest": dict(self._rule)} if self._rule else {}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._rule = dict(state_dict["largest"])

    # -- in a federation -------------------------------------------------------------------------------------------

    @override
    def on_client_round_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, update: SparseUpdate
    ) -> SparseUpdate:
        assert self.client_round is not None
        weights = dict(prunable_parameters(pl_module, self.include, exclude=self.exclude))
        sparsity = self.target(Progress(self.client_round.index + 1, self.client_round.total))
        if self.client_round.capacity is not None:
            sparsity = max(sparsity, 1 - self.client_round.capacity)
        return replace(self._cut(update, weights, sparsity), absent="zero")

    def _cut(self, update: SparseUpdate, weights: Mapping[str, Tensor], sparsity: float) -> SparseUpdate:
        """The update with nothing but the largest of these weights."""
        return remask(update, weights, largest_weights(weights, sparsity, layer_floor=self.layer_floor))

    @override
    def on_server_start(self, pl_module: pl.LightningModule, state: ServerState, seed: int) -> ServerState:
        self._names = list(prunable_parameters(pl_module, self.include, exclude=self.exclude))
        self._rule = {}
        for client_id, capacity in state.capacities.items():
            self._require_held(capacity, state.weights, f"for client {client_id!r}")
        return state

    def _require_held(self, capacity: float, weights: Mapping[str, Tensor], where: str) -> None:
        held_count(capacity, sum(weights[name].numel() for name in self._names), where)
        if capacity <= self.layer_floor:
            raise ValueError(f"expected a capacity above the layer_floor of {self.layer_floor}, got {capacity} {where}")

    @override
    def client_broadcast(self, state: ServerState, client: Client, broadcast: SparseUpdate) -> SparseUpdate:
        if client.capacity is None or any(state.masks[name] is None for name in self._names):
            return broadcast  # dense in the first round
        sparsity = 1 - client.capacity
        weights = {name: state.weights[name] for name in self._names}
        return self._narrowed.get(broadcast, client.capacity, lambda: self._cut(broadcast, weights, sparsity))

    @override
    @torch.no_grad()
    def to_effective_(self, weights: dict[str, Tensor], capacity: float | None = None) -> None:
        if capacity is not None:
            self._require_held(capacity, weights, "to evaluate at")
            mine = {name: weights[name] for name in self._names}
            for name, mask in largest_weights(mine, 1 - capacity, layer_floor=self.layer_floor).items():
                mine[name].mul_(mask)

    @override
    def on_server_round_end(self, state: ServerState, server_round: ServerRound) -> ServerState:
        masks = {name: state.weights[name] != 0 for name in self._names}
        state.set_masks(masks)
        excess = DensityExcess()
        excess.update(masks, self.target(Progress(server_round.index + 1, server_round.total)))
        server_round.metrics["density_excess"] = float(excess.compute())
        return state

    @override
    def upload_rule(self, state: ServerState, server_round: ServerRound) -> UploadRule | None:
        total = sum(state.weights[name].numel() for name in self._names)
        sparsity = self.target(Progress(server_round.index + 1, server_round.total))
        # weights that are not reparametrized may return, at most as many as a client keeps
        return UploadRule(absent="zero", extra_values=total - round(sparsity * total))
