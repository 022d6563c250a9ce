"""What a server checks about a decoded upload before it may touch the model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_fedsparse.bounded_reading import PayloadError
from lightning_fedsparse.rounds import UploadRule
from lightning_fedsparse.update import MaskSet, SparseUpdate

__all__ = ["check_update"]


_WEIGHTS_ON_THE_SUPPORT = UploadRule()


def check_update(
    update: SparseUpdate,
    parameters: Mapping[str, Tensor],
    *,
    buffers: Mapping[str, Tensor],
    support: MaskSet | None,
    rule: UploadRule = _WEIGHTS_ON_THE_SUPPORT,
) -> None:
    """Hold a decoded upload against the server's model.

    Args:
        update: As decoded.
        parameters: The model's, by name; the update must have exactly these names, shapes and dtypes.
        buffers: The model's, by name; the update must have exactly these or none at all. A value that is not finite
            passes only where the model has the same.
        support: Where values are expected; None lets them be anywhere.
        rule: What the round's uploads may be.

    Raises:
        PayloadError: Naming the tensor, what was expected and what came.
    """
    if (update.kind, update.absent) != (rule.kind, rule.absent):
        raise PayloadError(
            f"expected {rule.kind!r} with what is absent {rule.absent!r}, got {update.kind!r} with {update.absent!r}"
        )
    if update.num_examples < 1:
        raise PayloadError(f"expected at least 1 example behind the update, got {update.num_examples}")
    _check_names("parameters", parameters, update.values)
    if update.buffers:
        _check_names("buffers", buffers, update.buffers)
    extra = 0
    for name, parameter in parameters.items():
        mask = update.masks[name]
        shape = update.values[name].shape if mask is None else mask.shape
        _check_tensor("parameter", name, parameter, shape, update.values[name].dtype)
        extra += 0 if support is None or support is update.masks else _outside(update, name, support)
        if extra > rule.extra_values:
            raise PayloadError(
                f"{name!r} brings the values outside the support to {extra}, {rule.extra_values} are allowed"
            )
    for name, buffer in update.buffers.items():
        _check_tensor("buffer", name, buffers[name], buffer.shape, buffer.dtype)
        infinite = buffer.isinf()
        if not torch.equal(buffer[infinite], buffers[name].cpu()[infinite]):
            raise PayloadError(f"buffer {name!r} is infinite where the model's is not")


def _check_names(what: str, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or unknown:
        raise PayloadError(f"expected the {what} of the model, got none for {missing} and unknown ones {unknown}")


def _check_tensor(what: str, name: str, expected: Tensor, shape: torch.Size, dtype: torch.dtype) -> None:
    if shape != expected.shape:
        raise PayloadError(f"expected {what} {name!r} of shape {tuple(expected.shape)}, got {tuple(shape)}")
    if dtype != expected.dtype:
        raise PayloadError(f"expected {what} {name!r} of dtype {expected.dtype}, got {dtype}")


def _outside(update: SparseUpdate, name: str, support: MaskSet) -> int:
    """How many values of one tensor lie off the support."""
    allowed = support[name]
    if allowed is None or allowed is update.masks[name]:
        return 0
    if update.masks[name] is None:
        return allowed.numel() - support.positions(name).numel()
    positions = update.positions(name)
    return positions.numel() - int(allowed.reshape(-1).cpu()[positions.cpu()].count_nonzero())
