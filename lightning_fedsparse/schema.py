"""What both ends know about a model's tensors, so that a payload needn't say it.

Server and clients build the same module. The names, shapes and dtypes of its parameters and buffers, in its order, are its
schema; a payload that names the schema by four bytes carries nothing of it. That many suffice to tell models apart that were
mixed up by accident, as the checksum's four bytes find damage by accident; against malice neither is meant.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lightning_fedsparse.bounded_reading import Limits, varint
from lightning_fedsparse.container import DTYPES, MAX_NUMEL
from lightning_fedsparse.update import SparseUpdate

__all__ = ["FINGERPRINT", "Schema", "TensorSpec", "fingerprint"]

FINGERPRINT = 4  # bytes


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a model."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Schema:
    """A model's tensors in their order.

    Args:
        parameters: Those that masks and updates are made of.
        buffers: Those that travel whole, or not at all.

    Example:
        >>> schema = Schema.of({"weight": torch.zeros(2, 3)}, {"mean": torch.zeros(3)})
        >>> schema.parameters[0].shape, schema.fingerprint.hex()
        ((2, 3), '506caedf')
    """

    parameters: tuple[TensorSpec, ...]
    buffers: tuple[TensorSpec, ...] = ()

    @classmethod
    def of(cls, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> Schema:
        """The schema of a model's parameters and persistent buffers.

        Raises:
            ValueError: For a tensor that payloads can't carry, for its dtype or its size, or a name that comes twice.
        """
        if both := parameters.keys() & buffers.keys():
            raise ValueError(f"expected parameters and buffers of different names, got {min(both)!r} among both")
        for name, tensor in {**parameters, **buffers}.items():
            if tensor.dtype not in DTYPES:
                raise ValueError(f"expected {name!r} to have a dtype that a payload can carry, got {tensor.dtype}")
            if tensor.numel() > MAX_NUMEL:
                raise ValueError(f"expected {name!r} to have at most {MAX_NUMEL} elements, got {tensor.numel()}")
        specs = (
            tuple(TensorSpec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items())
            for tensors in (parameters, buffers)
        )
        return cls(*specs)

    @cached_property
    def fingerprint(self) -> bytes:
        """What a payload names it by: BLAKE2b of 4 bytes over counts, names, dtypes and shapes, in order."""
        described = bytearray()
        for specs in (self.parameters, self.buffers):
            described += varint(len(specs))
            for spec in specs:
                name = spec.name.encode()
                described += varint(len(name)) + name + bytes([DTYPES.index(spec.dtype)])
                described += b"".join(map(varint, (len(spec.shape), *spec.shape)))
        return hashlib.blake2b(described, digest_size=FINGERPRINT).digest()

    @cached_property
    def limits(self) -> Limits:
        """What a receiver of this model's updates is ready to hold, however large the model is."""
        specs = (*self.parameters, *self.buffers)
        return Limits.for_tensors(
            {spec.name: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for spec in specs}
        )

    def require(self, update: SparseUpdate) -> None:
        """See that an update has exactly these parameters, in this order, and these buffers or none.

        Raises:
            ValueError: Naming what differs first.
        """
        found = [
            TensorSpec(
                name, tuple(update.values[name].shape if mask is None else mask.shape), update.values[name].dtype
            )
            for name, mask in update.masks.items()
        ]
        _require_same("parameters", self.parameters, found)
        if update.buffers:
            buffers = [TensorSpec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in update.buffers.items()]
            _require_same("buffers", self.buffers, buffers)


def fingerprint(mask_set_id: str) -> bytes:
    """What a payload names a mask set by, where the receiver can tell whether it is the one that it holds."""
    return hashlib.blake2b(mask_set_id.encode(), digest_size=FINGERPRINT).digest()


def _require_same(what: str, expected: tuple[TensorSpec, ...], found: list[TensorSpec]) -> None:
    if len(found) != len(expected):
        raise ValueError(f"expected the {len(expected)} {what} of the schema, got {len(found)}")
    for theirs, ours in zip(found, expected, strict=True):
        if theirs != ours:
            raise ValueError(
                f"expected the {what} of the schema in its order, {ours.name!r} of shape {ours.shape} and {ours.dtype}, "
                f"got {theirs.name!r} of shape {theirs.shape} and {theirs.dtype}"
            )
