r"""What crossed the wire, what it would be dense, and the least that the same masks and raw values can take.

The bound is, over the tensors, :math:`n H(d) / 8` bytes for an independent mask that keeps :math:`d n` of :math:`n` entries,
with :math:`H(d) = -d \log_2 d - (1-d) \log_2 (1-d)`, plus the kept values as they are. Where the receiver holds a mask that
keeps :math:`a` entries, of which :math:`r` are dropped and to which :math:`e` are added, positions take
:math:`(a H(r/a) + (n-a) H(e/(n-a))) / 8`: nothing where it is the same. Coded values can be smaller than raw ones, so that a
payload can lie below this bound.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields

from torch import Tensor

from lightning_fedsparse.payload import payload_sizes
from lightning_fedsparse.schema import Schema
from lightning_fedsparse.update import MaskSet, SparseUpdate

__all__ = ["ClientTraffic", "Traffic", "entropy_bound", "size_in_bytes"]


@dataclass(frozen=True)
class Traffic:
    """Bytes in one direction, of one payload or of many.

    Args:
        total: On the wire.
        positions: Of these, which entries are kept.
        values: Of these, parameters and buffers.
        header: All the others; the whole of a payload that was refused.
        dense: As raw dense tensors.
        bound: The least for these masks with raw values; 0 for a payload that was refused.
        codings: Parameters by how their positions travel (``"dense"``, ``"known"``, ``"changes"``, ``"gaps"``,
            ``"packed_bitmap"``, ``"bitmap"``), as the encoder chose; ``"counted"`` where nothing was encoded.
    """

    total: int = 0
    positions: int = 0
    values: int = 0
    header: int = 0
    dense: int = 0
    bound: int = 0
    codings: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        payload: bytes,
        update: SparseUpdate,
        *,
        reference: MaskSet | None,
        dense: int,
        schema: Schema | None = None,
    ) -> Traffic:
        """Measure one valid payload.

        Args:
            payload: The bytes.
            update: What they hold.
            reference: Masks that the receiver holds.
            dense: The model as raw dense tensors, in bytes.
            schema: The model's tensors, where the payload names them by their schema.
        """
        sizes = payload_sizes(payload, schema=schema, reference=reference)
        bound = entropy_bound(update, reference=reference)
        return cls(sizes.total, sizes.positions, sizes.values, sizes.header, dense, bound, sizes.codings)

    @classmethod
    def counted(cls, update: SparseUpdate, *, reference: MaskSet | None, dense: int) -> Traffic:
        """Count what was not encoded: the bound, masks and raw values."""
        bound = entropy_bound(update, reference=reference)
        values = size_in_bytes({**update.values, **update.buffers})
        return cls(bound, bound - values, values, 0, dense, bound, {"counted": len(update.masks)})

    @classmethod
    def of_refused(cls, size: int, *, dense: int) -> Traffic:
        """Count a payload of so many bytes that nothing can be believed of."""
        return cls(total=size, header=size, dense=dense)

    @classmethod
    def sum(cls, parts: Iterable[Traffic]) -> Traffic:
        """Everything together."""
        parts = list(parts)
        counts = [count.name for count in fields(cls) if count.name != "codings"]
        codings = Counter[str]()
        for part in parts:
            codings.update(part.codings)
        return cls(**{count: sum(getattr(part, count) for part in parts) for count in counts}, codings=dict(codings))


@dataclass(frozen=True)
class ClientTraffic:
    """One client's share of a round.

    Args:
        down: Its broadcast.
        up: Its upload; None if none came.
        transfer_seconds: Time on its link, both ways; None if it has none.
    """

    down: Traffic
    up: Traffic | None = None
    transfer_seconds: float | None = None


def entropy_bound(update: SparseUpdate, *, reference: MaskSet | None = None) -> int:
    """The least bytes for an update's masks, given those of the receiver, with values and buffers as they are.

    Example:
        >>> import torch
        >>> mask = torch.arange(80) < 40  # one bit for each entry, and 40 values of 4 bytes
        >>> entropy_bound(SparseUpdate({"w": torch.ones(40)}, {"w": mask}))
        170
    """
    bits = 8.0 * size_in_bytes({**update.values, **update.buffers})
    held = update.masks if isinstance(update.masks, MaskSet) else None
    if reference is not None and held is not None and held.id == reference.id:
        return round(bits / 8)
    for name, mask in update.masks.items():
        if mask is not None:
            theirs = None if reference is None else reference.get(name)
            same_shape = theirs is not None and theirs.shape == mask.shape
            bits += _position_bits(mask, update.values[name].numel(), theirs if same_shape else None)
    return math.ceil(bits / 8)


def size_in_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Raw dense tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _position_bits(mask: Tensor, kept: int, given: Tensor | None) -> float:
    if given is None:
        return _choice_bits(mask.numel(), kept)
    before, common = int(given.count_nonzero()), int((mask & given).count_nonzero())
    return _choice_bits(before, before - common) + _choice_bits(mask.numel() - before, kept - common)


def _choice_bits(size: int, chosen: int) -> float:
    """``size`` times the binary entropy of the chosen share."""
    return sum(part * math.log2(size / part) for part in (chosen, size - chosen) if part)
