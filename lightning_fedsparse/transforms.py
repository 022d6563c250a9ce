"""The steps from stored to effective weights, and back for the gradient; the engine in ``effective.py`` knows when."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["MaskTransform", "Transform", "Weights", "factor_like", "reaching"]

Weights = Mapping[str, Tensor]


class Transform(ABC):
    """One step between stored and effective weights, over the weights named ``names``.

    ``order`` fixes the place in the chain whatever the order of the callbacks: reparametrizations (0) see the stored
    weight, masks (1) come next, and penalties (2), which change no weight, see the effective one. Gradients take the way
    back, so that a penalty of the stored weight itself (-1) gets them last.
    """

    order: ClassVar[int]
    changes_weights: ClassVar[bool] = True
    corrects_steps: ClassVar[bool] = False

    def __init__(self, names: Sequence[str]) -> None:
        self.names = frozenset(names)

    @abstractmethod
    def apply(self, weights: Weights, out: Weights) -> None:
        """Write the effective weights of ``weights`` into ``out``, which may be the same tensors.

        Called under ``no_grad`` with a subset of ``names``; both have the same keys.
        """

    @abstractmethod
    def chain_(self, gradients: Weights, stored: Weights, effective: Weights) -> None:
        """Bring gradients back through this step in place; all three mappings have the same keys.

        Called after :meth:`apply` of these stored weights.
        """

    def after_step_(self, weights: Weights, before: Weights) -> None:  # noqa: B027  # optional
        """Correct what an optimizer's step made of stored weights, in place; ``before`` holds them as they were.

        Called where ``corrects_steps`` says so.
        """

    def folded(self) -> None:  # noqa: B027  # optional
        """The effect was written into the stored weights for good: what must not act twice ends here."""


class MaskTransform(Transform):
    """``w_eff = w * m``; the gradient is ``g * m``, or ``g`` when ``straight_through`` is set.

    Straight through is dynamic pruning with (error) feedback: the dense gradient at the pruned weights updates the
    stored weights, so a pruned weight keeps learning and can come back (Lin et al., "Dynamic Model Pruning with
    Feedback", ICLR 2020).

    Args:
        masks: Bool tensors (True = kept) by parameter name.
    """

    order = 1

    def __init__(self, masks: Weights) -> None:
        super().__init__(list(masks))
        self.straight_through = False
        self._factors = dict(masks)

    def set(self, masks: Weights) -> None:
        """Replace the masks of the same names. Call it inside :meth:`EffectiveWeights.stored`."""
        if masks.keys() != self._factors.keys():
            raise ValueError(f"expected masks for {sorted(self._factors)}, got {sorted(masks)}")
        self._factors = dict(masks)

    def apply(self, weights: Weights, out: Weights) -> None:
        """Multiply weights by their masks."""
        for name, weight in weights.items():
            torch.mul(weight, factor_like(self._factors, name, weight), out=out[name])

    def chain_(self, gradients: Weights, stored: Weights, effective: Weights) -> None:
        """Multiply gradients by the masks, unless straight through."""
        if gradients and not self.straight_through:
            factors = [factor_like(self._factors, name, gradient) for name, gradient in gradients.items()]
            torch._foreach_mul_(list(gradients.values()), factors)


def factor_like(masks: dict[str, Tensor], name: str, tensor: Tensor) -> Tensor:
    """The mask of this name as a factor for ``tensor``, of its dtype and device; it takes the mask's place in ``masks``.

    A bool mask multiplies, and fills, several times slower than a factor of the tensor's own dtype.
    """
    factor = masks[name]
    if factor.dtype != tensor.dtype or factor.device != tensor.device:
        factor = masks[name] = factor.to(tensor)
    return factor


@torch.no_grad()
def reaching(weight: Tensor, threshold: float) -> Tensor:
    """A copy of weights with zeros in place of those whose magnitude is below a threshold.

    Args:
        weight: Floating-point tensor of any shape.
        threshold: At least 0; 0 keeps everything.

    Example:
        >>> reaching(torch.tensor([0.5, -1.0, 0.25]), 0.5)
        tensor([ 0.5000, -1.0000,  0.0000])
    """
    # a comparison and a fill take ten times as long; what stays must be strictly above the bound, hence the float below
    bound = torch.tensor(threshold, dtype=weight.dtype)
    return F.hardshrink(weight, bound.nextafter(torch.zeros_like(bound)).item())
