"""Where client rounds run."""

from lightning_fedsparse.executors.local import Executor, LocalExecutor
from lightning_fedsparse.executors.processes import ProcessExecutor

__all__ = ["Executor", "LocalExecutor", "ProcessExecutor"]
