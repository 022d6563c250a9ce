"""FedDIP: federated learning with extreme dynamic pruning and incremental regularization.

Federated averaging in which every local step runs at pruned weights and updates dense ones (``ErrorFeedback``), under
masks that the server recomputes every few rounds by global magnitude at a growing sparsity (``DynamicPruning``), with a
layer-wise norm penalty that grows too (``IncrementalRegularization``).

Use it for a sparse global model at little loss of accuracy; expect no faster kernels. Clients with capacities of their own
hold the largest weights of the mask that they can. It clashes with other callbacks that own masks over the same weights.

Reference: Q. Long, C. Anagnostopoulos, S. P. Parambath, D. Bi, "FedDIP: Federated Learning with Extreme Dynamic
Pruning and Incremental Regularization", ICDM 2023, pp. 1187-1192, https://arxiv.org/abs/2309.06805.

The defaults follow the paper's abstract where the released code departs from it. The released method is
``feddip(erk_positions="random_per_client", regrow="nested", upload="dense", lambda_mode="code", bn_mode="dense",
prune_shortcuts=False)`` beside an optimizer with weight decay 5e-4, but for ResNet's first densities: there its ERK also
counts the shortcuts and the scales of BatchNorm, which it then leaves dense.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from lightning_fedsparse.callbacks.base import CallbackList
from lightning_fedsparse.callbacks.compression_memory import CompressionMemory
from lightning_fedsparse.callbacks.dense_statistics import DenseStatistics
from lightning_fedsparse.callbacks.dynamic_pruning import DynamicPruning
from lightning_fedsparse.callbacks.error_feedback import ErrorFeedback
from lightning_fedsparse.callbacks.incremental_regularization import IncrementalRegularization
from lightning_fedsparse.callbacks.round_learning_rate import RoundLearningRate
from lightning_fedsparse.callbacks.sparsity_monitor import SparsityMonitor
from lightning_fedsparse.schedules import (
    CubicSchedule,
    ExponentialSchedule,
    OffsetStaircaseSchedule,
    StaircaseSchedule,
)

__all__ = ["feddip"]


def feddip(
    sparsity: float = 0.95,
    initial_sparsity: float = 0.5,
    *,
    reconfigure_every: int = 5,
    erk_positions: Literal["magnitude", "random", "random_per_client"] = "magnitude",
    regrow: Literal["candidates", "nested", "dense"] = "candidates",
    upload: Literal["masked", "dense"] = "masked",
    residual: Literal["drop", "keep"] = "drop",
    max_candidates: float = 0.1,
    end: float = 1.0,
    lambda_max: float = 1e-3,
    lambda_levels: int = 20,
    lambda_mode: Literal["uniform", "code"] = "uniform",
    norm_p: float = 2.0,
    bn_mode: Literal["pruned", "dense"] = "pruned",
    prune_shortcuts: bool = True,
    learning_rate_decay: float = 0.998,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> CallbackList:
    """Compose FedDIP for a ``FederatedLoop`` or a plain ``Trainer``.

    Args:
        sparsity: Final fraction of zeros among the prunable weights.
        initial_sparsity: Fraction of zeros at the start.
        reconfigure_every: Rounds (optimizer steps in a plain Trainer) between masks; released code 20 by default. A
            federation ends at the sparsity of its last masks: one of no more rounds than this stays at the initial one.
        erk_positions: First mask: largest weights inside ERK densities, or random positions; ``"random_per_client"``
            is the released code's.
        regrow: How pruned weights return in a federation; ``"nested"`` (never) is the released code's. In a plain Trainer
            error feedback lets them return.
        upload: ``"masked"`` values or all; ``"dense"`` is the released code's.
        residual: ``"keep"``: what a client's pruned weights have learned stays with it until its next round.
        max_candidates: Most candidates for regrowth in one upload, as a share of the kept weights.
        end: Share of the run at which ``sparsity`` is reached and the masks stop moving; FedDIP's move to the end.
        lambda_max: What the regularization strength grows towards, one level short of it; 0 leaves the penalty out.
        lambda_levels: Levels of its staircase.
        lambda_mode: ``"uniform"`` steps, or the released ``"code"``'s with its hidden offset.
        norm_p: Order of the penalized norm.
        bn_mode: BatchNorm statistics of the pruned forward pass, or of the ``"dense"`` one (released code).
        prune_shortcuts: Also prune ResNet's shortcut convolutions (parameters named ``*shortcut*``, which must exist if
            this is False); the released code does not.
        learning_rate_decay: Factor of the learning rate per round; 1 leaves it alone.
        include: Globs of parameter names to prune instead of all convolution and linear weights.
        exclude: Globs of parameter names to leave dense.

    Returns:
        Callbacks, in the order in which they belong.

    Raises:
        ValueError: For a value out of range or an unknown option.
    """
    if residual not in ("drop", "keep"):
        raise ValueError(f"expected residual 'drop' or 'keep', got {residual!r}")
    if lambda_mode not in ("uniform", "code"):
        raise ValueError(f"expected lambda_mode 'uniform' or 'code', got {lambda_mode!r}")
    if bn_mode not in ("pruned", "dense"):
        raise ValueError(f"expected bn_mode 'pruned' or 'dense', got {bn_mode!r}")
    if lambda_max < 0:
        raise ValueError(f"expected lambda_max of at least 0, got {lambda_max}")
    selection = {"include": tuple(include), "exclude": (*exclude, *(() if prune_shortcuts else ("*shortcut*",)))}
    staircase = StaircaseSchedule if lambda_mode == "uniform" else OffsetStaircaseSchedule
    callbacks = CallbackList(
        [
            DynamicPruning(
                CubicSchedule(initial_sparsity, sparsity),
                every=reconfigure_every,
                erk_positions=erk_positions,
                regrow=regrow,
                upload=upload,
                max_candidates=max_candidates,
                end=end,
                **selection,
            ),
            ErrorFeedback(),
        ]
    )
    if residual == "keep":
        callbacks.append(CompressionMemory(**selection))
    if lambda_max > 0:
        callbacks.append(IncrementalRegularization(staircase(lambda_max, lambda_levels), p=norm_p, **selection))
    if bn_mode == "dense":
        callbacks.append(DenseStatistics())
    if learning_rate_decay != 1:
        callbacks.append(RoundLearningRate(ExponentialSchedule(1.0, learning_rate_decay)))
    callbacks.append(SparsityMonitor(**selection))
    return callbacks
