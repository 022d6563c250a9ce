"""How values travel in a federation, and how fast.

Rounded uploads travel as changes against what the client received, whatever the method: a change is a small part of a
weight, and so is then its rounding error. The server adds its own weights again before a method sees the upload. What is
lost stays on the client where a method remembers it (``CompressionMemory``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from lightning_fedsparse.accounting import ClientTraffic, Traffic
from lightning_fedsparse.bounded_reading import PayloadError
from lightning_fedsparse.payload import decode, encode
from lightning_fedsparse.rounds import UploadRule
from lightning_fedsparse.schema import Schema
from lightning_fedsparse.update import MaskSet, SparseUpdate, gather
from lightning_fedsparse.value_coding import LOSSLESS, VALUE_TYPES, ValueType

if TYPE_CHECKING:
    from lightning_fedsparse.callbacks.base import SparsityCallback

__all__ = ["Link", "Message", "Uncoded", "Wire"]


_Raw: TypeAlias = "tuple[torch.dtype, torch.Size, np.ndarray[Any, Any]]"


@dataclass(frozen=True, eq=False)
class Uncoded:
    """An update on its way that was not encoded.

    Args:
        update: What the other side gets, as it is.
        on_reference: Whether its masks are those that the other side holds, and left out.
    """

    update: SparseUpdate
    on_reference: bool = False

    def __reduce__(self) -> tuple[Callable[..., Uncoded], tuple[Any, ...]]:
        """Pickle the tensors' bytes as arrays, which takes a quarter of the time of torch's own way."""
        update = self.update
        held = [
            {name: None if tensor is None else _raw(tensor) for name, tensor in kind.items()}
            for kind in (update.values, update.masks, update.buffers)
        ]
        set_id = update.masks.id if isinstance(update.masks, MaskSet) else None
        return _uncoded, (replace(update, values={}, masks={}, buffers={}), held, set_id, self.on_reference)


def _uncoded(
    rest: SparseUpdate, held: Sequence[Mapping[str, _Raw | None]], set_id: str | None, on_reference: bool
) -> Uncoded:
    values, masks, buffers = (
        {name: None if raw is None else _tensor(*raw) for name, raw in kind.items()} for kind in held
    )
    whole = masks if set_id is None else MaskSet(set_id, masks)
    return Uncoded(replace(rest, values=values, masks=whole, buffers=buffers), on_reference)  # type: ignore[arg-type]  # no None


def _raw(tensor: Tensor) -> _Raw:
    return tensor.dtype, tensor.shape, tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()


def _tensor(dtype: torch.dtype, shape: torch.Size, elements: np.ndarray[Any, Any]) -> Tensor:
    return torch.from_numpy(elements).view(dtype).view(shape)


Message: TypeAlias = bytes | Uncoded
"""What a wire carries."""


@dataclass(frozen=True)
class Link:
    """What a client is connected by; it turns bytes into seconds and changes nothing else.

    Args:
        up_mbps: Megabits (10^6) per second from the client, above 0.
        down_mbps: The same to the client; what it receives takes no time if only the way up is slow.
        latency_ms: Milliseconds until a message begins to arrive, each way.

    Example:
        >>> Link(up_mbps=1, down_mbps=10, latency_ms=50).seconds(bytes_down=1_250_000, bytes_up=250_000)
        3.1
    """

    up_mbps: float
    down_mbps: float = math.inf
    latency_ms: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (("up_mbps", self.up_mbps), ("down_mbps", self.down_mbps)):
            if not value > 0:
                raise ValueError(f"expected a bandwidth {name} above 0 megabits per second, got {value}")
        if not 0 <= self.latency_ms < math.inf:
            raise ValueError(f"expected latency_ms of at least 0, got {self.latency_ms}")

    def seconds(self, *, bytes_down: int, bytes_up: int) -> float:
        """Time for one message each way."""
        sending = 8e-6 * (bytes_down / self.down_mbps + bytes_up / self.up_mbps)
        return sending + 2e-3 * self.latency_ms


@dataclass(frozen=True)
class Wire:
    """What values become on their way, and the links that they cross.

    Args:
        uploads: ``"float32"`` is lossless; ``"bfloat16"``, ``"float16"``, ``"int8"`` and ``"int4"`` round without bias, with
            seeds of the client's own.
        broadcasts: The same for what clients get; all that get the same masks get the same rounded values.
        block: Values that share a scale under ``"int8"`` and ``"int4"``; None for one scale per tensor.
        link: Of every client that ``links`` does not name; without any there are no transfer times.
        links: Links of single clients, by id.

    Raises:
        ValueError: For an unknown type of values or a block below 1.
    """

    uploads: ValueType = LOSSLESS
    broadcasts: ValueType = LOSSLESS
    block: int | None = 256
    link: Link | None = None
    links: Mapping[str, Link] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in (("uploads", self.uploads), ("broadcasts", self.broadcasts)):
            if value not in VALUE_TYPES:
                raise ValueError(f"expected {name} to be one of {VALUE_TYPES}, got {value!r}")
        if self.block is not None and self.block < 1:
            raise ValueError(f"expected block to be at least 1, got {self.block}")

    def check(self, methods: Iterable[SparsityCallback], client_ids: Sequence[str]) -> None:
        """See that the methods can carry it and that the links are of these clients.

        Raises:
            ValueError: Naming the method and its reason, or the client.
        """
        for method in methods:
            reason = method.refuses_values(uploads=self.uploads, broadcasts=self.broadcasts)
            if reason is not None:
                raise ValueError(
                    f"expected values that {type(method).__name__} can carry, got uploads={self.uploads!r} and "
                    f"broadcasts={self.broadcasts!r}: {reason}"
                )
        if self.links:
            known = set(client_ids)
            for client_id in self.links.keys() - known:
                raise ValueError(f"expected links of clients that there are, got one of {client_id!r}")
            if self.link is None and len(self.links) < len(known):
                missing = next(client_id for client_id in client_ids if client_id not in self.links)
                raise ValueError(f"expected a link for every client, got none for {missing!r}: set link for all others")

    @property
    def rounds_uploads(self) -> bool:
        """Whether uploads lose anything."""
        return self.uploads != LOSSLESS

    def encode_broadcast(
        self, update: SparseUpdate, *, schema: Schema, reference: MaskSet | None, seed: int
    ) -> Message:
        """Code what a client is to receive."""
        return encode(update, schema=schema, reference=reference, values=self.broadcasts, block=self.block, seed=seed)

    def encode_upload(
        self, update: SparseUpdate, broadcast: Mapping[str, Tensor], *, schema: Schema, reference: MaskSet, seed: int
    ) -> tuple[Message, SparseUpdate]:
        """Code an upload.

        Args:
            update: What the client would send.
            broadcast: The weights that it received; read only if uploads are rounded.
            schema: The model's tensors.
            reference: The masks that it received.
            seed: Of the rounding.

        Returns:
            The payload, and what the server will read.
        """
        if not self.rounds_uploads:
            return encode(update, schema=schema, reference=reference), update
        sent = update if update.kind == "delta" else _change(update, broadcast, sign=-1)
        payload = encode(sent, schema=schema, reference=reference, values=self.uploads, block=self.block, seed=seed)
        read = decode(payload, schema=schema, reference=reference, limits=schema.limits)
        return payload, read if update.kind == "delta" else _change(read, broadcast, sign=1)

    def decode(self, message: Message, *, schema: Schema, reference: MaskSet | None) -> SparseUpdate:
        """Read what was coded.

        Raises:
            PayloadError: If it can't be read.
        """
        if not isinstance(message, bytes):
            raise PayloadError(f"expected bytes, got {type(message).__name__}")
        return decode(message, schema=schema, reference=reference, limits=schema.limits)

    def measure(
        self, message: Message, update: SparseUpdate, *, schema: Schema, reference: MaskSet | None, dense: int
    ) -> Traffic:
        """The account of what was coded, given what it holds and the dense model's size in bytes."""
        assert isinstance(message, bytes)
        return Traffic.of(message, update, schema=schema, reference=reference, dense=dense)

    def rule_for(self, rule: UploadRule) -> UploadRule:
        """What an upload is on the wire, where a method's rule says what it means."""
        return replace(rule, kind="delta") if self.rounds_uploads else rule

    def read_upload(self, update: SparseUpdate, weights: Mapping[str, Tensor], rule: UploadRule) -> SparseUpdate:
        """What a decoded and checked upload means, given the server's weights."""
        return update if update.kind == rule.kind else _change(update, weights, sign=1)

    def transfer(self, client_id: str, down: Traffic, up: Traffic | None) -> ClientTraffic:
        """One client's traffic, with the time that it takes on the client's link."""
        link = self.links.get(client_id, self.link)
        seconds = None if link is None else link.seconds(bytes_down=down.total, bytes_up=up.total if up else 0)
        return ClientTraffic(down, up, seconds)


def _change(update: SparseUpdate, weights: Mapping[str, Tensor], *, sign: int) -> SparseUpdate:
    """Weights less others (``sign=-1``), or a change and others (1), where the update has values."""
    others = gather(weights, update.masks)
    values = {name: value + sign * others[name].to(value.device) for name, value in update.values.items()}
    return replace(update, values=values, kind="delta" if sign < 0 else "weights")
