"""Reading bytes that may be hostile: limits, bounded primitives and the one error that they raise."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

__all__ = ["DEFAULT_LIMITS", "Limits", "PayloadError", "Reader", "deflate", "deflater", "inflate", "varint"]


class PayloadError(ValueError):
    """A payload that cannot be what it says it is, or an update that does not fit its receiver."""


@dataclass(frozen=True)
class Limits:
    """What a decoder is ready to hold; a payload that declares more is refused before anything is allocated.

    Args:
        max_bytes: Length of the payload.
        max_elements: Elements of all tensors together, kept or not, buffers included.
        max_tensors: Parameters and buffers together, and likewise metrics.
        max_name_length: UTF-8 bytes of a name or an id.
        max_header_bytes: Header after decompression.
        max_examples: ``num_examples`` of one update.
    """

    max_bytes: int = 2**31
    max_elements: int = 2**28
    max_tensors: int = 10_000
    max_name_length: int = 512
    max_header_bytes: int = 2**22
    max_examples: int = 10**12

    @classmethod
    def for_tensors(cls, tensors: Mapping[str, Tensor]) -> Limits:
        """Tight limits for updates of one model, from its parameters and buffers together."""
        elements = sum(tensor.numel() for tensor in tensors.values())
        # raw bitmaps and values are the worst an encoder chooses; the rest is room for the header
        size = sum(tensor.numel() * (tensor.element_size() + 1) for tensor in tensors.values())
        return cls(max_bytes=size + 2**22, max_elements=elements, max_tensors=len(tensors) + 1_000)


DEFAULT_LIMITS = Limits()


def varint(number: int) -> bytes:
    """LEB128: seven bits a byte, the low ones first, the top bit set while more follow.

    >>> varint(300).hex()
    'ac02'
    """
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def deflate(plain: bytes | memoryview, *, match: bool = False) -> bytes:
    """Compress to a raw deflate stream; without ``match`` by Huffman codes alone.

    What travels here is noise with a skewed histogram: looking for matches in it costs time and gains nothing.
    """
    packer = deflater(match=match)
    return packer.compress(plain) + packer.flush()


def deflater(*, match: bool = False) -> zlib._Compress:
    """What :func:`deflate` compresses with, for a stream that is made in parts."""
    strategy = zlib.Z_DEFAULT_STRATEGY if match else zlib.Z_HUFFMAN_ONLY
    return zlib.compressobj(9, zlib.DEFLATED, -15, 9, strategy)


def inflate(packed: memoryview, at_most: int, what: str) -> bytes:
    """Expand a raw deflate stream that fills ``packed``, to no more than ``at_most`` bytes."""
    expander = zlib.decompressobj(-15)
    try:
        plain = expander.decompress(packed, at_most + 1)
    except zlib.error as error:
        raise PayloadError(f"{what} is not a deflate stream ({error})") from error
    if len(plain) > at_most:
        raise PayloadError(f"{what} expands to more than the {at_most} bytes that it can hold")
    if not expander.eof or expander.unused_data:
        raise PayloadError(f"the deflate stream of {what} does not end where its section ends")
    return plain


class Reader:
    """Takes bytes off the front of a buffer; running out of them is a :class:`PayloadError`."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._at = 0

    @property
    def left(self) -> int:
        """Bytes not read yet."""
        return len(self._data) - self._at

    def take(self, size: int, what: str) -> memoryview:
        """The next ``size`` bytes."""
        if size > self.left:
            raise PayloadError(f"{what} needs {size} bytes but {self.left} are left")
        self._at += size
        return self._data[self._at - size : self._at]

    def peek(self, at_most: int) -> memoryview:
        """The next bytes, as many as there are up to ``at_most``; they are still to be taken."""
        return self._data[self._at : self._at + at_most]

    def byte(self, what: str) -> int:
        """The next byte."""
        return self.take(1, what)[0]

    def varint(self, what: str, at_most: int) -> int:
        """The next variable-length integer, at most ``at_most``."""
        number = 0
        for shift in range(0, 63, 7):
            byte = self.byte(what)
            number |= (byte & 0x7F) << shift
            if byte < 0x80:
                if number > at_most:
                    raise PayloadError(f"{what} is {number}, more than the limit of {at_most}")
                return number
        raise PayloadError(f"{what} is an integer of more than 63 bits")

    def string(self, what: str, length: int) -> str:
        """The next ``length`` bytes as UTF-8."""
        raw = bytes(self.take(length, what))
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise PayloadError(f"{what} is not UTF-8: {raw!r}") from error
