"""The arguments of :class:`~lightning_fedsparse.FederatedLoop`, checked and brought into the form that the loop uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl

from lightning_fedsparse.aggregation import Aggregator
from lightning_fedsparse.checkpointing import Checkpointing
from lightning_fedsparse.checks import has_end, require_a, require_lightning, require_trainer_arguments
from lightning_fedsparse.data import FederatedDataModule
from lightning_fedsparse.evaluation import Evaluation
from lightning_fedsparse.executors.local import Executor
from lightning_fedsparse.faults import FaultPolicy
from lightning_fedsparse.memories import ClientMemories
from lightning_fedsparse.screening import Screen
from lightning_fedsparse.wire import Wire

__all__ = ["fault_policy", "require_model_and_data", "require_parts", "trainer_arguments"]

_PARTS: dict[str, tuple[type, str]] = {
    "trainer": (Mapping, '{"max_epochs": 2}'),
    "callbacks": (Sequence, "feddip() or [MagnitudePruning(...)]"),
    "aggregator": (Aggregator, "MaskedMean()"),
    "executor": (Executor, "ProcessExecutor(workers=2)"),
    "faults": (FaultPolicy, "FaultPolicy(min_clients=2)"),
    "screen": (Screen, "Screen(norm=5.0)"),
    "evaluation": (Evaluation, 'Evaluation(split="test")'),
    "wire": (Wire, 'Wire(uploads="int8")'),
    "memories": (ClientMemories, "SpilledMemories()"),
    "checkpointing": (Checkpointing, "Checkpointing(every_n_rounds=5)"),
}


def require_parts(**parts: object) -> None:
    """Require each argument that is given to be of its class.

    Raises:
        TypeError: With an example of what is expected.
    """
    for name, given in parts.items():
        if given is not None:
            kind, example = _PARTS[name]
            require_a(kind, given, name, example)


def trainer_arguments(
    callbacks: Sequence[pl.Callback] | None, trainer: Mapping[str, Any] | None
) -> tuple[list[pl.Callback], dict[str, Any]]:
    """All callbacks, plain ones of the Trainer last, and the Trainer's other arguments; one epoch if they set no end.

    Raises:
        TypeError: If a callback is none.
        ValueError: For an argument that no Trainer has, or that a client's must not have.
    """
    arguments = dict(trainer or {})
    require_trainer_arguments(arguments)
    if not has_end(arguments):
        arguments["max_epochs"] = 1
    plain = arguments.pop("callbacks", None) or []
    together = [*(callbacks or []), *(plain if isinstance(plain, Sequence) else [plain])]
    for callback in together:
        require_lightning(callback, pl.Callback, "a callback")
    return together, arguments


def fault_policy(faults: FaultPolicy | None, aggregator: Aggregator | None, clients_per_round: int) -> FaultPolicy:
    """The policy, which asks for as many updates as the aggregator needs.

    Raises:
        ValueError: If a round's cohort is smaller than what either asks for.
    """
    policy = faults or FaultPolicy()
    policy.check(clients_per_round)
    if aggregator is None:
        return policy
    if aggregator.fewest > clients_per_round:
        raise ValueError(
            f"expected at least {aggregator.fewest} clients per round for {aggregator}, got {clients_per_round}"
        )
    return replace(policy, min_clients=max(policy.min_clients, aggregator.fewest))


def require_model_and_data(model: object, data: object) -> None:
    """Require what ``fit`` takes.

    Raises:
        TypeError: If ``model`` is no ``lightning.pytorch`` module or ``data`` is no ``FederatedDataModule``.
    """
    require_lightning(model, pl.LightningModule, "the model")
    if not isinstance(data, FederatedDataModule):
        raise TypeError(
            f"expected a FederatedDataModule, got {type(data).__name__}: wrap it, for example "
            "FederatedDataModule(datamodule, IidPartition(num_clients=10))"
        )
