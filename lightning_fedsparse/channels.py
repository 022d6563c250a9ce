"""Channels that belong together: what narrowing a network removes with a unit, and the masks of what is left.

A unit is an output channel of a convolution or an output of a linear layer, with everything that goes with it: its
weights and bias, its normalization, and the weights of the next layers that read it. Layers whose outputs are added, as
in a residual stage, share their units; behind a flatten a unit is several inputs of the next layer. The inputs of the
network and its outputs are no units: they all stay.

The masks of a narrowed network keep what no removed unit touches: of a weight the rows and columns of kept units. With
BatchNorm, which treats each channel alone, the masked network computes what the sliced one would.

Reference: which channels depend on each other is found by Torch-Pruning (G. Fang, X. Ma, M. Song, M. B. Mi, X. Wang,
"DepGraph: Towards Any Structural Pruning", CVPR 2023, https://arxiv.org/abs/2301.12900).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch_pruning as tp
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.func import functional_call

__all__ = ["ChannelAxis", "ChannelGroup", "channel_groups", "unit_count", "unit_norms", "width_masks", "window"]

_Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
_BatchNorm = nn.modules.batchnorm._BatchNorm


@dataclass(frozen=True)
class ChannelAxis:
    """One dimension of one parameter that units run along.

    Args:
        name: Name of the parameter.
        shape: Its shape.
        dim: The dimension.
        units: The unit of each position along it, int64 of shape ``(shape[dim],)``; -1 where it is none of the group's.
    """

    name: str
    shape: tuple[int, ...]
    dim: int
    units: Tensor


@dataclass(frozen=True)
class ChannelGroup:
    """Units that can only be removed with all that is theirs.

    Args:
        size: Number of units.
        axes: Where they are.
    """

    size: int
    axes: tuple[ChannelAxis, ...]


def channel_groups(module: nn.Module, example_input: Any) -> list[ChannelGroup]:
    """Find the units of a network, by one forward pass in evaluation mode.

    Args:
        module: A network of convolutions without channel groups, linear layers and BatchNorm.
        example_input: What its ``forward`` takes: a tensor, a tuple of arguments or a dict of them, on its device.

    Returns:
        One entry per group, in the order of the parameters.

    Raises:
        ValueError: If other layers have parameters or statistics along the units, if units are lost on the way from one
            layer to the next, or if there are none.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(12, 2))  # 3 channels of 2 x 2
        >>> (group,) = channel_groups(net, torch.zeros(1, 1, 4, 4))
        >>> [(axis.name, axis.dim) for axis in group.axes], group.axes[-1].units
        ([('0.weight', 0), ('0.bias', 0), ('2.weight', 1)], tensor([0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]))
    """
    with _evaluating(module):
        graph = tp.DependencyGraph().build_dependency(module, example_inputs=example_input, verbose=False)
        groups = _read(graph, module)
        if not groups:
            raise ValueError(f"expected a network with hidden units, got {type(module).__name__} without any")
        _require_independence(module, example_input, groups)
    return groups


def unit_count(size: int, width: float) -> int:
    """``ceil(width * size)``: how many of a group's units a network of a width in (0, 1] keeps, at least 1."""
    return max(1, math.ceil(width * size - 1e-9))  # 0.1 * 30 is a little more than 3


def window(size: int, width: float, start: int = 0) -> Tensor:
    """The units of a cyclic window, ``(start + i) mod size`` for ``i < ceil(width * size)``, int64.

    Example:
        >>> window(8, 0.5), window(8, 0.5, 5)
        (tensor([0, 1, 2, 3]), tensor([5, 6, 7, 0]))
    """
    return (start + torch.arange(unit_count(size, width))) % size


@torch.no_grad()
def unit_norms(group: ChannelGroup, weights: Mapping[str, Tensor], norm: Literal["l2", "mean"] = "l2") -> Tensor:
    """How large the weights are that go with each unit: those that lead to it and those that read it.

    Biases and normalization are left out, for they are of another size than weights.

    Args:
        group: The units.
        weights: Parameters by name, on one device.
        norm: ``"l2"`` over all of a unit's weights, or the ``"mean"`` magnitude in each layer, averaged over the layers, so that
            one with many weights per unit counts no more than others.

    Returns:
        Float64 of shape ``(group.size,)``, on the CPU.

    Example:
        >>> net = nn.Sequential(nn.Linear(1, 2), nn.Linear(2, 1))
        >>> (group,) = channel_groups(net, torch.zeros(1, 1))
        >>> unit_norms(group, {"0.weight": torch.tensor([[3.0], [0.0]]), "1.weight": torch.tensor([[4.0, 1.0]])})
        tensor([5., 1.], dtype=torch.float64)
    """
    axes = [axis for axis in group.axes if len(axis.shape) > 1]
    sizes = torch.zeros(group.size, dtype=torch.float64)
    for axis in axes:
        along = weights[axis.name].movedim(axis.dim, 0).flatten(1).double()
        mine = axis.units >= 0  # the others are units of another group
        parts = (along.square() if norm == "l2" else along.abs()).sum(1).cpu()[mine]
        sums = torch.zeros_like(sizes).index_add_(0, axis.units[mine], parts)
        counts = torch.bincount(axis.units[mine], minlength=group.size) * along.shape[1]
        sizes += sums if norm == "l2" else sums / counts.clamp(min=1) / len(axes)
    return sizes.sqrt() if norm == "l2" else sizes


