"""Sparsity in the logs: of the model and of each layer, when it changes.

Logs ``sparsity`` (fraction of zeros among the watched weights as forward uses them) and ``sparsity/LAYER``: in a plain
Trainer at epoch ends through the module's ``log``, so that loggers, progress bars and ``ModelCheckpoint`` see it; in a
federation per round, into the round's record. Values that did not change are not logged again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import lightning.pytorch as pl
from torch import Tensor
from typing_extensions import override

from lightning_fedsparse.callbacks.base import SparsityCallback
from lightning_fedsparse.effective import EffectiveWeights
from lightning_fedsparse.prunable import prunable_parameters
from lightning_fedsparse.rounds import ServerRound
from lightning_fedsparse.server import ServerState

__all__ = ["SparsityMonitor", "zero_fractions"]


def zero_fractions(weights: Mapping[str, Tensor]) -> dict[str, float]:
    """Fraction of exact zeros of all weights together (``"sparsity"``) and of each (``"sparsity/NAME"``).

    Args:
        weights: Weights by name, at least one.
    """
    zeros = {name: weight.numel() - int(weight.count_nonzero()) for name, weight in weights.items()}
    total = sum(weight.numel() for weight in weights.values())
    return {
        "sparsity": sum(zeros.values()) / total,
        **{f"sparsity/{name}": zeros[name] / weight.numel() for name, weight in weights.items()},
    }


def changed_values(values: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
    """Entries that are new or differ from before."""
    return {name: value for name, value in values.items() if before.get(name) != value}


class SparsityMonitor(SparsityCallback):
    """Log the sparsity of the model and of its layers; put it last, so that it sees what other callbacks did.

    Args:
        include: Globs of parameter names to watch instead of all convolution and linear weights.
        exclude: Globs of parameter names to leave out.
    """

    def __init__(self, *, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> None:
        super().__init__()
        self.include = tuple(include)
        self.exclude = tuple(exclude)
        self._names: list[str] = []
        self._logged: dict[str, float] = {}
        self._key = self._generate_state_key(include=self.include, exclude=self.exclude)

    @property
    def state_key(self) -> str:
        """Tells instances with other selections apart."""
        return self._key

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._names = list(prunable_parameters(pl_module, self.include, exclude=self.exclude))
        self._logged = {}

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.client_round is not None:
            return  # the server's masks are what counts in a federation
        engine = EffectiveWeights.of(pl_module)
        engine.swap_in()
        parameters = dict(pl_module.named_parameters())
        fractions = zero_fractions({name: parameters[name].detach() for name in self._names})
        engine.swap_out()
        for name, value in changed_values(fractions, self._logged).items():
            pl_module.log(name, value)
            self._logged[name] = value

    @override
    def on_server_start(self, pl_module: pl.LightningModule, state: ServerState, seed: int) -> ServerState:
        self._names = list(prunable_parameters(pl_module, self.include, exclude=self.exclude))
        return state

    @override
    def on_server_round_end(self, state: ServerState, server_round: ServerRound) -> ServerState:
        fractions = zero_fractions({name: state.weights[name] for name in self._names})
        del fractions["sparsity"]  # the record has the masks' own
        # with the state, so that a resumed run logs what an uninterrupted one would
        logged = state.methods.get(self.state_key, {})
        server_round.metrics.update(changed_values(fractions, logged))
        state.methods[self.state_key] = fractions
        return state
