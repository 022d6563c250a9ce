r"""A layer-wise norm penalty whose strength grows over the run.

.. math:: F(w; t) = \mathrm{loss}(\tilde w) + \lambda_t \sum_l \lVert \tilde w^{(l)} \rVert_p

with :math:`\tilde w` the effective (pruned) weights of layer :math:`l`. The norm is not squared: like a group lasso with
one group per layer. Its gradient is added in closed form,

.. math:: \lambda_t \, \mathrm{sign}(\tilde w) \, (|\tilde w| / \lVert \tilde w \rVert_p)^{p-1}
   \quad (p = 2:\; \lambda_t \tilde w / \lVert \tilde w \rVert_2),

zero at pruned weights and zero for a layer whose norm is zero. The logged loss is the user's own, without the penalty.

Reference: Q. Long, C. Anagnostopoulos, S. P. Parambath, D. Bi, "FedDIP: Federated Learning with Extreme Dynamic
Pruning and Incremental Regularization", ICDM 2023, https://arxiv.org/abs/2309.06805. ``StaircaseSchedule`` is the sound
reading of its lambda; ``OffsetStaircaseSchedule`` is the released code's, with its offset and its flat first segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from typing_extensions import override

from lightning_fedsparse.callbacks.base import EffectiveWeightCallback
from lightning_fedsparse.effective import EffectiveWeights
from lightning_fedsparse.prunable import prunable_parameters
from lightning_fedsparse.schedules import Progress, Schedule
from lightning_fedsparse.transforms import Transform, Weights

__all__ = ["IncrementalRegularization", "add_norm_gradients_"]


@torch.no_grad()
def add_norm_gradients_(gradients: list[Tensor], weights: list[Tensor], strength: float, p: float = 2.0) -> None:
    """Add ``strength * d||weight||_p / d weight`` of each layer to its gradient in place.

    Args:
        gradients: One tensor per layer, at least one, changed in place.
        weights: Effective weights of the same shapes.
        strength: lambda, at least 0.
        p: Order of the norm, at least 1.
    """
    if p == 1:
        torch._foreach_add_(gradients, torch._foreach_sign(weights), alpha=strength)
        return
    norms = torch._foreach_norm(weights, p)
    # a zero norm means a zero weight, whose direction is zero: no division by it reaches the gradient
    least = max(torch.finfo(norm.dtype).tiny for norm in norms) * max(1.0, strength)
    torch._foreach_maximum_(norms, least)
    scales = torch._foreach_reciprocal(norms)
    if p == 2:
        torch._foreach_mul_(scales, strength)
        torch._foreach_addcmul_(gradients, weights, scales)
        return
    for gradient, weight, scale in zip(gradients, weights, scales, strict=True):
        gradient.add_((weight.abs() * scale).pow_(p - 1).mul_(weight.sign()), alpha=strength)


class _NormPenalty(Transform):
    """The penalty's gradient, found at the effective weights."""

    order = 2
    changes_weights = False

    def __init__(self, names: Sequence[str], p: float) -> None:
        super().__init__(names)
        self.strength = 0.0
        self._p = p

    def apply(self, weights: Weights, out: Weights) -> None:
        """A penalty changes no weight."""

    def chain_(self, gradients: Weights, stored: Weights, effective: Weights) -> None:
        """Add the penalty's gradient."""
        if self.strength > 0 and gradients:
            add_norm_gradients_(
                list(gradients.values()), [effective[name] for name in gradients], self.strength, self._p
            )


class IncrementalRegularization(EffectiveWeightCallback):
    """Penalize the norm of each layer's effective weights with a growing strength.

    Args:
        schedule: lambda over the run (rounds in a federation, optimizer steps in a plain Trainer), at least 0.
        p: Order of the norm, at least 1.
        include: Globs of parameter names to penalize instead of all convolution and linear weights.
        exclude: Globs of parameter names to leave out.

    Raises:
        ValueError: At construction for a negative lambda at either end or a ``p`` below 1; at the start of ``fit``
            for a model without such weights or a glob that matches nothing.
    """

    def __init__(
        self,
        schedule: Schedule,
        *,
        p: float = 2.0,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if not 1 <= p < float("inf"):
            raise ValueError(f"expected the order p of a norm in [1, inf), got {p}")
        for progress in (Progress(0, 1), Progress(1, 1)):
            _require_strength(schedule(progress), schedule)
        self.schedule = schedule
        self.p = p
        self.include = tuple(include)
        self.exclude = tuple(exclude)
        self._key = self._generate_state_key(include=self.include, exclude=self.exclude)

    @property
    def state_key(self) -> str:
        """Tells instances with other selections apart."""
        return self._key

    @override
    def transform(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Transform | None:
        return _NormPenalty(list(prunable_parameters(pl_module, self.include, exclude=self.exclude)), self.p)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._set_strength(trainer, pl_module)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.client_round is None:
            self._set_strength(trainer, pl_module)
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def _set_strength(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        penalty = EffectiveWeights.of(pl_module).transform_of(self)
        assert isinstance(penalty, _NormPenalty)
        penalty.strength = self.schedule(self.progress(trainer))
        _require_strength(penalty.strength, self.schedule)


def _require_strength(strength: float, schedule: Schedule) -> None:
    if strength < 0:
        raise ValueError(f"expected a regularization strength of at least 0, got {strength} from {schedule}")
