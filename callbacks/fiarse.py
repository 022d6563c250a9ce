"""FIARSE: federated learning of one model by clients that each hold the part of it they can.

Every client gets the largest weights that its capacity allows, trains them with a gradient that accounts for the mask's
threshold (``ImportanceMasking``), and sends its change; the server averages each weight over the clients that held it.

Use it where clients differ in what they can hold or send. Give the clients' capacities to ``FederatedDataModule``, and
BatchNorm statistics of their own to the submodels by ``FederatedLoop(buffers="recalibrate")``. The masks are
unstructured: a small client saves bytes and storage, its dense kernels run no faster.

Reference: F. Wu, X. Wang, Y. Wang, T. Liu, L. Su, J. Gao, "FIARSE: Model-Heterogeneous Federated Learning via
Importance-Aware Submodel Extraction", NeurIPS 2024, https://arxiv.org/abs/2407.19389. The released method is
``fiarse()`` for language models with the classifier excluded, and encoder biases and the embeddings of words and positions
named in ``include`` beside the weights; for image models it is ``fiarse(full_threshold="min")`` with the classifier's bias
in ``include`` beside the weights, and normalization layers that use the statistics of each batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from lightning_fedsparse.callbacks.base import CallbackList
from lightning_fedsparse.callbacks.importance_masking import ImportanceMasking

__all__ = ["fiarse"]


def fiarse(
    capacity: float = 1.0,
    *,
    extraction: Literal["model", "tensor"] = "model",
    groups: Sequence[Sequence[str]] = (),
    layer_floor: float = 0.0,
    gradient: Literal["tcb", "plain"] = "tcb",
    full_threshold: Literal["zero", "min"] = "zero",
    refresh_every: int = 100,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> CallbackList:
    """Compose FIARSE for a ``FederatedLoop`` or a plain ``Trainer``.

    Args:
        capacity: Share of the masked weights that is held, in (0, 1]: in a plain Trainer, and by clients that have no
            capacity of their own.
        extraction: One threshold for the whole ``"model"`` (released code), or one per ``"tensor"``.
        groups: Instead of ``extraction``: one threshold for each of these lists of globs of parameter names; the released
            "layer-wise" code has one per stage.
        layer_floor: Share of every tensor that is held at least, within the capacity; 0 is the released code's.
        gradient: ``"tcb"``: with the factor of the threshold; ``"plain"``: without, for comparison.
        full_threshold: Threshold at capacity 1: ``"zero"``, or ``"min"``, the smallest magnitude.
        refresh_every: Optimizer steps between extractions in a plain Trainer.
        include: Globs of parameter names to mask instead of all convolution and linear weights.
        exclude: Globs of parameter names to leave dense.

    Returns:
        Callbacks, in the order in which they belong.

    Raises:
        ValueError: For a value out of range or an unknown option.
    """
    return CallbackList(
        [
            ImportanceMasking(
                capacity,
                extraction=extraction,
                groups=groups,
                layer_floor=layer_floor,
                gradient=gradient,
                full_threshold=full_threshold,
                refresh_every=refresh_every,
                include=include,
                exclude=exclude,
            )
        ]
    )
