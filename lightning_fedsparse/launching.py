"""What ``torchrun``, or another launcher of ``torch.distributed``, says to the processes that it starts."""

from __future__ import annotations

import os

__all__ = ["environment_local_rank", "environment_rank", "environment_size", "may_restart", "was_restarted"]


def environment_size() -> int:
    """How many ranks the launcher has started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def environment_rank() -> int:
    """Which of them this process is; 0 without a launcher."""
    return int(os.environ["RANK"]) if environment_size() > 1 and "RANK" in os.environ else 0


def environment_local_rank() -> int:
    """Which of those on its machine this process is."""
    return int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or environment_rank())


def was_restarted() -> bool:
    """Whether ``torchrun`` has started this process in the place of one that was lost."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0) > 0


def may_restart() -> bool:
    """Whether ``torchrun`` would do so."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS") or 0) > 0
