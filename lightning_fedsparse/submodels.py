r"""Submodels: the transform of those that a mask describes; thresholds, gradient factor and transform of the largest weights.

The formulas of the latter, and where they come from, are in :mod:`lightning_fedsparse.callbacks.importance_masking`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from lightning_fedsparse.masks import importance_masks, importance_threshold, top_masks
from lightning_fedsparse.ranking import kth_largest, magnitudes_of
from lightning_fedsparse.transforms import Transform, Weights, bits, keep_reaching_, reaching

__all__ = [
    "ImportanceTransform",
    "SubmodelTransform",
    "extraction_groups",
    "importance_factor",
    "submodel_masks",
    "submodel_thresholds",
]


@torch.no_grad()
def importance_factor(weight: Tensor, threshold: float) -> Tensor:
    """``1 + 2 |w| theta / (|w| + theta)^2``: what the gradient at a kept weight is multiplied by, in [1, 1.5].

    Args:
        weight: Stored weights, any shape.
        threshold: theta, at least 0; where it and the weight are 0 the factor is 1.

    Example:
        >>> importance_factor(torch.tensor([0.5, 1.0, -2.0]), 0.5)
        tensor([1.5000, 1.4444, 1.3200])
    """
    if threshold == 0:
        return torch.ones_like(weight)
    # as a share in (0, 1], whose square can't underflow where |w| is tiny; in one piece of memory
    share = weight.abs().add_(threshold)
    torch.div(weight.new_tensor(threshold), share, out=share)
    return share.addcmul_(share, share, value=-1).mul_(2).add_(1)


def extraction_groups(
    names: Sequence[str], groups: Sequence[Sequence[str]] = (), *, per_tensor: bool = False
) -> list[list[str]]:
    """Sort parameters into groups that share a threshold.

    Args:
        names: Names of the masked parameters.
        groups: For each group globs of names; none for one group of all, or one of each.
        per_tensor: Without ``groups``: whether each parameter is its own group.

    Raises:
        ValueError: If a group matches nothing, or a parameter belongs to no group or to several.
    """
    if not groups:
        return [[name] for name in names] if per_tensor else [list(names)]
    members = [[name for name in names if any(fnmatchcase(name, glob) for glob in globs)] for globs in groups]
    for globs, group in zip(groups, members, strict=True):
        if not group:
            raise ValueError(f"expected groups that match masked parameters, got {list(globs)}, which matches none")
    for name in names:
        if (count := sum(name in group for group in members)) != 1:
            raise ValueError(f"expected every masked parameter in one group, got {name!r} in {count}")
    return members


@torch.no_grad()
def submodel_thresholds(
    weights: Mapping[str, Tensor], groups: Sequence[Sequence[str]], capacity: float, *, layer_floor: float = 0.0
) -> dict[str, float]:
    """Threshold of every tensor in the submodel of a capacity.

    Each group keeps its ``k = max(1, floor(capacity * n))`` largest weights. With a floor every tensor first keeps its own
    ``max(1, floor(layer_floor * size))`` largest, and the rest of the ``k`` are the group's largest others; a tensor that
    has no more than its floor gets a lower threshold of its own.

    Args:
        weights: Weights by name: all of them, or zeros in place of those that this very submodel does not hold.
        groups: Names that share a threshold, each name in one group.
        capacity: Share of each group to keep, in (0, 1].
        layer_floor: Share of each tensor to keep at least, in [0, 1).

    Raises:
        ValueError: If a group's floors together are more than its ``k``.
    """
    thresholds: dict[str, float] = {}
    for group in groups:
        members = {name: weights[name] for name in group}
        if layer_floor == 0:
            thresholds |= dict.fromkeys(members, importance_threshold(members, capacity))
        else:
            thresholds |= _floored_thresholds(members, capacity, layer_floor)
    return thresholds


def submodel_masks(weights: Mapping[str, Tensor], thresholds: Mapping[str, float]) -> dict[str, Tensor]:
    """Bool masks of ``|w| >= theta``, each tensor by its own threshold."""
    return {name: importance_masks({name: weight}, thresholds[name])[name] for name, weight in weights.items()}


class SubmodelTransform(Transform):
    """Compute with the weights of a mask alone; the others have no gradient and stay where they are.

    Args:
        masks: Bool tensors (True = held) by parameter name, None where everything is held.
    """

    order = 1
    corrects_steps = True

    def __init__(self, masks: Mapping[str, Tensor | None]) -> None:
        super().__init__(list(masks))
        self.set_masks(masks)

    def set_masks(self, masks: Mapping[str, Tensor | None]) -> None:
        """Replace the masks of the same names; to be called inside ``EffectiveWeights.stored``."""
        if masks.keys() != self.names:
            raise ValueError(f"expected masks for {sorted(self.names)}, got {sorted(masks)}")
        self._masks = {name: mask for name, mask in masks.items() if mask is not None}

    def apply(self, weights: Weights, out: Weights) -> None:
        """Zero the weights that are not held."""
        for name, weight in weights.items():
            if name in self._masks:
                torch.bitwise_and(bits(weight), self._held(name, weight), out=bits(out[name]))
            else:
                out[name].copy_(weight)

    def chain_(self, gradients: Weights, stored: Weights, effective: Weights) -> None:
        """Zero the gradients there."""
        for name, gradient in gradients.items():
            if name in self._masks:
                bits(gradient).bitwise_and_(self._held(name, gradient))

    def after_step_(self, weights: Weights, before: Weights) -> None:
        """Put weights that are not held back where they were: momentum and weight decay have moved them."""
        for name, weight in weights.items():
            if name in self._masks:
                changes = (bits(before[name]) ^ bits(weight)).bitwise_and_(self._held(name, weight))
                torch.bitwise_xor(bits(before[name]), changes, out=bits(weight))

    def _held(self, name: str, like: Tensor) -> Tensor:
        """All bits of every weight that is held, none of the others, as integers of the weights' width."""
        # an eighth of the time of a selection by bools; unlike a product with 0 it leaves out what is not a number too
        mask = self._masks[name]
        if mask.dtype != bits(like).dtype or mask.device != like.device:
            mask = self._masks[name] = -mask.bool().to(bits(like))
        return mask


