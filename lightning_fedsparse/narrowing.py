"""What clients that can hold less get of a broadcast."""

from __future__ import annotations

from collections.abc import Callable

from lightning_fedsparse.update import SparseUpdate

__all__ = ["NarrowedBroadcasts"]


class NarrowedBroadcasts:
    """A round's broadcasts by capacity, each made once: clients of one capacity get one object, which is encoded once."""

    def __init__(self) -> None:
        self._whole: SparseUpdate | None = None
        self._of: dict[float, SparseUpdate] = {}

    def get(self, whole: SparseUpdate, capacity: float, make: Callable[[], SparseUpdate]) -> SparseUpdate:
        """What clients of this capacity get.

        Args:
            whole: The round's broadcast; another one begins another round.
            capacity: Of the client.
            make: Narrows the broadcast to this capacity.
        """
        if whole is not self._whole:
            self._whole, self._of = whole, {}
        if capacity not in self._of:
            self._of[capacity] = make()
        return self._of[capacity]
