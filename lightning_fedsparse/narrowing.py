"""What clients that can hold less get of a broadcast."""

from __future__ import annotations

from collections.abc import Callable, Hashable

from lightning_fedsparse.update import SparseUpdate

__all__ = ["NarrowedBroadcasts"]


class NarrowedBroadcasts:
    """A round's broadcasts, each made once: clients that get the same get one object, which is encoded once."""

    def __init__(self) -> None:
        self._whole: SparseUpdate | None = None
        self._of: dict[Hashable, SparseUpdate] = {}

    def __reduce__(self) -> tuple[type[NarrowedBroadcasts], tuple[()]]:
        """Copy and pickle it empty: a round's broadcasts are of no use elsewhere."""
        return NarrowedBroadcasts, ()

    def get(self, whole: SparseUpdate, key: Hashable, make: Callable[[], SparseUpdate]) -> SparseUpdate:
        """What clients of this key get.

        Args:
            whole: The round's broadcast; another one begins another round.
            key: What tells these clients from others, such as their capacity.
            make: Narrows the broadcast for them.
        """
        if whole is not self._whole:
            self._whole, self._of = whole, {}
        if key not in self._of:
            self._of[key] = make()
        return self._of[key]