class ImportanceTransform(SubmodelTransform):
    """Keep the weights of a fixed mask that reach their threshold now.

    Args:
        masks: Bool tensors (True = held) by parameter name, None where everything is held.
        thresholds: theta of every parameter, fixed until :meth:`set`.
        corrects: Whether gradients get :func:`importance_factor`.
    """

    def __init__(
        self, masks: Mapping[str, Tensor | None], thresholds: Mapping[str, float], *, corrects: bool = True
    ) -> None:
        super().__init__({name: masks[name] for name in thresholds})
        self.set(masks, thresholds)
        self._corrects = corrects

    def set(self, masks: Mapping[str, Tensor | None], thresholds: Mapping[str, float]) -> None:
        """Replace masks and thresholds of the same names; to be called inside ``EffectiveWeights.stored``."""
        self.set_masks(masks)
        self._thresholds = dict(thresholds)

    def apply(self, weights: Weights, out: Weights) -> None:
        """Zero the weights that are not held, and those below their threshold."""
        for name, weight in weights.items():
            out[name].copy_(reaching(weight, self._thresholds[name]))
        super().apply(out, out)

    def chain_(self, gradients: Weights, stored: Weights, effective: Weights) -> None:
        """Multiply the gradients by the factor, and zero those of weights that are cut."""
        for name, gradient in gradients.items():
            threshold = self._thresholds[name]
            if threshold > 0:  # else nothing is below it, and the factor is 1
                keep_reaching_(gradient, stored[name], threshold)
                if self._corrects:
                    gradient.mul_(importance_factor(stored[name], threshold))
        super().chain_(gradients, stored, effective)


def _floored_thresholds(members: Mapping[str, Tensor], capacity: float, floor: float) -> dict[str, float]:
    counts = {name: max(1, math.floor(floor * weight.numel())) for name, weight in members.items()}
    size = sum(weight.numel() for weight in members.values())
    kept = max(1, math.floor(capacity * size))
    others = kept - sum(counts.values())
    if others < 0:
        raise ValueError(
            f"expected a layer_floor within the capacity, got layer_floor={floor}, which keeps {sum(counts.values())} of "
            f"{size} weights, at capacity {capacity}, which keeps {kept}"
        )
    floors = top_masks(members, counts)
    pool = torch.cat(
        [magnitudes_of(name, weight).masked_fill_(floors[name].reshape(-1), 0) for name, weight in members.items()]
    )
    shared = kth_largest(pool, others) if others else math.inf
    return {name: min(shared, importance_threshold({name: weight}, floor)) for name, weight in members.items()}
