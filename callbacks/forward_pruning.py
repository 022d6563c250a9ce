r"""Forward pruning: every training forward uses the largest weights of each layer, and all weights learn from it.

.. math:: \tilde w = w \cdot [\,|w| \ge t\,], \quad t = \text{the } \lceil (1 - s)\,n \rceil \text{-th largest of the } n
   \text{ magnitudes of the layer}, \qquad w \leftarrow w - \eta\, \nabla_{\tilde w} L

Forward and backward run at the sparse weights; the dense gradient found there updates the dense weights, so that weights
come and go with every step. Evaluation, and the model that comes out, are the dense weights: ``TopKAfterTraining`` beside it
makes them sparse, and ``ActivationPruning`` prunes what the backward pass keeps.

Use it to compare with ``ZeroFL``, whose local step it is. A ranking of each layer at every step is its cost.

References: M. A. Raihan, T. M. Aamodt, "Sparse Weight Activation Training", NeurIPS 2020, https://arxiv.org/abs/2001.01969
(SWAT-U); X. Qiu, J. Fernandez-Marques, P. P. B. Gusmao, Y. Gao, T. Parcollet, N. D. Lane, "ZeroFL: Efficient On-Device
Training for Federated Learning with Local Sparsity", ICLR 2022, https://arxiv.org/abs/2208.02507. The re-implementation in
the code released with "SparsyFed" (ICLR 2025) writes the pruned weights over the dense ones and finds the threshold on the
first batch only: ``overwrite=True, threshold="first_batch"``. The threshold is then one of the round's start: as weights grow,
more of them reach it, and the sparsity is no longer the one that was asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from lightning_fedsparse.activations import activation_threshold
from lightning_fedsparse.callbacks.base import EffectiveWeightCallback
from lightning_fedsparse.effective import EffectiveWeights
from lightning_fedsparse.prunable import prunable_parameters
from lightning_fedsparse.transforms import Transform, Weights, reaching

__all__ = ["ForwardPruning"]


class _LargestPerLayer(Transform):
    """Zero all but the largest weights of each tensor; gradients pass as they are.

    Args:
        names: Weights by name.
        sparsity: Fraction of zeros in each.
        thresholds: Where each tensor's first threshold is kept to be used from then on; None finds it anew each time.
    """

    order = 1

    def __init__(self, names: Sequence[str], sparsity: float, thresholds: dict[str, float] | None) -> None:
        super().__init__(names)
        self.active = True
        self._density = 1 - sparsity
        self._thresholds = thresholds

    def apply(self, weights: Weights, out: Weights) -> None:
        """Zero the weights below their layer's threshold."""
        for name, weight in weights.items():
            out[name].copy_(reaching(weight, self._threshold(name, weight)) if self.active else weight)

    def chain_(self, gradients: Weights, stored: Weights, effective: Weights) -> None:
        """The dense gradient is for the dense weights."""

    def _threshold(self, name: str, weight: torch.Tensor) -> float:
        # weights and activations have their thresholds in the same way
        if self._thresholds is None:
            return activation_threshold(weight, self._density)
        if name not in self._thresholds:
            self._thresholds[name] = activation_threshold(weight, self._density)
        return self._thresholds[name]


class ForwardPruning(EffectiveWeightCallback):
    """Train at the largest weights of each layer.

    Args:
        sparsity: Fraction of zeros in each layer's weights in the forward pass, in [0, 1).
        threshold: ``"per_batch"``; or ``"first_batch"``: the one of the first batch for the rest of ``fit`` (of the client's
            round in a federation).
        overwrite: Whether what a forward pass cuts is gone from the stored weights too, before the step.
        first_layer: Whether the first of the selected layers is pruned too.
        include: Globs of parameter names to prune instead of all convolution and linear weights.
        exclude: Globs of parameter names to leave dense.

    Raises:
        ValueError: At construction for a value out of range; at the start of ``fit`` for a model with nothing to prune or a
            glob that matches nothing.
    """

    def __init__(
        self,
        sparsity: float,
        *,
        threshold: Literal["per_batch", "first_batch"] = "per_batch",
        overwrite: bool = False,
        first_layer: bool = True,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if not 0 <= sparsity < 1:
            raise ValueError(f"expected a sparsity in [0, 1) of each layer's forward pass, got {sparsity}")
        if threshold not in ("per_batch", "first_batch"):
            raise ValueError(f"expected threshold 'per_batch' or 'first_batch', got {threshold!r}")
        self.sparsity = sparsity
        self.threshold = threshold
        self.overwrite = overwrite
        self.first_layer = first_layer
        self.include = tuple(include)
        self.exclude = tuple(exclude)
        self._thresholds: dict[str, float] = {}
        self._key = self._generate_state_key(include=self.include, exclude=self.exclude)

    @property
    def state_key(self) -> str:
        """Tells instances with other selections apart."""
        return self._key

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._thresholds = {}

    @override
    def transform(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Transform | None:
        if trainer.state.fn != TrainerFn.FITTING:
            return None
        names = prunable_parameters(pl_module, self.include, exclude=self.exclude, first_layer=self.first_layer)
        return _LargestPerLayer(
            list(names), self.sparsity, self._thresholds if self.threshold == "first_batch" else None
        )

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._set_active(trainer, pl_module, False)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._set_active(trainer, pl_module, True)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.overwrite:
            engine = EffectiveWeights.of(pl_module)
            step = engine.transform_of(self)
            parameters = dict(pl_module.named_parameters())
            with engine.stored(), torch.no_grad():
                weights = {name: parameters[name] for name in step.names}
                step.apply(weights, weights)
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"forward_thresholds": dict(self._thresholds)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._thresholds = dict(state_dict["forward_thresholds"])

    def _set_active(self, trainer: pl.Trainer, pl_module: pl.LightningModule, active: bool) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            step = EffectiveWeights.of(pl_module).transform_of(self)
            assert isinstance(step, _LargestPerLayer)
            step.active = active
