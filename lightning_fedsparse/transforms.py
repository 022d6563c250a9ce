"""The steps from stored to effective weights, and back for the gradient; the engine in ``effective.py`` knows when."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["MaskTransform", "Transform", "Weights", "bits", "keep_reaching_", "reaching"]

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
        for (name, weight), factor in zip(weights.items(), self._like(weights), strict=True):
            torch.mul(weight, factor, out=out[name])

    def chain_(self, gradients: Weights, stored: Weights, effective: Weights) -> None:
        """Multiply gradients by the masks, unless straight through."""
        if gradients and not self.straight_through:
            torch._foreach_mul_(list(gradients.values()), self._like(gradients))

    def _like(self, tensors: Weights) -> list[Tensor]:
        # a float factor of the tensor's own dtype multiplies several times faster than a bool mask does
        for name, tensor in tensors.items():
            factor = self._factors[name]
            if factor.dtype != tensor.dtype or factor.device != tensor.device:
                self._factors[name] = factor.to(tensor)
        return [self._factors[name] for name in tensors]


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
    # a comparison and a fill take ten times as long
    return F.hardshrink(weight, _just_below(threshold, weight.dtype))


@torch.no_grad()
def keep_reaching_(gradient: Tensor, weight: Tensor, threshold: float) -> Tensor:
    """Zero a gradient where :func:`reaching` zeroes the weight, in place."""
    bound = _just_below(threshold, weight.dtype)
    return torch.ops.aten.hardshrink_backward.grad_input(gradient, weight, bound, grad_input=gradient)  # type: ignore[no-any-return]


def bits(tensor: Tensor) -> Tensor:
    """The same memory as integers of its width."""
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def _just_below(threshold: float, dtype: torch.dtype) -> float:
    # hardshrink keeps what is strictly above its bound
    bound = torch.tensor(threshold, dtype=dtype)
    return bound.nextafter(torch.zeros_like(bound)).item()
