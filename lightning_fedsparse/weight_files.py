"""Weights in a safetensors file, dense or sparse, for programs that know nothing of this package.

A dense file has each tensor of a state dict under its name. In a sparse one a tensor that gets smaller by it is two::

    NAME:mask      uint8, one bit per entry of the tensor in row-major order, the first in the highest bit of byte 0
    NAME:values    the entries whose bit is 1, in that order, in the tensor's own dtype

and the file's metadata has ``"format": "lightning-fedsparse sparse 1"`` and under ``"shapes"`` the shapes of these tensors as
JSON. A mask is smaller than any list of positions unless fewer than one in 32 entries is kept. In NumPy, and no more::

    dense = np.zeros(shape, values.dtype)
    dense[np.unpackbits(mask, count=dense.size).reshape(shape).astype(bool)] = values
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lightning_fedsparse.masks import pack_mask, unpack_mask

__all__ = ["encode_weights", "read_weights"]

_SPARSE = "lightning-fedsparse sparse 1"


def encode_weights(tensors: Mapping[str, Tensor], *, sparse: bool = False) -> bytes:
    """Tensors as the content of a safetensors file.

    Args:
        tensors: By name, on any device; tensors that share memory are written once each.
        sparse: Whether to write mask and values of those that are smaller so.
    """
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    if not sparse:
        return save(plain, {"format": "pt"})
    written: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for name, tensor in plain.items():
        kept = tensor != 0
        values = tensor[kept]
        if values.nbytes + math.ceil(tensor.numel() / 8) < tensor.nbytes:
            written[f"{name}:mask"] = pack_mask(kept)["bits"]
            written[f"{name}:values"] = values
            shapes[name] = list(tensor.shape)
        else:
            written[name] = tensor
    return save(written, {"format": _SPARSE, "shapes": json.dumps(shapes)})


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a file that ``fedsparse export`` wrote in safetensors, sparse or not.

    Returns:
        Dense tensors by name, on the CPU: ``module.load_state_dict(read_weights(path))``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no safetensors file, or a sparse one whose parts do not fit together.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
    except SafetensorError as error:
        raise ValueError(f"expected a safetensors file, got something else in {path}: {error}") from error
    if metadata.get("format") != _SPARSE:
        return tensors
    try:
        for name, shape in json.loads(metadata["shapes"]).items():
            mask = unpack_mask({"bits": tensors.pop(f"{name}:mask"), "shape": shape})
            values = tensors.pop(f"{name}:values")
            tensors[name] = torch.zeros(shape, dtype=values.dtype).masked_scatter_(mask, _all_of(mask, values))
    # the last two come from shapes that are no lists of integers by name
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"expected the masks and values of a sparse file, got others in {path}: {error}") from error
    return tensors


def _all_of(mask: Tensor, values: Tensor) -> Tensor:
    if values.shape != (int(mask.count_nonzero()),):
        raise ValueError(f"expected {int(mask.count_nonzero())} values for a mask, got shape {tuple(values.shape)}")
    return values
