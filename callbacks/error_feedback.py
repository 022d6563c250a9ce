"""Error feedback of pruning: the gradient at the pruned weights updates the dense ones.

For a stored weight ``w`` and a mask ``m``, forward and backward run at ``w * m``, and the full gradient found there is
applied to ``w``::

    w <- w - lr * grad(loss)(w * m)

so a pruned weight keeps learning and comes back when it has grown large enough at a reconfiguration. Without this
callback the gradient is masked too and pruned weights stay out.

Reference: T. Lin, S. U. Stich, L. Barba, D. Dmitriev, M. Jaggi, "Dynamic Model Pruning with Feedback", ICLR 2020,
https://arxiv.org/abs/2006.07253 (algorithm 1); FedDIP's local step. What a lossy upload leaves behind is another thing:
see ``CompressionMemory``.
"""

from __future__ import annotations

import lightning.pytorch as pl
from typing_extensions import override

from lightning_fedsparse.callbacks.base import SparsityCallback
from lightning_fedsparse.effective import EffectiveWeights

__all__ = ["ErrorFeedback"]


class ErrorFeedback(SparsityCallback):
    """Apply the dense gradient, taken at the pruned weights, to the stored weights.

    It has no masks of its own: a callback that prunes, such as ``MagnitudePruning``, must be there too, in any order.

    Raises:
        ValueError: At the start of training if no callback has put a mask on a weight.
    """

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # every on_fit_start is over, so all masks are registered whatever the order of the callbacks
        masks = EffectiveWeights.of(pl_module).masks
        if not masks:
            raise ValueError(
                f"expected a callback that prunes beside ErrorFeedback, found no masked weight in "
                f"{type(pl_module).__name__}: add MagnitudePruning"
            )
        for transform in masks:
            transform.straight_through = True
