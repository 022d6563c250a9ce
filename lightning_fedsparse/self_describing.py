"""An update <-> the content of a payload that describes its tensors itself.

Whoever has the format can read it, with nothing of the model. What its header says about every tensor is
:mod:`lightning_fedsparse.container`'s; here is what the sections hold.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from lightning_fedsparse.bounded_reading import Limits, PayloadError, Reader
from lightning_fedsparse.container import (
    DTYPES,
    LEANING,
    Header,
    PositionCoding,
    Record,
    ValueCoding,
    read_container,
    write_container,
)
from lightning_fedsparse.frame import Section
from lightning_fedsparse.positions import decode_positions, encode_mask
from lightning_fedsparse.update import MaskSet, SparseUpdate
from lightning_fedsparse.value_coding import (
    ValueType,
    decode_values,
    encode_rounded_values,
    encode_values,
)

__all__ = ["described_sizes", "read_described", "write_described"]


def write_described(
    update: SparseUpdate,
    masks: MaskSet,
    *,
    reference: MaskSet | None,
    values: ValueType,
    block: int | None,
    generator: torch.Generator | None,
) -> bytes:
    """Code an update that has been looked over; ``masks`` are its masks, and ``generator`` is there if values are rounded."""

    def code_values(value: Tensor) -> tuple[ValueCoding, Section]:
        if generator is None:
            return encode_values(value)
        return encode_rounded_values(value, values, block=block, generator=generator)

    held = reference is not None and masks is update.masks and masks.id == reference.id
    records: list[Record] = []
    sections: list[Section] = []
    for name in masks:
        record, parts = _encode_tensor(name, update.values[name], masks, reference, code_values, held=held)
        records.append(record)
        sections += parts
    leans = any(record.positions in LEANING for record in records)
    wholly = reference is not None and _is_reference(records, reference)
    buffers: list[Record] = []
    for name, buffer in update.buffers.items():
        record, parts = _encode_tensor(name, buffer, MaskSet("", {name: None}), None, encode_values, held=False)
        buffers.append(record)
        sections += parts
    header = Header(
        kind=update.kind,
        absent=update.absent,
        num_examples=operator.index(update.num_examples),
        mask_id=update.mask_id,
        travelling_id=update.masks.id if isinstance(update.masks, MaskSet) and not (leans and wholly) else None,
        reference_id=reference.id if leans and reference is not None else None,
        named=not (leans and reference is not None and list(masks) == list(reference)),
        metrics={name: float(value) for name, value in update.metrics.items()},
        parameters=records,
        buffers=buffers,
    )
    return write_container(header, sections)


def read_described(reader: Reader, *, reference: MaskSet | None, limits: Limits) -> SparseUpdate:
    """Read what :func:`write_described` wrote."""
    header = read_container(reader, limits)
    names, reference = _resolve_reference(header, reference)
    values: dict[str, Tensor] = {}
    masks: dict[str, Tensor | None] = {}
    positions: dict[str, Tensor] = {}
    for name, record in zip(names, header.parameters, strict=True):
        record.name = name
        masks[name], found = _decode_mask(record, reader, reference)
        if found is not None:
            positions[name] = found
        values[name] = _decode_values(record, reader, infinities=False)
    # infinite buffers are common (attention masks): check_update asks whether the model's own are the same
    buffers = {record.name: _decode_values(record, reader, infinities=True) for record in header.buffers}
    if reference is not None and _is_reference(header.parameters, reference):
        mask_set = reference
    else:
        mask_set = MaskSet.of(masks, positions=positions)
    if header.travelling_id not in (None, mask_set.id):
        raise PayloadError(f"the masks have id {mask_set.id!r} but the payload declares {header.travelling_id!r}")
    return SparseUpdate(
        values=values,
        masks=mask_set,
        num_examples=header.num_examples,
        kind=header.kind,
        absent=header.absent,
        buffers=buffers,
        metrics=header.metrics,
        mask_id=header.mask_id,
    )


def described_sizes(reader: Reader, limits: Limits) -> tuple[int, int, Counter[str]]:
    """Bytes of positions, bytes of values, and parameters by how their positions travel, from the header alone."""
    header = read_container(reader, limits)
    positions = sum(record.position_bytes for record in header.parameters)
    values = sum(record.value_bytes for record in header.parameters + header.buffers)
    return positions, values, Counter(record.positions.name.lower() for record in header.parameters)


def _encode_tensor(
    name: str,
    value: Tensor,
    masks: MaskSet,
    reference: MaskSet | None,
    code_values: Callable[[Tensor], tuple[ValueCoding, Section]],
    *,
    held: bool,
) -> tuple[Record, tuple[Section, Section]]:
    """One tensor's record and sections; ``held`` says that ``masks`` are known to be those of the reference."""
    if value.dtype not in DTYPES:
        raise ValueError(f"expected {name!r} to have a dtype that a payload can carry, got {value.dtype}")
    positions, section, kept = encode_mask(masks, name, reference=reference, held=held)
    if kept is not None and value.shape != (kept,):
        raise ValueError(f"expected the {kept} kept values of {name!r} in one dimension, got {tuple(value.shape)}")
    values, data = code_values(value)
    mask = masks[name]
    shape = tuple(value.shape if mask is None else mask.shape)
    record = Record(name, value.dtype, positions, values, shape, value.numel(), len(section), len(data))
    return record, (section, data)


