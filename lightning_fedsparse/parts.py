"""Who holds which examples, in two arrays however many clients there are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from lightning_fedsparse.partition import Indices

__all__ = ["Parts"]


class Parts(Mapping[str, Indices]):
    """Indices into a data set by client id; a client's are cut out when it is looked up.

    A hundred thousand arrays of a few numbers each take longer to send to a worker process than the data themselves.

    Args:
        parts: What a partition returned: int64 indices by client id, each of shape (examples of the client,).
    """

    def __init__(self, parts: Mapping[str, Indices]) -> None:
        self._positions = {client_id: position for position, client_id in enumerate(parts)}
        self._bounds = np.cumsum([0, *(part.size for part in parts.values())])
        self._indices = np.concatenate([np.empty(0, np.int64), *parts.values()])

    @property
    def sizes(self) -> dict[str, int]:
        """How many examples each client has."""
        return dict(zip(self._positions, np.diff(self._bounds).tolist(), strict=True))

    def __getitem__(self, client_id: str) -> Indices:
        position = self._positions[client_id]
        return self._indices[self._bounds[position] : self._bounds[position + 1]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._positions)

    def __len__(self) -> int:
        return len(self._positions)
