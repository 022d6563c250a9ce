"""An update <-> the content of a payload that leaves to a schema what its tensors are.

Names, shapes, dtypes and the lengths of sections follow from the schema and from the masks that both ends hold, so that
an update on a known mask has a header of some twenty bytes however many tensors there are. Whatever a receiver
allocates is as large as its own schema says.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lightning_fedsparse.bounded_reading import Limits, PayloadError, Reader, varint
from lightning_fedsparse.compact_front import ID_OF_MASKS, ID_OF_REFERENCE, NO_ID, Front, read_front, write_front
from lightning_fedsparse.container import LEANING, PositionCoding
from lightning_fedsparse.frame import BY_SCHEMA, write_frame
from lightning_fedsparse.joint_values import Wanted, read_values, write_values
from lightning_fedsparse.positions import encode_mask, read_positions
from lightning_fedsparse.schema import Schema, TensorSpec, fingerprint
from lightning_fedsparse.update import MaskSet, SparseUpdate
from lightning_fedsparse.value_coding import LOSSLESS, ValueType

__all__ = ["compact_sizes", "read_compact", "write_compact"]

_CODING_BITS = 3


def write_compact(
    update: SparseUpdate,
    masks: MaskSet,
    *,
    schema: Schema,
    reference: MaskSet | None,
    values: ValueType,
    block: int | None,
    generator: torch.Generator | None,
) -> bytes:
    """Code an update that has been looked over; ``masks`` are its masks, and ``generator`` is there if values are rounded.

    Raises:
        ValueError: If the update is not of the schema.
    """
    schema.require(update)
    same_id = reference is not None and masks is update.masks and masks.id == reference.id
    codings: list[PositionCoding] = []
    counts: list[tuple[int, int]] = []
    sections: list[bytes] = []
    for spec in schema.parameters:
        coding, section, kept = encode_mask(masks, spec.name, reference=reference, held=same_id, delimited=True)
        if kept is not None and update.values[spec.name].shape != (kept,):
            shape = tuple(update.values[spec.name].shape)
            raise ValueError(f"expected the {kept} kept values of {spec.name!r} in one dimension, got {shape}")
        codings.append(coding)
        if kept is not None and coding != PositionCoding.KNOWN:
            counts.append((kept, _count_bits(spec)))
            sections.append(section)
    held = reference is not None and _is_held(schema, codings, reference)
    leans = held or any(coding in LEANING for coding in codings)
    travelling = update.masks.id if isinstance(update.masks, MaskSet) and not held else None
    mask_id: int | str = NO_ID if update.mask_id is None else update.mask_id
    if leans and reference is not None and mask_id == reference.id:
        mask_id = ID_OF_REFERENCE
    elif mask_id == travelling:
        mask_id = ID_OF_MASKS
    front = Front(
        kind=update.kind,
        absent=update.absent,
        values=values,
        num_examples=operator.index(update.num_examples),
        schema=schema.fingerprint,
        reference=fingerprint(reference.id) if leans and reference is not None else None,
        held=held,
        travelling=None if travelling is None else fingerprint(travelling),
        has_buffers=bool(update.buffers),
        mask_id=mask_id,
        metrics={name: float(value) for name, value in update.metrics.items()},
        block=block or 0,
    )
    positions = b""
    if not held:
        table = _pack_bits((coding, _CODING_BITS) for coding in codings) + _pack_bits(counts)
        positions = b"".join([table, *sections])
        positions = varint(len(positions)) + positions
    tensors = [(update.values[spec.name], values) for spec in schema.parameters]
    whole: list[tuple[Tensor, ValueType]] = [(buffer, LOSSLESS) for buffer in update.buffers.values()]
    content = write_values([*tensors, *whole], block=block, generator=generator)
    return write_frame(BY_SCHEMA, [write_front(front), positions, *content])


def read_compact(reader: Reader, *, schema: Schema | None, reference: MaskSet | None, limits: Limits) -> SparseUpdate:
    """Read what :func:`write_compact` wrote."""
    front, codings, reference, positions = _read_head(reader, schema, reference, limits)
    assert schema is not None  # the head was read against it
    counts = _read_counts(positions, schema, codings)
    masks: dict[str, Tensor | None] = {}
    found: dict[str, Tensor] = {}
    wanted: list[Wanted] = []
    for spec, coding, declared in zip(schema.parameters, codings, counts, strict=True):
        count = math.prod(spec.shape) if declared is None else declared
        if coding == PositionCoding.DENSE:
            masks[spec.name] = None
        elif coding == PositionCoding.KNOWN:
            assert reference is not None
            masks[spec.name] = reference[spec.name]
            found[spec.name] = reference.positions(spec.name)
            count = found[spec.name].numel()
        else:
            size = math.prod(spec.shape)
            mask, kept = read_positions(coding, positions, size=size, count=count, reference=reference, name=spec.name)
            masks[spec.name] = torch.from_numpy(mask).reshape(spec.shape)
            if kept is not None:
                found[spec.name] = torch.from_numpy(kept)
        wanted.append(Wanted(spec.name, count, spec.dtype, front.values))
    if positions.left:
        raise PayloadError(f"the positions have {positions.left} bytes after the last tensor's")
    mask_set = reference if front.held and reference is not None else MaskSet.of(masks, positions=found)
    if front.travelling is not None and front.travelling != fingerprint(mask_set.id):
        own = fingerprint(mask_set.id).hex()
        raise PayloadError(f"the masks have fingerprint {own} but the payload declares {front.travelling.hex()}")
    # infinite buffers are common (attention masks): check_update asks whether the model's own are the same
    whole = schema.buffers if front.has_buffers else ()
    wanted += [Wanted(spec.name, math.prod(spec.shape), spec.dtype, infinities=True) for spec in whole]
    tensors = dict(zip((one.name for one in wanted), read_values(reader, wanted, block=front.block), strict=True))
    for spec in (*schema.parameters, *whole):
        if masks.get(spec.name) is None:
            tensors[spec.name] = tensors[spec.name].reshape(spec.shape)
    mask_id: str | None = None
    if front.mask_id == ID_OF_REFERENCE and reference is not None:
        mask_id = reference.id
    elif front.mask_id == ID_OF_MASKS:
        mask_id = mask_set.id
    elif isinstance(front.mask_id, str):
        mask_id = front.mask_id
    return SparseUpdate(
        values={spec.name: tensors[spec.name] for spec in schema.parameters},
        masks=mask_set,
        num_examples=front.num_examples,
        kind=front.kind,
        absent=front.absent,
        buffers={spec.name: tensors[spec.name] for spec in whole},
        metrics=front.metrics,
        mask_id=mask_id,
    )


def compact_sizes(
    reader: Reader, *, schema: Schema | None, reference: MaskSet | None, limits: Limits
) -> tuple[int, int, Counter[str]]:
    """Bytes of positions, bytes of values, and parameters by how their positions travel."""
    _, codings, _, positions = _read_head(reader, schema, reference, limits)
    assert schema is not None  # the head was read against it
    _read_counts(positions, schema, codings)
    return positions.left, reader.left, Counter(coding.name.lower() for coding in codings)


def _is_held(schema: Schema, codings: Sequence[PositionCoding], reference: MaskSet) -> bool:
    """Whether masks that are coded like this are those of the reference, all of them, in its order."""
    return [spec.name for spec in schema.parameters] == list(reference) and all(
        coding == (PositionCoding.DENSE if mask is None else PositionCoding.KNOWN)
        for coding, mask in zip(codings, reference.values(), strict=True)
    )


def _read_head(
    reader: Reader, schema: Schema | None, reference: MaskSet | None, limits: Limits
) -> tuple[Front, list[PositionCoding], MaskSet | None, Reader]:
    """The front, each parameter's coding, the reference if the payload leans on it, and a reader of the positions' counts."""
    front = read_front(reader, limits)
    if schema is None or schema.fingerprint != front.schema:
        held = "none" if schema is None else schema.fingerprint.hex()
        raise PayloadError(f"the payload is of the schema {front.schema.hex()} but the receiver holds {held}")
    if front.reference is None:
        reference = None
    elif reference is None or fingerprint(reference.id) != front.reference:
        held = "none" if reference is None else f"{fingerprint(reference.id).hex()}, which is {reference.id!r}"
        raise PayloadError(f"the payload leans on the masks {front.reference.hex()} but the receiver holds {held}")
    if front.held:
        assert reference is not None
        if [spec.name for spec in schema.parameters] != list(reference):
            raise PayloadError("the payload has the masks of its reference, which has other parameters than the schema")
        codings = [PositionCoding.DENSE if mask is None else PositionCoding.KNOWN for mask in reference.values()]
        positions = Reader(memoryview(b""))
    else:
        length = reader.varint("the bytes of the positions", reader.left)
        positions = Reader(reader.take(length, "the positions"))
        codes = _read_bits(positions, [_CODING_BITS] * len(schema.parameters), "the codings of the positions")
        if any(code >= len(PositionCoding) for code in codes):
            raise PayloadError(
                f"a position coding has code {max(codes)}, beyond the last known one, {len(PositionCoding) - 1}"
            )
        codings = [PositionCoding(code) for code in codes]
    for spec, coding in zip(schema.parameters, codings, strict=True):
        if coding in LEANING:
            mask = None if reference is None else reference.get(spec.name)
            if mask is None or tuple(mask.shape) != spec.shape:
                raise PayloadError(f"{spec.name!r} leans on a mask that its reference does not have")
    return front, codings, reference, positions


def _read_counts(positions: Reader, schema: Schema, codings: Sequence[PositionCoding]) -> list[int | None]:
    """How many values each parameter keeps where the payload has to say it."""
    counted = [coding not in (PositionCoding.DENSE, PositionCoding.KNOWN) for coding in codings]
    widths = [_count_bits(spec) for spec, says in zip(schema.parameters, counted, strict=True) if says]
    counts = iter(_read_bits(positions, widths, "the counts of the positions"))
    found = [next(counts) if says else None for says in counted]
    for spec, count in zip(schema.parameters, found, strict=True):
        if count is not None and count > math.prod(spec.shape):
            raise PayloadError(f"the count of {spec.name!r} is {count}, more than the limit of {math.prod(spec.shape)}")
    return found


def _count_bits(spec: TensorSpec) -> int:
    return math.prod(spec.shape).bit_length()


def _pack_bits(numbers: Iterable[tuple[int, int]]) -> bytes:
    """Numbers of so many bits each, high bits first, one after the other; the last byte is filled up with zeros."""
    bits = "".join(format(number, f"0{width}b") for number, width in numbers if width)
    bits += "0" * (-len(bits) % 8)
    return int(bits or "0", 2).to_bytes(len(bits) // 8, "big")


def _read_bits(reader: Reader, widths: Sequence[int], what: str) -> list[int]:
    """Read what :func:`_pack_bits` wrote."""
    data = reader.take((sum(widths) + 7) // 8, what)
    bits = format(int.from_bytes(data, "big"), f"0{8 * len(data)}b") if len(data) else ""
    at, numbers = 0, []
    for width in widths:
        numbers.append(int(bits[at : at + width] or "0", 2))
        at += width
    if "1" in bits[at:]:
        raise PayloadError(f"{what} do not end with the last parameter's")
    return numbers
