"""What a payload by a schema says before its positions and values: flags, and what they say follows.

``docs/payload_format.md`` lists the fields. What is usual takes no byte of its own: flags are a variable-length integer with
the rare ones at the top, and ids that the receiver can work out are named by four bytes, or not at all.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from lightning_fedsparse.bounded_reading import Limits, PayloadError, Reader, varint
from lightning_fedsparse.container import KINDS
from lightning_fedsparse.schema import FINGERPRINT
from lightning_fedsparse.update import Absent, Kind
from lightning_fedsparse.value_coding import INTEGERS, VALUE_TYPES, ValueType

__all__ = ["ID_OF_MASKS", "ID_OF_REFERENCE", "NO_ID", "Front", "read_front", "write_front"]

# what comes first takes the fewest bits; the index in these tuples is the code on the wire: append only
_ABSENT: tuple[Absent, ...] = ("unchanged", "zero", "unheld")
_METRICS = ("train_loss",)  # by 1 and up; 0 is followed by a name
# flags, from the lowest bit; the meaning of absent has two bits after them, the type of values three
_DELTA, _LEANS, _HELD, _TRAVELLING, _BUFFERS, _NOTES = (1 << bit for bit in range(6))
_ABSENT_AT, _VALUES_AT, _FLAG_BITS = 6, 8, 11
# ids that a note needn't spell out
NO_ID, ID_OF_REFERENCE, ID_OF_MASKS, _SPELT_OUT = range(4)


@dataclass
class Front:
    """What a payload says before its positions and values.

    Args:
        kind: Of the update.
        absent: Of the update.
        values: How its values travel.
        num_examples: Of the update.
        schema: Fingerprint of the schema.
        reference: Fingerprint of the mask set that it leans on, if on any.
        held: Whether its masks are those of the reference, so that no positions follow.
        travelling: Fingerprint of the mask set that its masks make up; None if the sender's masks had no id or are held.
        has_buffers: Whether the schema's buffers follow.
        mask_id: Of the update; what is not spelt out is known once the masks are.
        metrics: Of the update.
        block: Values that share a scale, 0 for all; of integers only.
    """

    kind: Kind
    absent: Absent
    values: ValueType
    num_examples: int
    schema: bytes
    reference: bytes | None
    held: bool
    travelling: bytes | None
    has_buffers: bool
    mask_id: int | str = NO_ID
    metrics: dict[str, float] = field(default_factory=dict)
    block: int = 0


def write_front(front: Front) -> bytes:
    """Code a front."""
    has_notes = front.mask_id != NO_ID or bool(front.metrics)
    flags = _ABSENT.index(front.absent) << _ABSENT_AT | VALUE_TYPES.index(front.values) << _VALUES_AT
    for flag, holds in (
        (_DELTA, front.kind == "delta"),
        (_LEANS, front.reference is not None),
        (_HELD, front.held),
        (_TRAVELLING, front.travelling is not None),
        (_BUFFERS, front.has_buffers),
        (_NOTES, has_notes),
    ):
        flags |= flag if holds else 0
    out = bytearray(varint(flags) + varint(front.num_examples) + front.schema)
    out += (front.reference or b"") + (front.travelling or b"")
    if has_notes:
        if isinstance(front.mask_id, str):
            out += varint(_SPELT_OUT + len(front.mask_id.encode())) + front.mask_id.encode()
        else:
            out += varint(front.mask_id)
        out += varint(len(front.metrics))
        for name, value in front.metrics.items():
            known = name in _METRICS
            out += varint(1 + _METRICS.index(name)) if known else b"\0" + varint(len(name.encode())) + name.encode()
            out += struct.pack("<d", value)
    if front.values in INTEGERS:
        out += varint(front.block)
    return bytes(out)


def read_front(reader: Reader, limits: Limits) -> Front:
    """Read what :func:`write_front` wrote; the reader then stands at the positions, or at the values if masks are held."""
    flags = reader.varint("the flags", (1 << _FLAG_BITS) - 1)
    absent, values = flags >> _ABSENT_AT & 3, flags >> _VALUES_AT
    if absent >= len(_ABSENT):
        raise PayloadError(f"the meaning of absent has code {absent}, beyond the last known one, {len(_ABSENT) - 1}")
    if values >= len(VALUE_TYPES):
        raise PayloadError(f"the type of values has code {values}, beyond the last known one, {len(VALUE_TYPES) - 1}")
    if flags & _HELD and (not flags & _LEANS or flags & _TRAVELLING):
        raise PayloadError("the payload has the masks of its reference but names no reference, or other masks as well")
    front = Front(
        kind=KINDS[flags & _DELTA],
        absent=_ABSENT[absent],
        values=VALUE_TYPES[values],
        num_examples=reader.varint("num_examples", limits.max_examples),
        schema=bytes(reader.take(FINGERPRINT, "the schema's fingerprint")),
        reference=bytes(reader.take(FINGERPRINT, "the reference's fingerprint")) if flags & _LEANS else None,
        held=bool(flags & _HELD),
        travelling=bytes(reader.take(FINGERPRINT, "the masks' fingerprint")) if flags & _TRAVELLING else None,
        has_buffers=bool(flags & _BUFFERS),
    )
    if flags & _NOTES:
        _read_notes(reader, front, limits)
    if front.values in INTEGERS:
        front.block = reader.varint("the block", 2**63)
    return front


def _read_notes(reader: Reader, front: Front, limits: Limits) -> None:
    identity = reader.varint("the length of the mask id", limits.max_name_length + _SPELT_OUT)
    front.mask_id = identity
    if identity >= _SPELT_OUT:
        front.mask_id = reader.string("the mask id", identity - _SPELT_OUT)
    elif identity == ID_OF_REFERENCE and front.reference is None:
        raise PayloadError("the mask id is that of a reference but the payload names none")
    for _ in range(reader.varint("the number of metrics", limits.max_tensors)):
        code = reader.varint("the code of a metric's name", len(_METRICS))
        if code:
            name = _METRICS[code - 1]
        else:
            name = reader.string(
                "a metric's name", reader.varint("the length of a metric's name", limits.max_name_length)
            )
        if name in front.metrics:
            raise PayloadError(f"metric {name!r} comes twice")
        (front.metrics[name],) = struct.unpack("<d", reader.take(8, f"metric {name!r}"))
