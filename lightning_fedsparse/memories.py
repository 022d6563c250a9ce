"""What clients remember between their rounds (residuals, buffers of their own), by client id.

A memory is the mapping of tensors and primitives that a client's callbacks gave at the end of its last round. It is kept in
the memory of this process (:class:`HeldMemories`) or in files
(:class:`~lightning_fedsparse.spilled_memories.SpilledMemories`), to the same result bit for bit.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

__all__ = ["ClientMemories", "HeldMemories", "Memory"]

Memory = Mapping[str, Any]


class ClientMemories(Mapping[str, Memory]):
    """Memories by client id."""

    @abstractmethod
    def start(self, run_folder: Path | None, *, fresh: bool, sweeps: bool = True) -> None:
        """Forget everything: a run begins.

        Args:
            run_folder: The run's folder, if it has one.
            fresh: Whether the run begins with round 0; else :meth:`load_state_dict` comes next.
            sweeps: Whether to clean up what a killed run left behind; of ranks that share a folder one does.
        """

    @abstractmethod
    def put(self, client_id: str, memory: Memory) -> None:
        """Replace what a client remembers."""

    def reference(self, client_id: str) -> Any | None:
        """What another rank needs to find a memory that is in a folder; None for one that is in this process."""
        return None

    def refer(self, client_id: str, reference: Any) -> None:
        """Take it that a rank has :meth:`put` a client's memory where ``reference`` says.

        Raises:
            NotImplementedError: Where memories are in processes, for which :meth:`reference` gives None.
        """
        raise NotImplementedError(f"{type(self).__name__} has memories of one process only")

    def end_round(self, done: int, sampled: Iterable[str]) -> list[str]:
        """``done`` rounds are over: give up what there is no room for.

        Args:
            done: Rounds done.
            sampled: The clients of the last one, in the order asked.

        Returns:
            Clients whose memory is lost.
        """
        return []

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """All memories, or where they are, as tensors and primitives for a checkpoint."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave."""

    def saved(self, rounds: Collection[int]) -> None:
        """A checkpoint with the last :meth:`state_dict` is on the disk.

        Args:
            rounds: Rounds done of every checkpoint that is kept, this one included.
        """


class HeldMemories(ClientMemories):
    """Memories in this process; every checkpoint holds a copy of all of them."""

    def __init__(self) -> None:
        self._memories: dict[str, Memory] = {}

    def __getitem__(self, client_id: str) -> Memory:
        return self._memories[client_id]

    def __iter__(self) -> Iterator[str]:
        return iter(self._memories)

    def __len__(self) -> int:
        return len(self._memories)

    def start(self, run_folder: Path | None, *, fresh: bool, sweeps: bool = True) -> None:
        """See :meth:`ClientMemories.start`."""
        self._memories = {}

    def put(self, client_id: str, memory: Memory) -> None:
        """See :meth:`ClientMemories.put`."""
        self._memories[client_id] = dict(memory)

    def state_dict(self) -> dict[str, Any]:
        """See :meth:`ClientMemories.state_dict`."""
        return {"memories": self._memories}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :meth:`ClientMemories.load_state_dict`.

        Raises:
            ValueError: If the memories are in files.
        """
        if state.get("memory_files", {}).get("files"):
            raise ValueError(
                "expected SpilledMemories for a checkpoint whose client memories are in files, got HeldMemories"
            )
        self._memories = dict(state["memories"])
