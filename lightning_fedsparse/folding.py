"""From stored weights to a servable model.

A checkpoint of a plain Trainer holds the stored weights and the callbacks' state. Folding applies what the callbacks'
masks say, so that the plain model computes what training computed, without any callback.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from lightning_fedsparse.effective import EffectiveWeights
from lightning_fedsparse.masks import unpack_mask

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
    """Load a Trainer's checkpoint into a plain module, with effective weights.

    Args:
        checkpoint: Path of a checkpoint, or its content.
        module: Module of the same parameters; written in place.

    Returns:
        The same module.

    Raises:
        ValueError: If the file holds no ``state_dict``, or its names and shapes are not the module's.
    """
    if isinstance(checkpoint, Mapping):
        content, where = checkpoint, "the checkpoint"
    else:
        content, where = torch.load(checkpoint, map_location="cpu", weights_only=True), str(checkpoint)
    if "state_dict" not in content:
        raise ValueError(f"expected a Trainer's checkpoint with a 'state_dict', found {sorted(content)} in {where}")
    try:
        module.load_state_dict(content["state_dict"], strict=True)
    except RuntimeError as error:
        raise ValueError(
            f"expected a checkpoint of {type(module).__name__}, got another in {where}: {error}"
        ) from error
    parameters = dict(module.named_parameters())
    for state in content.get("callbacks", {}).values():
        for name, mask in (state.get("masks") or {}).items():
            parameters[name].mul_(unpack_mask(mask["bits"], mask["shape"]).to(parameters[name].device))
    return module
