r"""Importance masking: a submodel of the largest weights, trained with a gradient that knows its threshold.

A client of capacity :math:`\gamma` holds the weights whose magnitude is at least :math:`\theta`, the
:math:`\max(1, \lfloor \gamma n \rfloor)`-th largest of :math:`n`: importance is the weight itself, and larger submodels
contain smaller ones. With :math:`\theta` fixed over a client's round, :math:`M` the mask at its start and the comparison
made anew at every step,

.. math:: m = M \wedge [\,|w| \ge \theta\,], \qquad \tilde w = w m, \qquad
   g \leftarrow g\, m \left(1 + \frac{2 |w| \theta}{(|w| + \theta)^2}\right)

The factor lies in [1, 1.5] and is largest at the threshold, so that weights at the border leave it quickly; it is the
derivative of the mask's surrogate :math:`\mathrm{clip}((|w| - \theta) / (|w| + \theta), 0, 1)`. At capacity 1 nothing is
cut: :math:`\theta = 0` and the factor is 1. Whatever the optimizer does, weights outside :math:`M` do not move.

- In a federation every client trains the submodel of its own capacity and sends deltas on :math:`M`; the server, whose
  weights stay dense, averages each coordinate over its holders (``MaskedMean``). Coordinates that nobody holds keep their
  bits, under a server optimizer without momentum.
- In a plain Trainer ``capacity`` is the one client's; every ``refresh_every`` optimizer steps a new round begins.

Reference: F. Wu, X. Wang, Y. Wang, T. Liu, L. Su, J. Gao, "FIARSE: Model-Heterogeneous Federated Learning via
Importance-Aware Submodel Extraction", NeurIPS 2024, https://arxiv.org/abs/2407.19389. Where the released code divides a
coordinate by the clients whose delta is not zero, every holder counts here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

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
from lightning_fedsparse.prunable import prunable_parameters
from lightning_fedsparse.rounds import ClientRound, ServerRound, UploadRule
from lightning_fedsparse.server import ServerState
from lightning_fedsparse.submodels import ImportanceTransform, extraction_groups, submodel_masks, submodel_thresholds
from lightning_fedsparse.transforms import Transform
from lightning_fedsparse.update import SparseUpdate, gather, remask
from lightning_fedsparse.value_coding import ValueType

__all__ = ["ImportanceMasking"]


class ImportanceMasking(EffectiveWeightCallback):
    """Train the submodel of the largest weights.

    Args:
        capacity: Share of the masked weights that is held, in (0, 1]: in a plain Trainer, and by clients that have no
            capacity of their own.
        extraction: One threshold for all masked weights (``"model"``) or one per tensor (``"tensor"``).
        groups: Instead of ``extraction``: one threshold for each of these lists of globs of parameter names; every masked
            parameter belongs to exactly one.
        layer_floor: Share of every tensor that is held at least, within the capacity, in [0, 1); 0 (released code) lets
            small submodels lose whole layers.
        gradient: ``"tcb"``: with the factor; ``"plain"``: without.
        full_threshold: Threshold at capacity 1: ``"zero"`` (released language models) leaves training alone; ``"min"``
            (released image models) is the smallest magnitude.
        refresh_every: Optimizer steps between extractions in a plain Trainer; 100 are the local steps of the released
            code's rounds.
        fold: Whether the module holds the last submodel after a plain ``fit``; otherwise the stored weights.
        include: Globs of parameter names to mask instead of all convolution and linear weights.
        exclude: Globs of parameter names to leave dense; they are not counted in the capacity.

    Raises:
        ValueError: At construction for an option out of range; when a submodel is extracted, for groups that do not
            cover the masked parameters once each, or a floor above the capacity; at the start of ``fit`` beside a
            reparametrization of the same weights, or for a model without such weights.
    """

    def __init__(
        self,
        capacity: float = 1.0,
        *,
        extraction: Literal["model", "tensor"] = "model",
        groups: Sequence[Sequence[str]] = (),
        layer_floor: float = 0.0,
        gradient: Literal["tcb", "plain"] = "tcb",
        full_threshold: Literal["zero", "min"] = "zero",
        refresh_every: int = 100,
        fold: bool = True,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
    ) -> None:
        super().__init__()
        for name, value, allowed in (
            ("extraction", extraction, ("model", "tensor")),
            ("gradient", gradient, ("tcb", "plain")),
            ("full_threshold", full_threshold, ("zero", "min")),
        ):
            if value not in allowed:
                raise ValueError(f"expected {name} to be one of {', '.join(map(repr, allowed))}, got {value!r}")
        if groups and extraction == "tensor":
            raise ValueError("expected either groups or extraction='tensor', got both")
        if not 0 <= layer_floor < 1:
            raise ValueError(f"expected a layer_floor in [0, 1), got {layer_floor}")
        if refresh_every < 1:
            raise ValueError(f"expected a period of at least 1, got refresh_every={refresh_every}")
        self.capacity = require_capacity(capacity, "for ImportanceMasking")
        self.extraction = extraction
        self.groups = tuple(tuple(globs) for globs in groups)
        self.layer_floor = layer_floor
        self.gradient = gradient
        self.full_threshold = full_threshold
        self.refresh_every = refresh_every
        self.fold = fold
        self.include = tuple(include)
        self.exclude = tuple(exclude)
        self.masks: dict[str, Tensor | None] = {}
        self.thresholds: dict[str, float] = {}
        self._groups: list[list[str]] = []
        self._last_step: int | None = None
        self._received: dict[str, Tensor] = {}
        self._narrowed = NarrowedBroadcasts()
        self._key = self._generate_state_key(include=self.include, exclude=self.exclude)

    @property
    def state_key(self) -> str:
        """Tells instances with other selections apart."""
        return self._key

    # -- in a Trainer ----------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit" and self.client_round is None:
            self.masks, self.thresholds, self._last_step = {}, {}, None

    @override
    def transform(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Transform | None:
        weights = self._find(pl_module)
        if not self.thresholds:
            self._extract(weights)
        for name, weight in weights.items():
            mask = self.masks.get(name)
            if name not in self.thresholds or (mask is not None and mask.shape != weight.shape):
                raise ValueError(
                    f"expected the module that ImportanceMasking extracted a submodel from last, got "
                    f"{type(pl_module).__name__}, whose {name!r} is new or of another shape"
                )
        return ImportanceTransform(self.masks, self.thresholds, corrects=self.gradient == "tcb")

    @property
    @override
    def folds(self) -> bool:
        return self.fold

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        engine = EffectiveWeights.of(pl_module)
        mine = engine.transform_of(self)
        for other in engine.transforms:
            if other.order < mine.order and other.changes_weights and (both := sorted(other.names & mine.names)):
                raise ValueError(
                    f"expected ImportanceMasking beside no reparametrization of the same weights, got one of {both[0]!r}: "
                    "its threshold is for stored weights"
                )

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.client_round is None:
            step = self.progress(trainer).step
            # several batches share one step under accumulation: the submodel moves once, before the first of them
            if step % self.refresh_every == 0 and step != self._last_step:
                self._refresh(pl_module, step)
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def _refresh(self, pl_module: pl.LightningModule, step: int) -> None:
        engine = EffectiveWeights.of(pl_module)
        transform = engine.transform_of(self)
        assert isinstance(transform, ImportanceTransform)
        with engine.stored():
            self._extract(self._find(pl_module))
            transform.set(self.masks, self.thresholds)
        self._last_step = step

    @override
    def state_dict(self) -> dict[str, Any]:
        masks = {
            name: {"bits": pack_mask(mask), "shape": list(mask.shape)}
            for name, mask in self.masks.items()
            if mask is not None
        }
        return {"masks": masks, "thresholds": dict(self.thresholds), "last_step": self._last_step}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.thresholds = dict(state_dict["thresholds"])
        masks = {name: unpack_mask(entry["bits"], entry["shape"]) for name, entry in state_dict["masks"].items()}
        self.masks = {name: masks.get(name) for name in self.thresholds}
        self._last_step = state_dict["last_step"]

    # -- on a client -----------------------------------------------------------------------------------------------

    @override
    def on_client_round_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, client_round: ClientRound
    ) -> None:
        weights = self._find(pl_module)
        # what it holds contains all that ranks above the threshold, which therefore need not travel
        self.thresholds = self._thresholds(weights, client_round.capacity)
        self.masks = {name: client_round.masks[name] for name in weights}
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
                "that change the upload after ImportanceMasking"
            )
        values = {name: value - self._received[name] for name, value in update.values.items()}
        return replace(update, values=values, kind="delta", absent="unheld")

    # -- on the server ---------------------------------------------------------------------------------------------

    @override
    def on_server_start(self, pl_module: pl.LightningModule, state: ServerState, seed: int) -> ServerState:
        self._find(pl_module)
        return state

    @override
    def client_broadcast(self, state: ServerState, client: Client, broadcast: SparseUpdate) -> SparseUpdate:
        capacity = self.capacity if client.capacity is None else client.capacity
        return self._narrowed.get(broadcast, capacity, lambda: self._narrow(state, capacity, broadcast))

    def _narrow(self, state: ServerState, capacity: float, broadcast: SparseUpdate) -> SparseUpdate:
        if capacity == 1:
            return broadcast
        weights = {name: state.weights[name] for group in self._groups for name in group}
        masks = submodel_masks(weights, self._thresholds(weights, capacity))
        return remask(broadcast, weights, masks)

    @override
    def upload_rule(self, state: ServerState, server_round: ServerRound) -> UploadRule | None:
        return UploadRule(kind="delta", absent="unheld")

    @override
    def refuses_values(self, *, uploads: ValueType, broadcasts: ValueType) -> str | None:
        if broadcasts == "float32":
            return None
        return "a client finds its threshold from the weights that arrive, and rounding moves weights across it"

    @override
    @torch.no_grad()
    def to_effective_(self, weights: dict[str, Tensor], capacity: float | None = None) -> None:
        mine = {name: weights[name] for group in self._groups for name in group}
        for name, mask in submodel_masks(mine, self._thresholds(mine, capacity)).items():
            mine[name].mul_(mask)

    # -- extraction ------------------------------------------------------------------------------------------------

    def _find(self, pl_module: pl.LightningModule) -> dict[str, Tensor]:
        """Select the parameters of this module, and sort them into groups."""
        selected = prunable_parameters(pl_module, self.include, exclude=self.exclude)
        self._groups = extraction_groups(list(selected), self.groups, per_tensor=self.extraction == "tensor")
        return {name: parameter.detach() for name, parameter in selected.items()}

    def _thresholds(self, weights: dict[str, Tensor], capacity: float | None) -> dict[str, float]:
        capacity = self.capacity if capacity is None else capacity
        if capacity == 1 and self.full_threshold == "zero":
            return dict.fromkeys(weights, 0.0)
        return submodel_thresholds(weights, self._groups, capacity, layer_floor=self.layer_floor)

    def _extract(self, weights: dict[str, Tensor]) -> None:
        self.thresholds = self._thresholds(weights, self.capacity)
        masks = submodel_masks(weights, self.thresholds)
        self.masks = {name: mask if self.thresholds[name] > 0 else None for name, mask in masks.items()}
