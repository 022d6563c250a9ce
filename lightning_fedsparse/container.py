"""A payload that describes its tensors itself: what each of them is and how long its sections are, within declared limits.

``header lengths | header (raw deflate) | sections`` in the frame, all integers little-endian. The header is a sequence of
bytes, LEB128 variable-length integers and UTF-8 strings; ``docs/payload_format.md`` lists its fields. Reading it checks
every declared size against :class:`Limits` before anything of that size is allocated.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TypeVar, get_args

import torch

from lightning_fedsparse.bounded_reading import Limits, PayloadError, Reader, deflate, inflate, varint
from lightning_fedsparse.frame import SELF_DESCRIBING, Section, write_frame
from lightning_fedsparse.update import Absent, Kind

__all__ = [
    "DTYPES",
    "LEANING",
    "MAX_NUMEL",
    "Header",
    "PositionCoding",
    "Record",
    "ValueCoding",
    "read_container",
    "write_container",
]

T = TypeVar("T")
KINDS: tuple[Kind, ...] = get_args(Kind)
ABSENT: tuple[Absent, ...] = get_args(Absent)
# the index in this tuple is the code on the wire: append only
DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)
_LENGTHS = struct.Struct("<II")
_MAX_DIMS = 32
MAX_NUMEL = 2**31 - 1  # of one tensor: position arithmetic stays far inside int64


class PositionCoding(IntEnum):
    """How the kept positions of one tensor travel."""

    DENSE = 0
    KNOWN = 1
    CHANGES = 2
    GAPS = 3
    PACKED_BITMAP = 4
    BITMAP = 5


LEANING = (PositionCoding.KNOWN, PositionCoding.CHANGES)


class ValueCoding(IntEnum):
    """How the values of one tensor travel."""

    RAW = 0
    PLANES = 1
    BFLOAT16 = 2
    FLOAT16 = 3
    INT8 = 4
    INT4 = 5


@dataclass
class Record:
    """What the header says about one tensor.

    A record with ``PositionCoding.KNOWN`` has neither shape nor count: the receiver's own mask has them.
    """

    name: str
    dtype: torch.dtype
    positions: PositionCoding
    values: ValueCoding
    shape: tuple[int, ...]
    count: int
    position_bytes: int
    value_bytes: int


@dataclass
class Header:
    """Everything in a payload but the sections.

    Args:
        kind: Of the update.
        absent: Of the update.
        num_examples: Of the update.
        mask_id: Of the update.
        travelling_id: Id of the mask set that the records make up, for the receiver to check; None if the sender's
            masks had no id, or if they are the reference.
        reference_id: Id of the mask set that the records lean on, if any does.
        named: Whether the parameters' names are written; else they are the reference's, in its order.
        metrics: Of the update.
        parameters: In the order of the masks.
        buffers: Dense tensors.
    """

    kind: Kind
    absent: Absent
    num_examples: int
    mask_id: str | None
    travelling_id: str | None
    reference_id: str | None
    named: bool
    metrics: dict[str, float] = field(default_factory=dict)
    parameters: list[Record] = field(default_factory=list)
    buffers: list[Record] = field(default_factory=list)


def write_container(header: Header, sections: list[Section]) -> bytes:
    """Frame a header and its sections, in the order of the records: positions, then values, of each tensor."""
    plain = _write_header(header)
    packed = deflate(plain, match=True)
    return write_frame(SELF_DESCRIBING, [_LENGTHS.pack(len(packed), len(plain)), packed, *sections])


def read_container(reader: Reader, limits: Limits) -> Header:
    """Read the header; the reader then stands at the first section.

    Raises:
        PayloadError: For whatever is wrong with the header or with a declared size.
    """
    packed_size, header_size = _LENGTHS.unpack(reader.take(_LENGTHS.size, "the lengths of the header"))
    if header_size > limits.max_header_bytes:
        raise PayloadError(f"the header declares {header_size} bytes, more than the limit of {limits.max_header_bytes}")
    plain = inflate(reader.take(packed_size, "the header"), header_size, "the header")
    if len(plain) != header_size:
        raise PayloadError(f"the header expands to {len(plain)} bytes but declares {header_size}")
    header = _read_header(Reader(memoryview(plain)), limits)
    expected = sum(record.position_bytes + record.value_bytes for record in header.parameters + header.buffers)
    if expected != reader.left:
        raise PayloadError(f"the sections have {reader.left} bytes but the header declares {expected}")
    return header


def _write_header(header: Header) -> bytes:
    out = bytearray([KINDS.index(header.kind), ABSENT.index(header.absent)])
    out += varint(header.num_examples)
    for identity in (header.mask_id, header.travelling_id, header.reference_id):
        # one more than the length: 0 says that there is no id
        out += b"\0" if identity is None else varint(len(identity.encode()) + 1) + identity.encode()
    out.append(header.named)
    out += varint(len(header.metrics))
    for name, value in header.metrics.items():
        out += varint(len(name.encode())) + name.encode() + struct.pack("<d", value)
    for records, named in ((header.parameters, header.named), (header.buffers, True)):
        out += varint(len(records))
        for record in records:
            if named:
                out += varint(len(record.name.encode())) + record.name.encode()
            out += bytes([DTYPES.index(record.dtype), record.positions, record.values])
            if record.positions != PositionCoding.KNOWN:
                out += b"".join(map(varint, (len(record.shape), *record.shape)))
            if record.positions not in (PositionCoding.KNOWN, PositionCoding.DENSE):
                out += varint(record.count) + varint(record.position_bytes)
            out += varint(record.value_bytes)
    return bytes(out)


def _read_header(reader: Reader, limits: Limits) -> Header:
    kind = _choice(reader.byte("the kind"), KINDS, "the kind")
    absent = _choice(reader.byte("the meaning of absent"), ABSENT, "the meaning of absent")
    num_examples = reader.varint("num_examples", limits.max_examples)
    mask_id = _read_id(reader, "the mask id", limits)
    travelling_id = _read_id(reader, "the travelling mask id", limits)
    reference_id = _read_id(reader, "the reference id", limits)
    named = _choice(reader.byte("the names flag"), (False, True), "the names flag")
    if not named and reference_id is None:
        raise PayloadError("the parameters have no names and the payload names no reference to take them from")
    header = Header(kind, absent, num_examples, mask_id, travelling_id, reference_id, named)
    for _ in range(reader.varint("the number of metrics", limits.max_tensors)):
        name = _read_name(reader, "a metric's name", limits)
        if name in header.metrics:
            raise PayloadError(f"metric {name!r} comes twice")
        (header.metrics[name],) = struct.unpack("<d", reader.take(8, f"metric {name!r}"))
    elements = 0
    names: set[str] = set()
    for records, what in ((header.parameters, "parameter"), (header.buffers, "buffer")):
        largest = limits.max_tensors - len(header.parameters)
        for index in range(reader.varint(f"the number of {what}s", largest)):
            name = f"parameter {index}"
            if named or what == "buffer":
                name = _read_name(reader, f"a {what}'s name", limits)
                if name in names:
                    raise PayloadError(f"tensor {name!r} comes twice")
                names.add(name)
            record = _read_record(reader, name, limits)
            if what == "buffer" and record.positions != PositionCoding.DENSE:
                raise PayloadError(f"buffer {name!r} has positions coded as {record.positions.name}, not DENSE")
            if record.positions in LEANING and header.reference_id is None:
                raise PayloadError(f"tensor {name!r} leans on a mask but the payload names no reference")
            elements += math.prod(record.shape) if record.positions != PositionCoding.KNOWN else 0
            if elements > limits.max_elements:
                raise PayloadError(f"{name!r} brings the payload to {elements} elements of {limits.max_elements}")
            records.append(record)
    if reader.left:
        raise PayloadError(f"the header has {reader.left} bytes after its last field")
    return header


def _read_record(reader: Reader, name: str, limits: Limits) -> Record:
    dtype = _choice(reader.byte(f"the dtype of {name!r}"), DTYPES, f"the dtype of {name!r}")
    what = f"the position coding of {name!r}"
    positions = _choice(reader.byte(what), tuple(PositionCoding), what)
    what = f"the value coding of {name!r}"
    values = _choice(reader.byte(what), tuple(ValueCoding), what)
    shape: tuple[int, ...] = ()
    count = position_bytes = 0
    if positions != PositionCoding.KNOWN:
        largest = min(limits.max_elements, MAX_NUMEL)
        dims = reader.varint(f"the number of dimensions of {name!r}", _MAX_DIMS)
        shape = tuple(reader.varint(f"a dimension of {name!r}", largest) for _ in range(dims))
        # a zero must not hide what the other dimensions would make of the strides
        if math.prod(max(size, 1) for size in shape) > largest:
            raise PayloadError(f"{name!r} declares shape {shape}, more than {largest} elements")
        count = math.prod(shape)
    if positions not in (PositionCoding.KNOWN, PositionCoding.DENSE):
        count = reader.varint(f"the count of {name!r}", at_most=count)
        position_bytes = reader.varint(f"the position bytes of {name!r}", limits.max_bytes)
    value_bytes = reader.varint(f"the value bytes of {name!r}", limits.max_bytes)
    return Record(name, dtype, positions, values, shape, count, position_bytes, value_bytes)


def _choice(code: int, choices: Sequence[T], what: str) -> T:
    if code >= len(choices):
        raise PayloadError(f"{what} has code {code}, beyond the last known one, {len(choices) - 1}")
    return choices[code]


def _read_name(reader: Reader, what: str, limits: Limits) -> str:
    return reader.string(what, reader.varint(f"the length of {what}", limits.max_name_length))


def _read_id(reader: Reader, what: str, limits: Limits) -> str | None:
    length = reader.varint(f"the length of {what}", limits.max_name_length + 1)
    return reader.string(what, length - 1) if length else None
