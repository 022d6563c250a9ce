"""The way down: which masks each client holds, and the fewest bytes that bring it up to date.

The server keeps the last few mask versions, for as many kinds of clients as there are capacities in a cohort, and one id
per client. A client that holds the masks in force gets values only; one that holds an older version that the server
still has gets positions coded against it; any other gets full positions. Clients in the same situation get the same
bytes, encoded once.

What a client was sent it holds as soon as it is sent; where nothing readable comes back nobody knows whether it arrived, and
:meth:`Broadcaster.forget` makes the client one that holds nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_fedsparse.accounting import Traffic, size_in_bytes
from lightning_fedsparse.callbacks.base import SparsityCallback
from lightning_fedsparse.client import KEPT_MASK_VERSIONS
from lightning_fedsparse.clients import Client
from lightning_fedsparse.masks import pack_mask, unpack_mask
from lightning_fedsparse.server import ServerState
from lightning_fedsparse.update import MaskSet, SparseUpdate
from lightning_fedsparse.wire import Message, Wire

__all__ = ["Broadcast", "Broadcaster", "pack_masks", "unpack_masks"]


@dataclass(frozen=True)
class Broadcast:
    """What one client is sent.

    Args:
        payload: What the wire carries.
        reference_id: Id of the masks they lean on, if on any.
        traffic: Their account.
    """

    payload: Message
    reference_id: str | None
    traffic: Traffic


class Broadcaster:
    """Encodes a round's broadcast for each client.

    Args:
        wire: How values travel; without loss if None.
    """

    def __init__(self, wire: Wire | None = None) -> None:
        self._wire = wire or Wire()
        self._seed = 0
        self._versions: OrderedDict[str, MaskSet] = OrderedDict()
        self._held: dict[str, str] = {}
        self._sent: dict[str, MaskSet] = {}
        self._state: ServerState | None = None
        self._whole: SparseUpdate | None = None
        self._methods: Sequence[SparsityCallback] = ()
        # beside the bytes the update itself, which keeps its id from being given to another object
        self._encoded: dict[tuple[int, str | None], tuple[SparseUpdate, Broadcast]] = {}
        self.kept_versions = KEPT_MASK_VERSIONS

    @property
    def versions(self) -> list[MaskSet]:
        """Mask versions that clients may hold, oldest first."""
        return list(self._versions.values())

    def start(
        self, state: ServerState, clients: Sequence[Client], methods: Sequence[SparsityCallback], seed: int = 0
    ) -> None:
        """Take the state that this round's clients start from, and the methods that say what each of them gets.

        Args:
            state: The server's.
            clients: The cohort.
            methods: In the order in which they see the broadcast.
            seed: Of this round's rounding.
        """
        self._state = state
        self._seed = seed
        self._methods = methods
        self._whole = state.broadcast()
        self.kept_versions = KEPT_MASK_VERSIONS * len({client.capacity for client in clients})
        self._sent.clear()
        self._encoded.clear()

    def send(self, client: Client) -> Broadcast:
        """What brings one client up to date; the client then holds the masks of it."""
        update = self._update_for(client)
        masks = update.masks
        assert isinstance(masks, MaskSet), "a broadcast's masks have an id"
        held = self._held.get(client.id)
        reference = self._versions.get(held) if held is not None and not masks.is_dense else None
        reference_id = None if reference is None else reference.id
        key = id(update), reference_id
        if key not in self._encoded:
            self._encoded[key] = update, self._encode(update, reference)
        self._sent[client.id] = masks
        self._held[client.id] = masks.id
        self._versions[masks.id] = masks
        self._versions.move_to_end(masks.id)
        while len(self._versions) > self.kept_versions:
            self._versions.popitem(last=False)
        return self._encoded[key][1]

    def forget(self, client_id: str) -> None:
        """Take it that nothing is known of a client any more: it gets full positions next time."""
        self._held.pop(client_id, None)

    def support(self, client_id: str) -> MaskSet:
        """The masks that a client of this round was sent."""
        return self._sent[client_id]

    def state_dict(self) -> dict[str, Any]:
        """Versions and who holds which, as tensors and primitives."""
        return {"versions": [pack_masks(masks) for masks in self.versions], "held": dict(self._held)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back a saved state."""
        versions = [unpack_masks(packed) for packed in state["versions"]]
        self._versions = OrderedDict((masks.id, masks) for masks in versions)
        self._held = dict(state["held"])

    def _encode(self, update: SparseUpdate, reference: MaskSet | None) -> Broadcast:
        assert self._state is not None
        schema = self._state.schema
        payload = self._wire.encode_broadcast(update, schema=schema, reference=reference, seed=self._seed)
        dense = size_in_bytes(self._state.tensors)
        traffic = self._wire.measure(payload, update, schema=schema, reference=reference, dense=dense)
        return Broadcast(payload, None if reference is None else reference.id, traffic)

    def _update_for(self, client: Client) -> SparseUpdate:
        assert self._state is not None, "start() comes first"
        assert self._whole is not None
        update = self._whole
        for method in self._methods:
            update = method.client_broadcast(self._state, client, update)
        return update


def pack_masks(masks: MaskSet) -> dict[str, Any]:
    """A mask set as tensors and primitives, one bit per position."""
    packed = {name: None if mask is None else pack_mask(mask) for name, mask in masks.items()}
    return {"id": masks.id, "masks": packed}


def unpack_masks(packed: dict[str, Any]) -> MaskSet:
    """The mask set that :func:`pack_masks` packed."""
    masks = {name: None if entry is None else unpack_mask(entry) for name, entry in packed["masks"].items()}
    return MaskSet(packed["id"], masks)
