r"""Importance masking: a submodel of the largest weights, trained with a gradient that knows its threshold.

A client of capacity :math:`\gamma` holds the weights whose magnitude is at least :math:`\theta`, the
:math:`\max(1, \lfloor \gamma n \rfloor)`-th largest of :math:`n`: importance is the weight itself, and larger submodels
contain smaller ones. With :math:`\theta` fixed over a client's round, :math:`M` the mask at its start and the comparison
made anew at every step,

.. math:: m = M \wedge [\,|w| \ge \theta\,], \qquad \tilde w = w m, \qquad
   g \leftarrow g\, m \left(1 + \frac{2 |w| \theta}{(|w| + \theta)^2}\right)

The factor lies in [1, 1.5] and is largest at the threshold, so that weights at the border leave it quickly; it is the
derivative of the mask's surrogate :math:`\mathrm{clip}((|w| - \theta) / (|w| + \theta), 0, 1)`. At capacity 1 nothing is
cut: :math:`\theta = 0` and the factor is 1. So it is where more than :math:`1 - \gamma` of the weights are exact zeros:
ties at the threshold are all held. Whatever the optimizer does, weights outside :math:`M` do not move.

- In a federation every client trains the submodel of its own capacity and sends deltas on :math:`M`; the server, whose
  weights stay dense, averages each coordinate over its holders (``MaskedMean``). Coordinates that nobody holds keep their
  bits, under a server optimizer without momentum.
- In a plain Trainer ``capacity`` is the one client's; every ``refresh_every`` optimizer steps a new round begins.

Reference: F. Wu, X. Wang, Y. Wang, T. Liu, L. Su, J. Gao, "FIARSE: Model-Heterogeneous Federated Learning via
Importance-Aware Submodel Extraction", NeurIPS 2024, https://arxiv.org/abs/2407.19389. Where the released code divides a
coordinate by the clients whose delta is not zero, every holder counts here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
from torch import Tensor
from typing_extensions import override

from lightning_fedsparse.callbacks.submodel import SubmodelCallback
from lightning_fedsparse.prunable import prunable_parameters
from lightning_fedsparse.rounds import ClientRound
from lightning_fedsparse.server import ServerState
from lightning_fedsparse.submodels import (
    ImportanceTransform,
    SubmodelTransform,
    extraction_groups,
    submodel_masks,
    submodel_thresholds,
)
from lightning_fedsparse.transforms import Transform
from lightning_fedsparse.value_coding import ValueType

__all__ = ["ImportanceMasking"]


class ImportanceMasking(SubmodelCallback):
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
        super().__init__(capacity, refresh_every=refresh_every, fold=fold)
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
        self.extraction = extraction
        self.groups = tuple(tuple(globs) for globs in groups)
        self.layer_floor = layer_floor
        self.gradient = gradient
        self.full_threshold = full_threshold
        self.include = tuple(include)
        self.exclude = tuple(exclude)
        self.thresholds: dict[str, float] = {}
        self._groups: list[list[str]] = []
        self._key = self._generate_state_key(include=self.include, exclude=self.exclude)

    @property
    def state_key(self) -> str:
        """Tells instances with other selections apart."""
        return self._key

    # -- in a Trainer ----------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and self.client_round is None:
            self.thresholds = {}

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

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.refuse_reparametrization(pl_module, self.thresholds.keys(), "its threshold is for stored weights")

    @override
    def refresh(self, pl_module: pl.LightningModule, transform: SubmodelTransform, step: int) -> None:
        assert isinstance(transform, ImportanceTransform)
        self._extract(self._find(pl_module))
        transform.set(self.masks, self.thresholds)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "thresholds": dict(self.thresholds)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.thresholds = dict(state_dict["thresholds"])
        self.masks = {name: self.masks.get(name) for name in self.thresholds}

    # -- in a federation -------------------------------------------------------------------------------------------

    @override
    def on_client_round_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, client_round: ClientRound
    ) -> None:
        super().on_client_round_start(trainer, pl_module, client_round)
        weights = self._find(pl_module)
        # what it holds contains all that ranks above the threshold, which therefore need not travel
        self.thresholds = self._thresholds(weights, client_round.capacity)
        self.masks = {name: self.masks[name] for name in weights}

    @override
    def on_server_start(self, pl_module: pl.LightningModule, state: ServerState, seed: int) -> ServerState:
        self._find(pl_module)
        self.masks, self.thresholds = {}, {}  # of a plain fit before
        return state

    @override
    def submodel(self, weights: Mapping[str, Tensor], capacity: float, client_id: str = "") -> dict[str, Tensor]:
        mine = {name: weights[name].detach() for group in self._groups for name in group}
        return submodel_masks(mine, self._thresholds(mine, capacity))

    @override
    def refuses_values(self, *, uploads: ValueType, broadcasts: ValueType) -> str | None:
        if broadcasts == "float32":
            return None
        return "a client finds its threshold from the weights that arrive, and rounding moves weights across it"

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
