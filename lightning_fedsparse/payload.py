"""A :class:`~lightning_fedsparse.update.SparseUpdate` <-> bytes, and the checks that a receiver makes.

:func:`encode` sends positions only where the receiver lacks them: nothing where its mask is the same, the changes where
that is smallest, else the mask under the smallest coding. Values travel without loss, or parameters rounded without bias to
a shorter type. Where both ends have the same model, its :class:`~lightning_fedsparse.schema.Schema` says what the tensors are;
else the payload does. :func:`decode` trusts nothing: whatever arrives either is an update or raises :class:`PayloadError`.
:func:`check_update` then holds the update against the model. The format is specified in ``docs/payload_format.md``.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lightning_fedsparse.bounded_reading import DEFAULT_LIMITS, Limits, PayloadError
from lightning_fedsparse.compact import compact_sizes, read_compact, write_compact
from lightning_fedsparse.container import ABSENT, KINDS
from lightning_fedsparse.frame import SELF_DESCRIBING, read_frame
from lightning_fedsparse.schema import Schema
from lightning_fedsparse.self_describing import described_sizes, read_described, write_described
from lightning_fedsparse.update import MaskSet, SparseUpdate
from lightning_fedsparse.validation import check_update
from lightning_fedsparse.value_coding import LOSSLESS, VALUE_TYPES, ValueType

__all__ = [
    "Limits",
    "MaskSet",
    "PayloadError",
    "PayloadSizes",
    "Schema",
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
    schema: Schema | None = None,
    values: ValueType = LOSSLESS,
    block: int | None = _BLOCK,
    seed: int | None = None,
) -> bytes:
    """Code an update for a receiver.

    Args:
        update: What travels; tensors on any device, in any memory layout.
        reference: Masks that the receiver is known to hold. The payload leans on them where that saves bytes, and can
            then be decoded only with them.
        schema: The model's tensors, if the receiver is known to have the same model. The payload then says nothing
            about them and can be decoded only with the schema; else it describes them itself.
        values: How the values of floating-point parameters travel: ``"float32"``, without loss whatever their dtype, or
            rounded, without bias, to ``"bfloat16"``, ``"float16"``, ``"int8"`` or ``"int4"`` where that is shorter than
            their dtype. What is decoded has the dtype that was encoded. Buffers never lose a bit.
        block: Values that share a scale under ``"int8"`` and ``"int4"``; None for one scale per tensor.
        seed: Of the rounding; needed where values are rounded, and to differ between clients and rounds.

    Raises:
        ValueError: If ``values`` is unknown, a seed is missing, the update's parts contradict each other, or it is not of
            the schema.
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

    if update.values.keys() != update.masks.keys():
        odd = sorted(update.values.keys() ^ update.masks.keys())
        raise ValueError(f"expected values and masks of the same tensors, got only one of the two for {odd}")
    if update.kind not in KINDS or update.absent not in ABSENT:
        raise ValueError(f"expected kind in {KINDS} and absent in {ABSENT}, got {update.kind!r}, {update.absent!r}")
    if operator.index(update.num_examples) < 0:
        raise ValueError(f"expected num_examples of at least 0, got {update.num_examples}")
    # a set without an id finds and keeps the positions of plain masks while they are coded
    masks = update.masks if isinstance(update.masks, MaskSet) else MaskSet("", update.masks)
    if schema is None:
        return write_described(update, masks, reference=reference, values=values, block=block, generator=generator)
    return write_compact(
        update, masks, schema=schema, reference=reference, values=values, block=block, generator=generator
    )


def decode(
    data: bytes, *, reference: MaskSet | None = None, schema: Schema | None = None, limits: Limits = DEFAULT_LIMITS
) -> SparseUpdate:
    """Read what :func:`encode` wrote.

    Args:
        data: The payload.
        reference: Masks that this receiver holds and the sender may have leant on.
        schema: The tensors of this receiver's model, which the sender may have left unsaid.
        limits: What this receiver is ready to hold; :meth:`Limits.for_tensors` gives tight ones for a model.

    Returns:
        The update, on the CPU, contiguous. Its masks are a :class:`MaskSet`: ``reference`` itself if all of them are
        the reference's, so that what is cached there is shared.

    Raises:
        PayloadError: If ``data`` is not a payload within ``limits``, leans on other masks than ``reference``, is
            of another model than ``schema``, or holds a NaN, or a parameter that is not finite.
    """
    version, reader = read_frame(data, limits)
    if version == SELF_DESCRIBING:
        return read_described(reader, reference=reference, limits=limits)
    return read_compact(reader, schema=schema, reference=reference, limits=limits)


def payload_sizes(data: bytes, *, schema: Schema | None = None, reference: MaskSet | None = None) -> PayloadSizes:
    """Split the bytes of a payload, from its header alone.

    Args:
        data: The payload.
        schema: As for :func:`decode`, where the payload names one.
        reference: As for :func:`decode`, where the payload leans on one beside a schema.

    Raises:
        PayloadError: If ``data`` is not a payload.
    """
    limits = DEFAULT_LIMITS if schema is None else schema.limits
    version, reader = read_frame(data, limits)
    if version == SELF_DESCRIBING:
        positions, values, codings = described_sizes(reader, limits)
    else:
        positions, values, codings = compact_sizes(reader, schema=schema, reference=reference, limits=limits)
    return PayloadSizes(len(data), positions, values, len(data) - positions - values, dict(codings))
