"""A Trainer that says nothing, on one device: one client among thousands needs no banner, bar, table or folder."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar

from lightning.pytorch.profilers import PassThroughProfiler
from typing_extensions import override

__all__ = ["QUIET_TRAINER", "NoProfiler", "quiet_lightning"]


class NoProfiler(PassThroughProfiler):
    """Times nothing, and costs next to nothing: Lightning's own makes a new context for each of a step's seventy spans."""

    _nothing: ClassVar[AbstractContextManager[None]] = nullcontext()

    @override
    def profile(self, action_name: str) -> AbstractContextManager[None]:  # type: ignore[override]  # narrower there
        return self._nothing

    def __reduce__(self) -> tuple[type[NoProfiler], tuple[()]]:
        return NoProfiler, ()  # without the weak reference that a Trainer hangs on it, which can't be pickled


# What the user's own Trainer arguments override.
QUIET_TRAINER: Mapping[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "limit_val_batches": 0,
    "profiler": NoProfiler(),
    "devices": 1,  # of several, Lightning would make one distributed training for each client
}

_LOGGERS = tuple(
    logging.getLogger(name) for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators.cuda")
)
_ADVICE = (
    ".*does not have many workers.*",  # client data are small and in memory: workers would cost more than they give
    ".*is smaller than the logging interval.*",
    ".*but have no `val_dataloader`.*",
    ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",  # Lightning's own call of torch
    ".*limit_val_batches.*",
    ".*already configured with model summary.*",
    ".*Checkpoint directory .* exists and is not empty.*",
)


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Silence Lightning's banners, tips and its advice about loaders; errors and other warnings pass."""

    def is_error(record: logging.LogRecord) -> bool:  # one of its own for each, as these contexts nest
        return record.levelno >= logging.ERROR

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="|".join(_ADVICE))  # one filter: they are set anew for every client
        try:
            for logger in _LOGGERS:
                logger.addFilter(is_error)  # setting levels would clear the caches of all loggers there are
            yield
        finally:
            for logger in _LOGGERS:
                logger.removeFilter(is_error)
