"""Masks from magnitudes, masks at random, and what can be said of masks.

A mask is a bool tensor of its weight's shape, True = kept. A magnitude mask at sparsity ``s`` over ``n`` weights zeros
exactly ``round(s * n)`` of them (Python's ``round``, half to even): those with the smallest ``|w|``, and among equal
ones those with the lower flat index. Scope ``"global"`` ranks all tensors in one pool, so layers come out at different
densities; scope ``"layer"`` ranks each tensor alone.

Where a distribution such as ERK fixes the density of every layer, the number of weights kept is truncated, layer by
layer (:func:`kept_counts`), and the same counts serve the largest weights (:func:`top_masks`) or random positions
(:func:`random_masks`).

An importance mask is a comparison with a threshold, ``|w| >= theta`` (:func:`importance_threshold`,
:func:`importance_masks`): among equals all are kept, so that a larger share always contains a smaller one.

Reference: Q. Long, C. Anagnostopoulos, S. P. Parambath, D. Bi, "FedDIP: Federated Learning with Extreme Dynamic
Pruning and Incremental Regularization", ICDM 2023, https://arxiv.org/abs/2309.06805. Its released code leaves the order
of ties open; here it is fixed, so that every machine gets the same mask.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_fedsparse.ranking import kth_largest, largest, magnitudes_of

__all__ = [
    "importance_masks",
    "importance_threshold",
    "intersection_over_union",
    "kept_counts",
    "largest_weights",
    "magnitude_masks",
    "pack_mask",
    "random_masks",
    "sparsity_of",
    "top_masks",
    "unpack_mask",
]


@torch.no_grad()
def magnitude_masks(
    tensors: Mapping[str, Tensor],
    sparsity: float | Mapping[str, float],
    scope: Literal["global", "layer"] = "global",
) -> dict[str, Tensor]:
    """Keep the weights of largest magnitude at an exact sparsity.

    Args:
        tensors: Weights by name, any floating dtype, shape and strides; for scope ``"global"`` all on one device.
        sparsity: Fraction of zeros in [0, 1): one for all, or one per name (then ``scope`` must be ``"layer"``).
        scope: ``"global"`` (one pool, in the mapping's order) or ``"layer"`` (each tensor by itself).

    Returns:
        For every name a contiguous bool mask of the tensor's shape, on its device.

    Raises:
        ValueError: A sparsity outside [0, 1), names that do not fit, an unknown scope, a NaN weight, or no tensors.

    Example:
        >>> magnitude_masks({"a": torch.tensor([3.0, -1.0]), "b": torch.tensor([0.5, 2.0])}, 0.5)
        {'a': tensor([ True, False]), 'b': tensor([False,  True])}
    """
    if not tensors:
        raise ValueError("expected at least one tensor to make magnitude masks for, got none")
    if scope not in ("global", "layer"):
        raise ValueError(f"expected scope 'global' or 'layer', got {scope!r}")
    if isinstance(sparsity, Mapping):
        if scope == "global":
            raise ValueError("expected scope='layer' with one sparsity per tensor name, got scope='global'")
        _require_same_names(tensors, sparsity, "sparsity")
        per_name = dict(sparsity)
    else:
        per_name = dict.fromkeys(tensors, sparsity)
    for name, value in per_name.items():
        _require_sparsity(value, name)

    if scope == "layer":
        sizes = {name: tensor.numel() for name, tensor in tensors.items()}
        return top_masks(tensors, {name: size - round(per_name[name] * size) for name, size in sizes.items()})
    pool = torch.cat([magnitudes_of(name, tensor) for name, tensor in tensors.items()])
    kept = largest(pool, pool.numel() - round(next(iter(per_name.values())) * pool.numel()))
    parts = torch.split(kept, [tensor.numel() for tensor in tensors.values()])
    # cloned, because saving or pickling a view would carry the whole pool along with every mask
    return {name: part.view(tensor.shape).clone() for (name, tensor), part in zip(tensors.items(), parts, strict=True)}


@torch.no_grad()
def top_masks(tensors: Mapping[str, Tensor], kept: Mapping[str, int]) -> dict[str, Tensor]:
    """Keep in each tensor a given number of weights, the largest by magnitude.

    Args:
        tensors: Weights by name.
        kept: For every name how many weights to keep, from 0 to the tensor's size.

    Returns:
        For every name a contiguous bool mask of the tensor's shape, on its device.

    Raises:
        ValueError: Names that do not fit, a count outside its range, or a NaN weight.
    """
    _require_same_names(tensors, kept, "count")
    masks = {}
    for name, tensor in tensors.items():
        _require_count(kept[name], tensor.numel(), name)
        masks[name] = largest(magnitudes_of(name, tensor), kept[name]).view(tensor.shape)
    return masks


@torch.no_grad()
def largest_weights(weights: Mapping[str, Tensor], sparsity: float, *, layer_floor: float = 0.0) -> dict[str, Tensor]:
    """Masks of the non-zero weights among the ``n - round(sparsity * n)`` largest of all.

    Args:
        weights: Weights by name.
        sparsity: Fraction of zeros over all weights together, in [0, 1).
        layer_floor: Share of each layer's weights that is kept at least, from what others would get.

    Returns:
        A bool mask for every name.
    """
    ranked = dict(weights)
    if layer_floor > 0:
        first = top_masks(weights, {name: math.ceil(layer_floor * weight.numel()) for name, weight in weights.items()})
        ranked = {name: weight.masked_fill(first[name], float("inf")) for name, weight in weights.items()}
    kept = magnitude_masks(ranked, sparsity)
    return {name: kept[name] & (weight != 0) for name, weight in weights.items()}


@torch.no_grad()
def importance_threshold(tensors: Mapping[str, Tensor], capacity: float) -> float:
    """The ``k``-th largest magnitude over all tensors together, ``k = max(1, floor(capacity * n))`` of ``n`` weights.

    Args:
        tensors: Weights by name, at least one weight in all.
        capacity: Share of the weights to keep, in (0, 1].

    Raises:
        ValueError: A capacity outside (0, 1], a NaN weight, or no weights.

    Example:
        >>> importance_threshold({"a": torch.tensor([3.0, -1.0]), "b": torch.tensor([0.5, -2.0])}, 0.5)
        2.0
    """
    if not 0 < capacity <= 1:
        raise ValueError(f"expected a capacity in (0, 1], got {capacity}")
    if not any(tensor.numel() for tensor in tensors.values()):
        raise ValueError("expected at least one weight to find a threshold for, got none")
    pool = torch.cat([magnitudes_of(name, tensor) for name, tensor in tensors.items()])
    return kth_largest(pool, max(1, math.floor(capacity * pool.numel())))


@torch.no_grad()
def importance_masks(tensors: Mapping[str, Tensor], threshold: float) -> dict[str, Tensor]:
    """Keep every weight with ``|w| >= threshold``.

    Args:
        tensors: Weights by name.
        threshold: As :func:`importance_threshold` gives it; weights of exactly this magnitude are all kept.

    Returns:
        For every name a bool mask of the tensor's shape, on its device.

    Example:
        >>> importance_masks({"a": torch.tensor([3.0, -1.0]), "b": torch.tensor([0.5, -2.0])}, 2.0)
        {'a': tensor([ True, False]), 'b': tensor([False,  True])}
    """
    return {name: tensor.detach().abs() >= threshold for name, tensor in tensors.items()}


def random_masks(
    shapes: Mapping[str, Sequence[int]], kept: Mapping[str, int], *, generator: torch.Generator
) -> dict[str, Tensor]:
    """Keep in each layer a given number of weights at uniformly random positions.

    Args:
        shapes: Shape of each layer by name; layers are drawn in this order.
        kept: For every name how many weights to keep, from 0 to the layer's size.
        generator: Source of the positions; the masks are on its device.

    Returns:
        For every name a bool mask of the given shape.

    Raises:
        ValueError: Names that do not fit, or a count outside its range.
    """
    _require_same_names(shapes, kept, "count")
    masks = {}
    for name, shape in shapes.items():
        size = math.prod(shape)
        _require_count(kept[name], size, name)
        mask = torch.zeros(size, dtype=torch.bool, device=generator.device)
        mask[torch.randperm(size, generator=generator, device=generator.device)[: kept[name]]] = True
        masks[name] = mask.view(tuple(shape))
    return masks


def kept_counts(shapes: Mapping[str, Sequence[int]], sparsities: Mapping[str, float]) -> dict[str, int]:
    """Whole number of weights that each layer keeps: ``(1 - sparsity) * size``, truncated.

    Args:
        shapes: Shape of each layer by name.
        sparsities: For every name the fraction of zeros, in [0, 1), for example from
            :func:`~lightning_fedsparse.distributions.erk_sparsities`.

    Raises:
        ValueError: Names that do not fit, or a sparsity outside [0, 1).

    Example:
        >>> kept_counts({"conv": (6, 1, 5, 5)}, {"conv": 0.196471})  # 150 * 0.803529 = 120.53
        {'conv': 120}
    """
    _require_same_names(shapes, sparsities, "sparsity")
    counts = {}
    for name, shape in shapes.items():
        _require_sparsity(sparsities[name], name)
        # the slack, far above rounding errors and far below one weight, lets 2.9999999999996 count as 3
        counts[name] = math.floor(math.prod(shape) * (1 - sparsities[name] + 1e-12))
    return counts


def sparsity_of(masks: Mapping[str, Tensor | None]) -> float:
    """Fraction of zeros over all masked weights together; 0.0 where nothing is masked.

    Args:
        masks: Bool masks by name; entries that are None (dense, not masked) are left out.

    Example:
        >>> sparsity_of({"a": torch.tensor([True, False, False]), "b": torch.tensor([True]), "bias": None})
        0.5
    """
    present = [mask for mask in masks.values() if mask is not None]
    size = sum(mask.numel() for mask in present)
    return 1 - sum(int(mask.count_nonzero()) for mask in present) / size if size else 0.0


def intersection_over_union(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """Share of the weights kept by either that both keep, over all names together; 1.0 where neither keeps any.

    Args:
        first: Bool masks by name.
        second: Bool masks of the same names and shapes.

    Raises:
        ValueError: Names or shapes that differ.

    Example:
        >>> intersection_over_union({"a": torch.tensor([True, True, False])}, {"a": torch.tensor([False, True, True])})
        0.3333333333333333
    """
    _require_same_names(first, second, "second mask")
    both = either = 0
    for name, mask in first.items():
        if mask.shape != second[name].shape:
            shapes = f"{tuple(mask.shape)} and {tuple(second[name].shape)}"
            raise ValueError(f"expected masks of one shape for {name!r}, got {shapes}")
        both += int((mask & second[name]).count_nonzero())
        either += int((mask | second[name]).count_nonzero())
    return both / either if either else 1.0


def pack_mask(mask: Tensor) -> dict[str, Any]:
    """Pack a mask to eight entries a byte, for checkpoints that load with ``weights_only=True``.

    Args:
        mask: Bool tensor of any shape.

    Returns:
        ``"bits"``, a uint8 tensor of ``ceil(mask.numel() / 8)`` bytes on the CPU (row-major order, first entry in the highest
        bit), and ``"shape"``, a list.
    """
    bits = torch.from_numpy(np.packbits(mask.detach().cpu().numpy().reshape(-1)))
    return {"bits": bits, "shape": list(mask.shape)}


def unpack_mask(packed: Mapping[str, Any]) -> Tensor:
    """Undo :func:`pack_mask`.

    Returns:
        Bool tensor on the CPU.

    Raises:
        ValueError: For bits of another dtype or length than the shape needs.
    """
    bits, shape = packed["bits"], tuple(packed["shape"])
    size = math.prod(shape)
    expected = (size + 7) // 8
    if bits.dtype != torch.uint8 or bits.shape != (expected,):
        raise ValueError(
            f"expected a packed mask of {expected} uint8 entries for shape {shape}, "
            f"got shape {tuple(bits.shape)} and {bits.dtype}"
        )
    return torch.from_numpy(np.unpackbits(bits.cpu().numpy(), count=size).view(np.bool_)).view(shape)


def _require_sparsity(value: float, name: str) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"expected a sparsity in [0, 1), got {value} for {name!r}")


def _require_count(kept: int, size: int, name: str) -> None:
    if not 0 <= kept <= size:
        raise ValueError(f"expected between 0 and {size} weights to keep in {name!r}, got {kept}")


def _require_same_names(expected: Mapping[str, object], given: Mapping[str, object], what: str) -> None:
    if missing := [name for name in expected if name not in given]:
        raise ValueError(f"expected one {what} per name, got none for {missing}")
    if unknown := [name for name in given if name not in expected]:
        raise ValueError(f"expected one {what} per name, got unknown names {unknown}")
