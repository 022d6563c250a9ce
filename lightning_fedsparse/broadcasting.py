"""The way down: which masks each client holds, and the fewest bytes that bring it up to date.

The server keeps the last few mask versions and one id per client. A client that holds the masks in force gets values
only; one that holds an older version that the server still has gets positions coded against it; any other gets full
positions. Clients in the same situation get the same bytes, encoded once.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from lightning_fedsparse.client import KEPT_MASK_VERSIONS
from lightning_fedsparse.masks import pack_mask, unpack_mask
from lightning_fedsparse.payload import encode
from lightning_fedsparse.server import ServerState
from lightning_fedsparse.update import MaskSet, SparseUpdate

__all__ = ["Broadcaster", "pack_masks", "unpack_masks"]


class Broadcaster:
    """Encodes a round's broadcast for each client."""

    def __init__(self) -> None:
        self._versions: OrderedDict[str, MaskSet] = OrderedDict()
        self._held: dict[str, str] = {}
        self._update: SparseUpdate | None = None
        self._encoded: dict[str | None, bytes] = {}

    @property
    def versions(self) -> list[MaskSet]:
        """Mask versions that clients may hold, oldest first."""
        return list(self._versions.values())

    def start(self, state: ServerState) -> None:
        """Take the state that this round's clients start from."""
        self._update = state.broadcast()
        self._encoded.clear()
        self._versions[state.masks.id] = state.masks
        self._versions.move_to_end(state.masks.id)
        while len(self._versions) > KEPT_MASK_VERSIONS:
            self._versions.popitem(last=False)

    def send(self, client_id: str) -> tuple[bytes, str | None]:
        """Bytes for one client, and the id of the masks they lean on, if on any; the client then holds this round's."""
        assert self._update is not None, "start() comes first"
        masks = self._update.masks
        assert isinstance(masks, MaskSet)
        held = self._held.get(client_id)
        reference = self._versions.get(held) if held is not None and not masks.is_dense else None
        key = None if reference is None else reference.id
        if key not in self._encoded:
            self._encoded[key] = encode(self._update, reference=reference)
        self._held[client_id] = masks.id
        return self._encoded[key], key

    def state_dict(self) -> dict[str, Any]:
        """Versions and who holds which, as tensors and primitives."""
        return {"versions": [pack_masks(masks) for masks in self.versions], "held": dict(self._held)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back a saved state."""
        versions = [unpack_masks(packed) for packed in state["versions"]]
        self._versions = OrderedDict((masks.id, masks) for masks in versions)
        self._held = dict(state["held"])


def pack_masks(masks: MaskSet) -> dict[str, Any]:
    """A mask set as tensors and primitives, one bit per position."""
    packed = {
        name: None if mask is None else {"bits": pack_mask(mask), "shape": list(mask.shape)}
        for name, mask in masks.items()
    }
    return {"id": masks.id, "masks": packed}


def unpack_masks(packed: dict[str, Any]) -> MaskSet:
    """The mask set that :func:`pack_masks` packed."""
    masks = {
        name: None if entry is None else unpack_mask(entry["bits"], entry["shape"])
        for name, entry in packed["masks"].items()
    }
    return MaskSet(packed["id"], masks)
