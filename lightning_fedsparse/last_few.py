"""What was made for the last few keys, so that it need not be made again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

__all__ = ["LastFew"]

Value = TypeVar("Value")


class LastFew(Generic[Value]):
    """Values by key, of which the least recently used are forgotten.

    Args:
        size: Values to keep, at least 1.

    Example:
        >>> lengths = LastFew(1)
        >>> lengths.get("ab", lambda: 2), lengths.get("ab", lambda: 3), lengths.get("c", lambda: 1)
        (2, 2, 1)
        >>> lengths.get("ab", lambda: 4)
        4
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._values: OrderedDict[Hashable, Value] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value of a key, made if it is not there; whatever ``make`` raises passes, and nothing is kept."""
        value = self._values.pop(key) if key in self._values else make()
        self._values[key] = value
        if len(self._values) > self._size:
            self._values.popitem(last=False)
        return value

    def clear(self) -> None:
        """Forget all."""
        self._values.clear()
