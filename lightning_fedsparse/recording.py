"""What becomes of a round's record, and of the checkpoint behind it: the first rank keeps them, for all.

A checkpoint of several ranks is one of a single process: what clients remember is gathered for it, and dealt out again when a
run goes on, with whatever number of ranks. So no other rank needs a folder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from lightning_fedsparse.console import Console
from lightning_fedsparse.federation import Federation
from lightning_fedsparse.launching import was_restarted
from lightning_fedsparse.memories import ClientMemories
from lightning_fedsparse.ranks import Ranks
from lightning_fedsparse.records import RoundRecord
from lightning_fedsparse.resuming import require_same_run
from lightning_fedsparse.run_folder import RunFolder
from lightning_fedsparse.sharding import Shards

__all__ = ["Recorder"]


class Recorder:
    """Shows, logs and saves; on a rank that is not the first it only takes part in that.

    Args:
        folder: The run's folder.
        loggers: Get every round's scalars.
        console: Shows rows.
        memories: What clients remember.
        ranks: The processes of the run.
        shards: Who of them has which client's memory.
    """

    def __init__(
        self,
        folder: RunFolder,
        loggers: Sequence[Logger],
        console: Console,
        memories: ClientMemories,
        ranks: Ranks,
        shards: Shards,
    ) -> None:
        first = ranks.rank == 0
        self.folder = folder if first else RunFolder(None, folder.checkpointing)
        self.console = console if first else Console(0, quiet=True)
        self._loggers = loggers if first else []
        self._memories = memories
        self._ranks = ranks
        self._shards = shards

    def locked(self) -> AbstractContextManager[None]:
        """Hold the folder against other runs."""
        return self.folder.locked()

    def restore(
        self, ckpt_path: str | Path | None, federation: Federation, recipe: Mapping[str, Any], rounds: int
    ) -> list[RoundRecord]:
        """Bring a federation to where the run starts; nothing is written before all of a checkpoint fits.

        Args:
            ckpt_path: As ``FederatedLoop.fit`` takes it; a process that ``torchrun`` has started again goes on from what its
                folder has.
            federation: Takes what a checkpoint holds, but of the clients' memories only this rank's part.
            recipe: Of this run, which the checkpoint's has to agree with.
            rounds: Of this run.

        Returns:
            The records so far; none for a run that starts anew.
        """
        restarted = any(self._ranks.share(was_restarted()))  # on several machines not all are told
        saved = None
        if self._ranks.rank == 0:
            if restarted and self.folder.path is not None and (ckpt_path is None or self.folder.saved):
                ckpt_path = "last"
            if ckpt_path is None:
                self.folder.start()
            else:
                saved = self.folder.load(ckpt_path)
        path, fresh = self._ranks.share((self.folder.path, saved is None))[0]
        self._memories.start(path, fresh=fresh, sweeps=self._ranks.rank == 0)
        parts = [
            saved and {**saved, "memories": self._shards.part(saved["memories"], rank)}
            for rank in range(self._ranks.size)
        ]
        part = self._ranks.deal(parts)
        if part is not None:
            require_same_run(part, recipe, rounds)
            federation.load_state_dict(part)
        self._shards.start()
        history = [] if saved is None or ckpt_path is None else self.folder.go_on(saved, ckpt_path)
        return list(self._ranks.share(history)[0])

    def keep(self, history: Sequence[RoundRecord], total: int, content: Callable[[], Mapping[str, Any]]) -> None:
        """Show and log the last record, and save a checkpoint if it is time.

        Args:
            history: The records so far.
            total: Rounds of the run.
            content: Makes what a checkpoint holds beside its row of the history, but for other ranks' memories.
        """
        record = history[-1]
        self.folder.append(record)
        for logger in self._loggers:
            logger.log_metrics(record.scalars, step=record.round)
        self.console.row(record)
        if not self._ranks.share(self.folder.is_due(record.round, total))[0]:
            return
        # memories in files are on the disk once their rank has given its state
        own = content()
        held = self._ranks.gather(own["memories"])
        memories = {client_id: memory for part in held for client_id, memory in part.items()}
        kept = self.folder.save(history, total, lambda: {**own, "memories": memories})
        if kept:
            self._memories.saved(kept)  # on the first rank before the others, which may write the next memories
        kept = self._ranks.share(kept)[0]
        if self._ranks.rank:
            self._memories.saved(kept)
