"""From stored weights to a servable model.

A checkpoint, of a plain Trainer or of a federation, holds the stored weights and the callbacks' state. Folding applies
what the state says: the cut to the ``"largest"`` weights that the end of ``fit`` makes, ``"exponents"`` of weights that are
powers of the stored ones, then ``"masks"``, then magnitude ``"thresholds"``. The plain model then computes what training
computed, without any callback.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_fedsparse.effective import EffectiveWeights
from lightning_fedsparse.masks import largest_weights, unpack_mask
from lightning_fedsparse.powers import power

__all__ = ["fold", "load_folded"]

Module = TypeVar("Module", bound=nn.Module)


def fold(module: Module) -> Module:
    """Write the effective weights into a module for good, while its engine is live (inside a ``fit``, say).

    Returns:
        The same module. Without a live engine it is returned as it is.
    """
    EffectiveWeights.of(module).fold_all()
    return module


@torch.no_grad()
def load_folded(checkpoint: str | Path | Mapping[str, Any], module: Module) -> Module:
    """Load a checkpoint of a Trainer or of a federation into a plain module, with effective weights.

    Args:
        checkpoint: Path of a checkpoint, or its content.
        module: Module of the same parameters; written in place.

    Returns:
        The same module.

    Raises:
        ValueError: If the file can't be read with ``weights_only=True``, holds no ``state_dict``, or names and shapes
            are not the module's, which is then as it was.
    """
    if isinstance(checkpoint, Mapping):
        content, where = checkpoint, "the checkpoint"
    else:
        content, where = _read(checkpoint), str(checkpoint)
    if "state_dict" not in content:
        raise ValueError(f"expected a Trainer's checkpoint with a 'state_dict', found {sorted(content)} in {where}")
    tensors = _under_all_names(content["state_dict"], module)
    expected, found = _shapes(module.state_dict()), _shapes(tensors)
    if expected != found:
        name = min(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise ValueError(
            f"expected a checkpoint of {type(module).__name__}, got another in {where}: {name!r} has shape "
            f"{expected.get(name)} in the module and {found.get(name)} in the checkpoint"
        )
    module.load_state_dict(tensors)
    parameters = dict(module.named_parameters())
    for cut in _states(content, "largest"):
        weights = {name: parameters[name] for name in cut["names"]}
        for name, mask in largest_weights(weights, cut["sparsity"], layer_floor=cut["layer_floor"]).items():
            weights[name].mul_(mask)
    for powers in _states(content, "exponents"):
        weights = {name: parameters[name] for name in powers}
        power(weights, powers, weights)
    for masks in _states(content, "masks"):
        for name, mask in masks.items():
            parameters[name].mul_(unpack_mask(mask).to(parameters[name].device))
    for thresholds in _states(content, "thresholds"):
        for name, threshold in thresholds.items():
            parameters[name].masked_fill_(parameters[name].abs() < threshold, 0)
    return module


def _under_all_names(tensors: Mapping[str, Any], module: nn.Module) -> dict[str, Any]:
    """A federation keeps a tensor that a module has under several names (tied weights) under the first."""
    first: dict[int, str] = {}
    named = dict(tensors)
    held = module.state_dict(keep_vars=True)
    for name, tensor in held.items():
        original = first.setdefault(id(tensor), name)
        if name not in named and original in named:
            named[name] = named[original]
    return named


def _states(content: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    """What the callbacks' states hold under a key; a callback of someone else's may use the word for another thing."""
    states = [state for state in content.get("callbacks", {}).values() if isinstance(state, Mapping)]
    return [state[key] for state in states if isinstance(state.get(key), Mapping)]


def _read(path: str | Path) -> Mapping[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:  # the last of a file that is cut off
        raise ValueError(
            f"expected a checkpoint that loads with weights_only=True, got {path}: if it is yours and holds other objects, "
            "pass the content that torch.load gives without it"
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"expected a Trainer's checkpoint, got a {type(content).__name__} in {path}")
    return content


def _shapes(state_dict: Mapping[str, Any]) -> dict[str, tuple[int, ...] | None]:
    return {name: tuple(value.shape) if isinstance(value, Tensor) else None for name, value in state_dict.items()}
