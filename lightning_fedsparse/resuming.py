"""Whether a checkpoint is of this run: what has to agree, and what does not in one sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from functools import partial
from inspect import signature
from typing import TYPE_CHECKING, Any

import yaml
from torch import Tensor

if TYPE_CHECKING:
    from lightning_fedsparse.data import FederatedDataModule
    from lightning_fedsparse.loop import FederatedLoop

__all__ = ["flat", "recipe_of", "require_same_model", "require_same_run"]

FREE = (
    "rounds",
    "executor",
    "faults",
    "memories",
    "logger",
    "evaluation",
    "fresh_trainer",
    "checkpointing",
    "default_root_dir",
    "console",
    "rank_timeout",
)
"""Arguments of the loop that a resumed run may change: the rounds that are done would have been the same. But for three:

- ``rounds``: schedules over the run are stretched to the new end, so the result is not that of a run started with that number;
- ``faults`` and a quota of ``memories``: a run that ended because too few clients returned, or that gives up memories, must be
  able to go on, and each record says how its round came about.
"""

_ARGUMENTS = (
    "clients_per_round",
    "callbacks",
    "trainer",
    "aggregator",
    "server_optimizer",
    "wire",
    "screen",
    "buffers",
    "seed",
    "threads",
)
_SHOWN = 3


def recipe_of(loop: FederatedLoop, data: FederatedDataModule) -> dict[str, Any]:
    """What a run's result follows from, by dotted key: its recipe.

    Without one, the loop's arguments; of callbacks and other objects, their classes and the arguments that they keep.
    """
    if loop.recipe is not None:
        return flat(yaml.safe_load(loop.recipe))
    arguments = {name: getattr(loop, name) for name in _ARGUMENTS}
    return flat({"arguments": {**arguments, "data": data, "clients": len(data.client_ids)}})


def require_same_run(saved: Mapping[str, Any], recipe: Mapping[str, Any], rounds: int) -> None:
    """Require a checkpoint to be of this run.

    Args:
        saved: The checkpoint's content.
        recipe: This run's, as :func:`recipe_of` gives it.
        rounds: Of this run.

    Raises:
        ValueError: If its recipe differs in more than :data:`FREE` arguments, naming the keys with the values of both, or
            if it has done more rounds.
    """
    _require_same_recipe(saved["recipe"], recipe)
    if saved["round"] > rounds:
        raise ValueError(f"expected at least {saved['round']} rounds, as many as the checkpoint has done, got {rounds}")


def require_same_model(saved: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Require a checkpoint's tensors to have the names, dtypes and shapes of this model's.

    Raises:
        ValueError: Naming the first tensor that differs.
    """
    for name in sorted(saved.keys() | own.keys()):
        there, here = _signature(saved.get(name)), _signature(own.get(name))
        if there != here:
            raise ValueError(
                f"expected a checkpoint of this model, got another's: {name!r} is {here} in the model and {there} in the "
                "checkpoint"
            )


def flat(value: Any, key: str = "") -> dict[str, Any]:
    """Nested mappings and sequences as dotted keys and primitives; of an object its class, and its constructor's arguments.

    Example:
        >>> flat({"loop": {"rounds": 3, "callbacks": [{"sparsity": 0.9}]}})
        {'loop.rounds': 3, 'loop.callbacks.0.sparsity': 0.9}
    """
    own: dict[str, Any] = {}
    items: Sequence[tuple[Any, Any]]
    if isinstance(value, Mapping):
        items = list(value.items())
    elif isinstance(value, list | tuple):
        items = list(enumerate(value))
    elif value is None or isinstance(value, bool | int | float | str):
        return {key: _as_primitive(value)}
    else:
        kind = value if hasattr(value, "__qualname__") else type(value)
        own = {key: f"{kind.__module__}.{kind.__qualname__}"}
        items = _kept_arguments(value)
    return own | {
        name: leaf for part, inner in items for name, leaf in flat(inner, f"{key}.{part}".lstrip(".")).items()
    }


def _as_primitive(value: bool | float | str | None) -> bool | float | str | None:
    """The value without a class of its own, such as an enumeration's or NumPy's: a checkpoint does not load those."""
    return next((kind(value) for kind in (bool, int, float, str) if isinstance(value, kind)), None)


def _kept_arguments(value: Any) -> list[tuple[str, Any]]:
    """Arguments of an object's constructor that it keeps under their names and that are plain values or dataclasses."""
    if isinstance(value, partial):
        return [
            ("function", value.func),
            *((str(place), given) for place, given in enumerate(value.args)),
            *value.keywords.items(),
        ]
    try:
        names = signature(type(value)).parameters
    except (TypeError, ValueError):  # of a class without a readable signature, as some of other languages
        return []
    kept = getattr(value, "__dict__", {})
    return [(name, kept[name]) for name in names if name in kept and _is_plain(kept[name])]


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str) or is_dataclass(value)


def _require_same_recipe(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    # a section, the first part of a key, may be missing: a run from Python has no recipe file
    sections = {_section(key) for key in saved} & {_section(key) for key in own}
    different = [
        key
        for key in dict.fromkeys([*own, *saved])
        if _section(key) in sections and not _is_free(key) and saved.get(key) != own.get(key)
    ]
    if different:
        shown = ", ".join(f"{key}: {saved.get(key)!r} -> {own.get(key)!r}" for key in different[:_SHOWN])
        more = f" and {len(different) - _SHOWN} more" if len(different) > _SHOWN else ""
        raise ValueError(
            f"expected the recipe that the checkpoint was made with, got another: {shown}{more}; a run that goes on may "
            f"change {', '.join(FREE)}, for anything else start a new one"
        )


def _section(key: str) -> str:
    return key.partition(".")[0]


def _is_free(key: str) -> bool:
    section, _, rest = key.partition(".")
    return section in ("loop", "arguments") and rest.partition(".")[0] in FREE


def _signature(tensor: Tensor | None) -> str:
    if tensor is None:
        return "absent"
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
