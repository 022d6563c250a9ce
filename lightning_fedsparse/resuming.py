"""Whether a checkpoint is of this run: what has to agree, and what does not in one sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

import yaml
from torch import Tensor

if TYPE_CHECKING:
    from lightning_fedsparse.data import FederatedDataModule
    from lightning_fedsparse.loop import FederatedLoop

__all__ = ["flat", "recipe_of", "require_same_model", "require_same_run"]

FREE = ("rounds", "executor", "logger", "evaluation", "fresh_trainer", "checkpointing", "default_root_dir", "console")
"""Arguments of the loop that a resumed run may change: the rounds that are done would have been the same."""

_ARGUMENTS = (
    "clients_per_round",
    "callbacks",
    "trainer",
    "aggregator",
    "server_optimizer",
    "wire",
    "buffers",
    "seed",
    "threads",
)
_SHOWN = 3


def recipe_of(loop: FederatedLoop, data: FederatedDataModule) -> dict[str, Any]:
    """What a run's result follows from, by dotted key: its recipe.

    Without one, the loop's arguments; of callbacks and other objects that are no plain values, their classes.
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
    """Nested mappings, sequences and dataclasses as dotted keys and primitives; of any other object its class's name.

    Example:
        >>> flat({"loop": {"rounds": 3, "callbacks": [{"sparsity": 0.9}]}})
        {'loop.rounds': 3, 'loop.callbacks.0.sparsity': 0.9}
    """
    items: Sequence[tuple[Any, Any]]
    if isinstance(value, Mapping):
        items = list(value.items())
    elif isinstance(value, list | tuple):
        items = list(enumerate(value))
    elif is_dataclass(value) and not isinstance(value, type):
        items = [(field.name, getattr(value, field.name)) for field in fields(value)]
    elif value is None or isinstance(value, bool | int | float | str):
        return {key: value}
    else:
        kind = value if hasattr(value, "__qualname__") else type(value)
        return {key: f"{kind.__module__}.{kind.__qualname__}"}
    return {name: leaf for part, inner in items for name, leaf in flat(inner, f"{key}.{part}".lstrip(".")).items()}


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
