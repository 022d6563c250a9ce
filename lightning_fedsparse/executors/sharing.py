"""A broadcast in shared memory: written once, read by every process of the machine without a copy.

All tensors of one dtype lie in one block, so that a model of a thousand tensors takes a few handles of the system and not a
thousand.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from lightning_fedsparse.update import MaskSet, SparseUpdate

__all__ = ["SharedUpdate", "in_shared_memory"]

_Place = tuple[torch.dtype, int, tuple[int, ...]]


@dataclass(frozen=True)
class SharedUpdate:
    """An update whose tensors are elsewhere; cheap to send to another process by ``torch.multiprocessing``.

    Args:
        blocks: One flat tensor in shared memory per dtype.
        places: For each tensor of the update its dtype, offset in that block and shape, by kind (values, masks or buffers)
            and name.
        rest: The update without tensors.
        mask_set_id: Id of its masks.
    """

    blocks: dict[torch.dtype, Tensor]
    places: dict[tuple[str, str], _Place]
    rest: SparseUpdate
    mask_set_id: str

    @classmethod
    def of(cls, update: SparseUpdate) -> SharedUpdate:
        """Copy an update into shared memory; its masks must be a ``MaskSet``."""
        assert isinstance(update.masks, MaskSet)
        tensors = {
            (kind, name): tensor
            for kind, held in (("values", update.values), ("masks", update.masks), ("buffers", update.buffers))
            for name, tensor in held.items()
            if tensor is not None
        }
        places: dict[tuple[str, str], _Place] = {}
        sizes: dict[torch.dtype, int] = {}
        for key, tensor in tensors.items():
            start = sizes.get(tensor.dtype, 0)
            places[key] = tensor.dtype, start, tuple(tensor.shape)
            sizes[tensor.dtype] = start + tensor.numel()
        blocks = {dtype: in_shared_memory(torch.empty(size, dtype=dtype)) for dtype, size in sizes.items()}
        for key, tensor in tensors.items():
            _view(blocks, places[key]).copy_(tensor)
        rest = replace(update, values={}, masks=dict.fromkeys(update.masks), buffers={})
        return cls(blocks, places, rest, update.masks.id)

    def open(self) -> SparseUpdate:
        """The update, its tensors in the shared blocks: to be read and not to be written."""
        held: dict[str, dict[str, Tensor]] = {"values": {}, "masks": {}, "buffers": {}}
        for (kind, name), place in self.places.items():
            held[kind][name] = _view(self.blocks, place)
        masks = MaskSet(self.mask_set_id, {name: held["masks"].get(name) for name in self.rest.masks})
        return replace(self.rest, values=held["values"], masks=masks, buffers=held["buffers"])


def in_shared_memory(tensor: Tensor) -> Tensor:
    """The tensor, moved to where other processes can read it."""
    tensor.share_memory_()  # type: ignore[no-untyped-call]
    return tensor


def _view(blocks: dict[torch.dtype, Tensor], place: _Place) -> Tensor:
    dtype, start, shape = place
    return blocks[dtype].narrow(0, start, prod(shape)).view(shape)
