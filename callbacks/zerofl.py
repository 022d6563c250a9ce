"""ZeroFL: sparse local training by SWAT, and the largest weights on the wire.

Every training forward of a client uses the largest weights of each layer (``ForwardPruning``), the backward pass keeps
activations at the same density (``ActivationPruning``), and after its local training the client sends the largest of all its
weights, a share ``mask_ratio`` more than the forward pass uses (``TopKAfterTraining``); the server averages them, absent ones
as zero.

Use it as a partner to compare with. Weights of zero have gradients and return, so the union of the clients' supports, which
is the next broadcast, is denser than one client's upload. The first layer is sparse on the wire alone; its forward and
backward passes are dense.

Reference: X. Qiu, J. Fernandez-Marques, P. P. B. Gusmao, Y. Gao, T. Parcollet, N. D. Lane, "ZeroFL: Efficient On-Device
Training for Federated Learning with Local Sparsity", ICLR 2022, https://arxiv.org/abs/2208.02507. Of its upload rules this
is the first, the largest weights. The re-implementation in the code released with "SparsyFed" (ICLR 2025,
https://arxiv.org/abs/2504.05153) is ``zerofl(threshold="first_batch", overwrite=True)``, but for linear layers, whose
activations' threshold it finds per batch, and ResNet's shortcut convolutions, whose passes it leaves dense.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from lightning_fedsparse.callbacks.activation_pruning import ActivationPruning
from lightning_fedsparse.callbacks.base import CallbackList
from lightning_fedsparse.callbacks.collapse_monitor import CollapseMonitor
from lightning_fedsparse.callbacks.forward_pruning import ForwardPruning
from lightning_fedsparse.callbacks.mask_monitor import MaskMonitor
from lightning_fedsparse.callbacks.round_learning_rate import RoundLearningRate
from lightning_fedsparse.callbacks.sparsity_monitor import SparsityMonitor
from lightning_fedsparse.callbacks.topk_after_training import TopKAfterTraining
from lightning_fedsparse.schedules import ConstantSchedule, ExponentialSchedule

__all__ = ["zerofl"]


def zerofl(
    sparsity: float = 0.95,
    mask_ratio: float = 0.0,
    *,
    threshold: Literal["per_batch", "first_batch"] = "per_batch",
    overwrite: bool = False,
    first_layer: bool = False,
    learning_rate_decay: float = 1.0,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> CallbackList:
    """Compose ZeroFL for a ``FederatedLoop`` or a plain ``Trainer``.

    Args:
        sparsity: Fraction of zeros in each layer's forward pass.
        mask_ratio: Share of the weights that a client sends beyond ``1 - sparsity``, in [0, sparsity].
        threshold: Of weights and activations ``"per_batch"``, or of the ``"first_batch"`` of a client's round (released
            re-implementation).
        overwrite: Whether the forward pass's zeros replace the stored weights (released re-implementation).
        first_layer: Whether the first layer's forward and backward passes are sparse too.
        learning_rate_decay: Factor of the learning rate per round, from the first round on; 1 leaves it alone.
        include: Globs of parameter names to prune instead of all convolution and linear weights.
        exclude: Globs of parameter names to leave dense, on the wire too.

    Returns:
        Callbacks, in the order in which they belong.

    Raises:
        ValueError: For a value out of range or an unknown option.
    """
    if not 0 <= mask_ratio <= sparsity:
        raise ValueError(f"expected mask_ratio in [0, {sparsity}], the sparsity, got {mask_ratio}")
    callbacks = CallbackList(
        [
            # rounded, so that 0.95 - 0.05 is 0.9
            TopKAfterTraining(ConstantSchedule(round(sparsity - mask_ratio, 12)), include=include, exclude=exclude),
            ForwardPruning(
                sparsity,
                threshold=threshold,
                overwrite=overwrite,
                first_layer=first_layer,
                include=include,
                exclude=exclude,
            ),
            ActivationPruning(threshold=threshold, first_layer=first_layer, include=include, exclude=exclude),
        ]
    )
    if learning_rate_decay != 1:
        callbacks.append(RoundLearningRate(ExponentialSchedule(learning_rate_decay, learning_rate_decay)))
    selection = {"include": include, "exclude": exclude}
    callbacks += [MaskMonitor(**selection), CollapseMonitor(**selection), SparsityMonitor(**selection)]
    return callbacks
