"""Checks of what a user passes in, each one sentence."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import SingleDeviceStrategy

__all__ = ["has_end", "require_a", "require_at_least_one", "require_lightning", "require_trainer_arguments"]


def require_a(kind: type, value: object, what: str, example: str) -> None:
    """Require an instance of one of this package's classes, where something simpler is an obvious guess.

    Raises:
        TypeError: With an example of what is expected.
    """
    if not isinstance(value, kind):
        raise TypeError(f"expected {what} of type {kind.__name__}, such as {example}, got {type(value).__name__}")


def require_at_least_one(**values: int) -> None:
    """Require counts of at least 1.

    Raises:
        ValueError: Naming the first that is smaller.
    """
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"expected {name} to be at least 1, got {value}")


def require_lightning(value: object, kind: type, what: str) -> None:
    """Require an instance of a ``lightning.pytorch`` class.

    ``lightning.pytorch`` and ``pytorch_lightning`` are two copies of the same code, and ``isinstance`` fails across.

    Raises:
        TypeError: Saying so if the value is of the other copy's class.
    """
    if isinstance(value, kind):
        return
    if any(base.__module__.partition(".")[0] == "pytorch_lightning" for base in type(value).__mro__):
        raise TypeError(
            f"expected {what} built on lightning.pytorch, got {type(value).__name__} built on pytorch_lightning: "
            "import lightning.pytorch instead"
        )
    raise TypeError(f"expected {what} to be a lightning.pytorch {kind.__name__}, got {type(value).__name__}")


def require_trainer_arguments(arguments: Mapping[str, Any]) -> None:
    """Require keyword arguments of ``lightning.pytorch.Trainer`` that train a client in one process, and to an end.

    Raises:
        ValueError: Naming the first unknown one and the near matches, or what spreads a fit over processes or never ends it.
    """
    known = list(inspect.signature(pl.Trainer.__init__).parameters)[1:]
    for name in arguments:
        if name not in known:
            near = get_close_matches(name, known, n=3)
            hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise ValueError(f"expected an argument of lightning.pytorch.Trainer, got {name!r}{hint}")
    # one fit in several processes would start the user's script anew in each of them, or wait for them for ever
    devices = arguments.get("devices", 1)
    if devices not in (1, "1") and not (isinstance(devices, list | tuple) and len(devices) == 1):
        raise ValueError(
            f"expected one device for a client's Trainer, such as devices=1 or devices=[0], got {devices!r}"
        )
    if arguments.get("num_nodes", 1) != 1:
        raise ValueError(f"expected a client's Trainer on one node, got num_nodes={arguments['num_nodes']!r}")
    strategy = arguments.get("strategy", "auto")
    if strategy != "auto" and not isinstance(strategy, SingleDeviceStrategy):
        raise ValueError(
            f"expected strategy='auto' or a SingleDeviceStrategy for a client's Trainer, which is one process, got {strategy!r}"
        )
    if arguments.get("max_epochs") == -1 and not has_end({**arguments, "max_epochs": None}):
        raise ValueError("expected an end of each client's training, got max_epochs=-1 without max_steps or max_time")


def has_end(arguments: Mapping[str, Any]) -> bool:
    """Whether a Trainer's arguments say after how many epochs or steps, or after what time, its fit ends."""
    return (
        arguments.get("max_epochs") is not None
        or arguments.get("max_steps") not in (None, -1)
        or arguments.get("max_time") is not None
    )