def _is_reference(records: list[Record], reference: MaskSet) -> bool:
    """Whether masks that are coded like this are those of the reference, all of them, in its order."""
    return [record.name for record in records] == list(reference) and all(
        record.positions == (PositionCoding.DENSE if reference[record.name] is None else PositionCoding.KNOWN)
        for record in records
    )


def _resolve_reference(header: Header, reference: MaskSet | None) -> tuple[list[str], MaskSet | None]:
    """The parameters' names, and the reference if the payload leans on one."""
    names = [record.name for record in header.parameters]
    if header.reference_id is None:
        return names, None
    if reference is None or reference.id != header.reference_id:
        held = "none" if reference is None else repr(reference.id)
        raise PayloadError(f"the payload leans on the masks {header.reference_id!r} but the receiver holds {held}")
    if not header.named:
        names = list(reference)
        if len(names) != len(header.parameters):
            raise PayloadError(f"the payload has {len(header.parameters)} parameters, its reference {len(names)}")
        both = reference.keys() & {record.name for record in header.buffers}
        if both:
            raise PayloadError(f"tensor {min(both)!r} comes twice")
    return names, reference


def _decode_mask(record: Record, reader: Reader, reference: MaskSet | None) -> tuple[Tensor | None, Tensor | None]:
    """The mask and, where known, its positions; completes a record that left shape and count to the reference."""
    name = record.name
    if record.positions == PositionCoding.DENSE:
        return None, None
    section = reader.take(record.position_bytes, f"the positions of {name!r}")
    if record.positions in LEANING:
        held = None if reference is None else reference.get(name)
        if reference is None or held is None:
            raise PayloadError(f"{name!r} leans on a mask that its reference does not have")
        if record.positions == PositionCoding.KNOWN:
            positions = reference.positions(name)
            record.shape, record.count = tuple(held.shape), positions.numel()
            return held, positions
        if tuple(held.shape) != record.shape:
            raise PayloadError(f"{name!r} has shape {record.shape} but its reference mask {tuple(held.shape)}")
    size = int(np.prod(record.shape, dtype=np.int64))
    mask, kept = decode_positions(
        record.positions, section, size=size, count=record.count, reference=reference, name=name
    )
    return torch.from_numpy(mask).reshape(record.shape), None if kept is None else torch.from_numpy(kept)


def _decode_values(record: Record, reader: Reader, *, infinities: bool) -> Tensor:
    what = repr(record.name)
    section = reader.take(record.value_bytes, f"the values of {what}")
    flat = decode_values(
        record.values, section, count=record.count, dtype=record.dtype, what=what, infinities=infinities
    )
    return flat.reshape(record.shape) if record.positions == PositionCoding.DENSE else flat
