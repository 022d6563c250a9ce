"""SparsyFed: sparse adaptive federated training.

Clients train powers of weights (``Powerpropagation``), keep pruned activations for the backward pass
(``ActivationPruning``), and after their local training send the weights of largest magnitude (``TopKAfterTraining``); the
server averages them. Masks are never stored: the support of the average is the next round's.

Use it at 90 to 99 % sparsity on a network with weights to spare; a small one dies of the cut after the first round unless
the sparsity ramps up. For ``beta`` above 1 a zero weight has no gradient and never returns: after round 1 the mask adapts
only by choosing among the weights that some client kept then. ``regrow`` names weights that are left out of the
reparametrization, whose zeros can return. It clashes with other callbacks that own masks over the same weights, and with
a server optimizer other than plain averaging, which fills what all clients have dropped.

Reference: "SparsyFed", ICLR 2025, https://arxiv.org/abs/2504.05153. The released method is ``sparsyfed(initialization=
"truncated_normal", activation_threshold="first_batch", learning_rate_decay=0.02 ** (1 / rounds))``, but for linear layers,
whose threshold it finds per batch; its ResNet-18 leaves the shortcut convolutions as they are (``regrow=["*shortcut*"]``) and
prunes no activations there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from lightning_fedsparse.callbacks.activation_pruning import ActivationPruning
from lightning_fedsparse.callbacks.base import CallbackList
from lightning_fedsparse.callbacks.collapse_monitor import CollapseMonitor
from lightning_fedsparse.callbacks.mask_monitor import MaskMonitor
from lightning_fedsparse.callbacks.powerpropagation import Powerpropagation
from lightning_fedsparse.callbacks.round_learning_rate import RoundLearningRate
from lightning_fedsparse.callbacks.sparsity_monitor import SparsityMonitor
from lightning_fedsparse.callbacks.topk_after_training import TopKAfterTraining
from lightning_fedsparse.schedules import ConstantSchedule, CubicSchedule, ExponentialSchedule

__all__ = ["sparsyfed"]


def sparsyfed(
    sparsity: float = 0.95,
    beta: float = 1.25,
    *,
    exponent: Literal["fixed", "spectral_layer", "spectral_global"] = "fixed",
    initialization: Literal["module", "truncated_normal"] = "module",
    activation_pruning: bool = True,
    activation_threshold: Literal["per_batch", "first_batch"] = "per_batch",
    activation_density_floor: float = 1e-7,
    ramp: float = 0.0,
    layer_floor: float = 0.0,
    learning_rate_decay: float = 1.0,
    regrow: Sequence[str] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> CallbackList:
    """Compose SparsyFed for a ``FederatedLoop`` or a plain ``Trainer``.

    Args:
        sparsity: Fraction of zeros among the prunable weights that a client sends.
        beta: Exponent of the weights, at least 1; 1 is the Top-K baseline with pruned activations.
        exponent: ``"fixed"`` (beta), or from the weights' spectral norms, by layer or one for all.
        initialization: Effective weights start as the ``"module"``'s own, or as released code draws them.
        activation_pruning: Whether clients keep pruned activations for the backward pass; False is SparsyFed-NA.
        activation_threshold: ``"per_batch"``, or of the ``"first_batch"`` of a client's round (released code, convolutions).
        activation_density_floor: Least share of a layer's input that is kept.
        ramp: Share of the run over which the sparsity grows, cubically, from 0; 0 cuts to the target after round 1.
        layer_floor: Share of each layer's weights that is kept at least.
        learning_rate_decay: Factor of the learning rate per round, from the first round on; 1 leaves it alone.
        regrow: Globs of names of weights that are not reparametrized, so that their zeros can return.
        include: Globs of parameter names to prune instead of all convolution and linear weights.
        exclude: Globs of parameter names to leave dense and not reparametrized.

    Returns:
        Callbacks, in the order in which they belong.

    Raises:
        ValueError: For a value out of range or an unknown option.
    """
    if not 0 <= ramp <= 1:
        raise ValueError(f"expected ramp in [0, 1], got {ramp}")
    selection = {"include": tuple(include), "exclude": tuple(exclude)}
    schedule = CubicSchedule(0.0, sparsity) if ramp > 0 else ConstantSchedule(sparsity)
    topk = TopKAfterTraining(schedule, end=ramp or 1.0, layer_floor=layer_floor, **selection)
    power = Powerpropagation(
        beta,
        exponent=exponent,
        initialization=initialization,
        include=selection["include"],
        exclude=(*selection["exclude"], *regrow),
    )
    callbacks = CallbackList([topk, power])
    if activation_pruning:
        callbacks.append(
            ActivationPruning(
                threshold=activation_threshold,
                density_floor=activation_density_floor,
                include=selection["include"],
                exclude=selection["exclude"],
            )
        )
    if learning_rate_decay != 1:
        callbacks.append(RoundLearningRate(ExponentialSchedule(learning_rate_decay, learning_rate_decay)))
    monitors = [MaskMonitor(**selection), CollapseMonitor(**selection), SparsityMonitor(**selection)]
    return CallbackList([*callbacks, *monitors])
