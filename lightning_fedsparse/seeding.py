"""One seed -> many: independent seeds for rounds, clients and purposes.

Every random draw of the library uses a generator of its own, seeded by what the draw is for, such as
``derive_seed(seed, "sampling", round_index)``. Results then depend neither on global generators nor on the order in
which clients run.
"""

from __future__ import annotations

import hashlib

__all__ = ["derive_seed"]


def derive_seed(seed: int, *parts: int | str) -> int:
    """Hash a seed and what it is for to a new seed, the same in every process and on every platform.

    Args:
        seed: The run's seed, any integer.
        parts: What tells this draw from others: a purpose, a round index, a client id. ``1`` and ``"1"`` differ.

    Returns:
        An integer in [0, 2**63). ``torch.Generator.manual_seed`` and ``numpy.random.default_rng`` take it as it is;
        where only 32 bits are allowed (``lightning.seed_everything``), take it modulo 2**32.

    Raises:
        TypeError: A seed that is not an integer, or a part that is neither an integer nor a string.

    Example:
        >>> derive_seed(0, "sampling", 3) == derive_seed(0, "sampling", 3)
        True
        >>> derive_seed(0, "sampling", 3) == derive_seed(0, "sampling", 4)
        False
    """
    if not isinstance(seed, int):
        raise TypeError(f"expected an integer seed, got {seed!r}")
    digest = hashlib.blake2b(digest_size=8)
    for part in (seed, *parts):
        if not isinstance(part, int | str):
            raise TypeError(f"expected integers and strings to derive a seed from, got {part!r}")
        kind, text = ("i", str(int(part))) if isinstance(part, int) else ("s", part)
        data = text.encode()
        # type and length go in first, so that ("ab", "c") and ("a", "bc") cannot meet
        digest.update(f"{kind}{len(data)}:".encode() + data)
    return int.from_bytes(digest.digest(), "big") >> 1
