"""A :class:`~lightning_fedsparse.update.SparseUpdate` <-> bytes, and the checks that a receiver makes.

:func:`encode` sends positions only where the receiver lacks them: nothing where its mask is the same, the changes where
that is smallest, else the mask under the smallest coding. Values travel without loss, or parameters rounded without bias to
a shorter type. :func:`decode` trusts nothing: whatever arrives either is an
update or raises :class:`PayloadError`. :func:`check_update` then holds the update against the model. The format is
specified in ``docs/payload_format.md``.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_fedsparse.bounded_reading import DEFAULT_LIMITS, Limits, PayloadError, Reader
from lightning_fedsparse.container import (
    ABSENT,
    DTYPES,
    KINDS,
    LEANING,
    Header,
    PositionCoding,
    Record,
    Section,
    ValueCoding,
    read_container,
    write_container,
)
from lightning_fedsparse.positions import decode_positions, encode_positions
from lightning_fedsparse.update import MaskSet, SparseUpdate
from lightning_fedsparse.validation import check_update
from lightning_fedsparse.value_coding import (
    LOSSLESS,
    VALUE_TYPES,
    ValueType,
    decode_values,
    encode_rounded_values,
    encode_values,
)

__all__ = [
    "Limits",
    "MaskSet",
    "PayloadError",
    "PayloadSizes",
    "ValueType",
    "check_update",
    "decode",
    "encode",
    "payload_sizes",
]

# values that share a scale where they travel as integers: 4 bytes in 256 are 1.6 % of int8's size, and one large weight
# then spoils the resolution of its neighbours only
_BLOCK = 256


@dataclass(frozen=True)
class PayloadSizes:
    """Bytes of a payload by what they carry.

    Args:
        total: The whole payload.
        positions: Which entries of parameters are kept.
        values: Parameters and buffers.
        header: All that is neither.
        codings: Parameters by how their positions travel: the name of the ``PositionCoding``, in lower case.
    """

    total: int
    positions: int
    values: int
    header: int
    codings: Mapping[str, int]


def encode(
    update: SparseUpdate,
    *,
    reference: MaskSet | None = None,
    values: ValueType = LOSSLESS,
    block: int | None = _BLOCK,
    seed: int | None = None,
) -> bytes:
    """Code an update for a receiver.

    Args:
        update: What travels; tensors on any device, in any memory layout.
        reference: Masks that the receiver is known to hold. The payload leans on them where that saves bytes, and can
            then be decoded only with them.
        values: How the values of floating-point parameters travel: ``"float32"``, without loss whatever their dtype, or
            rounded, without bias, to ``"bfloat16"``, ``"float16"``, ``"int8"`` or ``"int4"`` where that is shorter than
            their dtype. What is decoded has the dtype that was encoded. Buffers never lose a bit.
        block: Values that share a scale under ``"int8"`` and ``"int4"``; None for one scale per tensor.
        seed: Of the rounding; needed where values are rounded, and to differ between clients and rounds.

    Raises:
        ValueError: If ``values`` is unknown, a seed is missing or the update's parts contradict each other.
    """
    if values not in VALUE_TYPES:
        raise ValueError(f"expected values to be one of {VALUE_TYPES}, got {values!r}")
    if block is not None and block < 1:
        raise ValueError(f"expected block to be at least 1, got {block}")
    generator = None
    if values != LOSSLESS:
        if seed is None:
            raise ValueError(f"expected a seed for the stochastic rounding to {values!r}, got None")
        generator = torch.Generator().manual_seed(seed)

    def code_values(value: Tensor) -> tuple[ValueCoding, Section]:
        if generator is None:
            return encode_values(value)
        return encode_rounded_values(value, values, block=block, generator=generator)

    if update.values.keys() != update.masks.keys():
        odd = sorted(update.values.keys() ^ update.masks.keys())
        raise ValueError(f"expected values and masks of the same tensors, got only one of the two for {odd}")
    if update.kind not in KINDS or update.absent not in ABSENT:
        raise ValueError(f"expected kind in {KINDS} and absent in {ABSENT}, got {update.kind!r}, {update.absent!r}")
    if operator.index(update.num_examples) < 0:
        raise ValueError(f"expected num_examples of at least 0, got {update.num_examples}")
    # a set without an id finds and keeps the positions of plain masks while they are coded
    masks = update.masks if isinstance(update.masks, MaskSet) else MaskSet("", update.masks)
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


def decode(data: bytes, *, reference: MaskSet | None = None, limits: Limits = DEFAULT_LIMITS) -> SparseUpdate:
    """Read what :func:`encode` wrote.

    Args:
        data: The payload.
        reference: Masks that this receiver holds and the sender may have leant on.
        limits: What this receiver is ready to hold; :meth:`Limits.for_tensors` gives tight ones for a model.

    Returns:
        The update, on the CPU, contiguous. Its masks are a :class:`MaskSet`: ``reference`` itself if all of them are
        the reference's, so that what is cached there is shared.

    Raises:
        PayloadError: If ``data`` is not a payload within ``limits``, leans on other masks than ``reference``, or holds
            a NaN, or a parameter that is not finite.
    """
    header, reader = read_container(data, limits)
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


def payload_sizes(data: bytes) -> PayloadSizes:
    """Split the bytes of a payload, from its header alone.

    Raises:
        PayloadError: If ``data`` is not a payload.
    """
    header, _ = read_container(data, DEFAULT_LIMITS)
    positions = sum(record.position_bytes for record in header.parameters)
    values = sum(record.value_bytes for record in header.parameters + header.buffers)
    codings = Counter(record.positions.name.lower() for record in header.parameters)
    return PayloadSizes(len(data), positions, values, len(data) - positions - values, dict(codings))


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
    mask = masks[name]
    positions, section = PositionCoding.DENSE, b""
    shape = tuple(value.shape)
    if mask is not None:
        shape = tuple(mask.shape)
        theirs = None if reference is None else reference.get(name)
        if theirs is None or theirs.shape != mask.shape:
            reference = None
        if reference is not None and theirs is not None and (held or mask is theirs or _equal(mask, theirs)):
            positions = PositionCoding.KNOWN
            kept = reference.positions(name).numel()
        else:
            positions, section = encode_positions(masks, name, reference=reference)
            kept = int(np.count_nonzero(mask.detach().cpu().numpy()))
        if value.shape != (kept,):
            raise ValueError(f"expected the {kept} kept values of {name!r} in one dimension, got {tuple(value.shape)}")
    values, data = code_values(value)
    record = Record(name, value.dtype, positions, values, shape, value.numel(), len(section), len(data))
    return record, (section, data)


def _equal(mask: Tensor, other: Tensor) -> bool:
    return torch.equal(mask.cpu(), other.cpu())


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