def width_masks(groups: Sequence[ChannelGroup], kept: Iterable[Tensor]) -> dict[str, Tensor]:
    """Masks of the network that keeps these units.

    Args:
        groups: The units, as :func:`channel_groups` finds them.
        kept: For each group the units to keep, int64.

    Returns:
        Bool masks by parameter name, of every parameter that units run along.
    """
    masks: dict[str, Tensor] = {}
    for group, units in zip(groups, kept, strict=True):
        held = torch.zeros(group.size + 1, dtype=torch.bool)
        held[units] = True
        held[-1] = True  # positions of other groups are theirs to mask
        for axis in group.axes:
            along = [-1 if dim == axis.dim else 1 for dim in range(len(axis.shape))]
            mask = masks.setdefault(axis.name, torch.ones(axis.shape, dtype=torch.bool))
            mask.logical_and_(held[axis.units].view(along))
    return masks


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode with gradients for all parameters: the graph is read off autograd's, which leaves frozen ones out."""
    training = {layer: layer.training for layer in module.modules()}
    frozen = [parameter for parameter in module.parameters() if not parameter.requires_grad]
    try:
        module.eval()
        for parameter in frozen:
            parameter.requires_grad_(True)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for layer, mode in training.items():
            layer.training = mode


def _read(graph: tp.DependencyGraph, module: nn.Module) -> list[ChannelGroup]:
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    layers = {id(layer): name for name, layer in module.named_modules()}
    order = {name: position for position, name in enumerate(names.values())}
    groups = []
    for members in graph.get_all_groups(root_module_types=[nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear]):
        axes: dict[tuple[str, int], ChannelAxis] = {}
        for member in members:
            layer = member.dep.target.module
            if type(layer).__module__ == tp.ops.__name__:
                continue  # an operation between layers: a sum, a reshape
            dim = 0 if graph.is_out_channel_pruning_fn(member.dep.handler) else 1
            for parameter in _along(layer, dim, layers.get(id(layer), type(layer).__name__)):
                name, shape = names[id(parameter)], tuple(parameter.shape)
                axis = axes.setdefault((name, dim), ChannelAxis(name, shape, dim, torch.full((shape[dim],), -1)))
                axis.units[torch.tensor(member.idxs)] = torch.tensor(member.root_idxs)
        # a group that no layer reads is the network's output
        if any(dim == 1 for _, dim in axes):
            ordered = sorted(axes.values(), key=lambda axis: order[axis.name])
            groups.append(ChannelGroup(len(members[0].idxs), tuple(ordered)))
    return sorted(groups, key=lambda group: order[group.axes[0].name])


@torch.no_grad()
def _require_independence(module: nn.Module, example_input: Any, groups: Sequence[ChannelGroup]) -> None:
    """What makes a unit must not matter once nothing reads it: else its channels were lost between two layers."""
    generator = torch.Generator().manual_seed(0)

    def draw(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator).to(like) if like.is_floating_point() else like

    weights = {}
    for name, weight in module.named_parameters():
        # sums stay finite in deep networks, and positive biases keep ReLUs alive
        weights[name] = draw(weight) / weight[0].numel() ** 0.5 if weight.ndim > 1 else draw(weight).abs()
    inputs = apply_to_collection(example_input, Tensor, draw)
    arguments, named = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    readers = [replace(group, axes=tuple(axis for axis in group.axes if axis.dim == 1)) for group in groups]
    for first in (0, 1):
        kept = [torch.arange(first, group.size, 2) for group in groups]
        outputs = []
        for masks in (width_masks(readers, kept), width_masks(groups, kept)):
            masked = {name: weights[name] * mask.to(weights[name].device) for name, mask in masks.items()}
            outputs.append(functional_call(module, {**weights, **masked}, arguments, named))
        try:
            torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-5)
        except AssertionError as difference:
            raise ValueError(
                f"expected a network whose channels can be followed from layer to layer, got {type(module).__name__}, "
                "whose output still depends on units that no layer reads: a reshape or a concatenation hides where they go"
            ) from difference


def _along(layer: Any, dim: int, name: str) -> list[Tensor]:
    """The layer's parameters that have the units of its output (0) or its input (1) along that dimension."""
    if isinstance(layer, nn.Linear) or (isinstance(layer, _Convolution) and layer.groups == 1):
        return [layer.weight] if dim == 1 or layer.bias is None else [layer.weight, layer.bias]
    if isinstance(layer, _BatchNorm):
        return [parameter for parameter in (layer.weight, layer.bias) if parameter is not None]
    raise ValueError(
        f"expected convolutions without channel groups, linear layers and BatchNorm along the units, got {name!r}, "
        f"which is {type(layer).__name__}: a masked network would not compute what the narrow one does"
    )
