"""A wire that encodes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor
from typing_extensions import override

from lightning_fedsparse.accounting import Traffic
from lightning_fedsparse.bounded_reading import PayloadError
from lightning_fedsparse.float_bits import check_values
from lightning_fedsparse.schema import Schema
from lightning_fedsparse.update import MaskSet, SparseUpdate
from lightning_fedsparse.value_coding import LOSSLESS
from lightning_fedsparse.wire import Message, Uncoded, Wire

__all__ = ["CountingWire"]


@dataclass(frozen=True)
class CountingWire(Wire):
    """Hands updates over as they are, without loss, and counts the fewest bytes that their masks and raw values can take.

    For runs in which only the result and the time matter: coding a dense model can take as long as a small client's
    training. The record's ``codings`` say ``"counted"``, and its bytes have no header and no coded values: those of real
    payloads are within a few per cent (see :class:`~lightning_fedsparse.accounting.Traffic`).

    Raises:
        ValueError: If values are to be rounded.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.uploads, self.broadcasts) != (LOSSLESS, LOSSLESS):
            raise ValueError(
                f"expected a wire that only counts to lose nothing, got uploads={self.uploads!r} and "
                f"broadcasts={self.broadcasts!r}: rounding is part of encoding, which Wire does"
            )

    @override
    def encode_broadcast(
        self, update: SparseUpdate, *, schema: Schema, reference: MaskSet | None, seed: int
    ) -> Message:
        return Uncoded(update)

    @override
    def encode_upload(
        self, update: SparseUpdate, broadcast: Mapping[str, Tensor], *, schema: Schema, reference: MaskSet, seed: int
    ) -> tuple[Message, SparseUpdate]:
        if isinstance(update.masks, MaskSet) and update.masks.id == reference.id:
            return Uncoded(replace(update, masks={}), on_reference=True), update
        return Uncoded(update), update

    @override
    def decode(self, message: Message, *, schema: Schema, reference: MaskSet | None) -> SparseUpdate:
        if not isinstance(message, Uncoded):
            raise PayloadError(f"expected an update that was not encoded, got {type(message).__name__}")
        update = message.update
        if message.on_reference:
            if reference is None:
                raise PayloadError("expected the masks that an update leans on, got none")
            update = replace(update, masks=reference)
        for tensors, infinities in ((update.values, False), (update.buffers, True)):
            for name, tensor in tensors.items():
                check_values(tensor, repr(name), infinities=infinities)
        return update

    @override
    def measure(
        self, message: Message, update: SparseUpdate, *, schema: Schema, reference: MaskSet | None, dense: int
    ) -> Traffic:
        return Traffic.counted(update, reference=reference, dense=dense)
