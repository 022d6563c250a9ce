"""A model that dies of pruning, said while it happens.

Global magnitude pruning may take all weights of a layer, or so many that what differs between inputs fades on its way to the
output: training then finds constant outputs only, and where zeros are absorbing nothing comes back. Two signs are watched:

- a prunable weight that is all zero;
- ``output_variation``, logged per round of a federation: how much the output of the last prunable layer differs between the
  examples of a client's first training batch, ``norm(y - mean(y)) / norm(y)``, mean over the clients. Below 0.01 for every
  client, which is never the case for a model that has learned something, the output is as good as constant.

The first sign of either kind is one warning with the remedies; put the callback after those that prune. In a plain Trainer
the weights are looked at when ``fit`` ends.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_fedsparse.callbacks.base import SparsityCallback
from lightning_fedsparse.prunable import prunable_parameters
from lightning_fedsparse.rounds import ServerRound, Total
from lightning_fedsparse.server import ServerState
from lightning_fedsparse.update import SparseUpdate

__all__ = ["CollapseMonitor", "output_variation"]

_METRIC = "output_variation"
# LeNet-5 on Fashion-MNIST: 0.06 at its initialization, 0.9 once it has learned; 0.0004 dead after a cut to 95 %
_LEAST_VARIATION = 0.01


@torch.no_grad()
def output_variation(output: Tensor) -> float:
    """How much outputs differ between examples: ``norm(y - mean(y)) / norm(y)``, 0 for outputs that are all zero.

    Args:
        output: Floating-point tensor, examples in the first dimension.

    Example:
        >>> output_variation(torch.tensor([[3.0, 0.0], [3.0, 0.0]]))
        0.0
    """
    y = output.detach().float()
    scale = float(y.norm())
    return float((y - y.mean(0)).norm()) / scale if scale > 0 else 0.0


class CollapseMonitor(SparsityCallback):
    """Warn once when a layer has lost all its weights, or the model's output no longer depends on its input.

    Args:
        include: Globs of parameter names to watch instead of all convolution and linear weights.
        exclude: Globs of parameter names to leave out.
    """

    def __init__(self, *, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> None:
        super().__init__()
        self.include = tuple(include)
        self.exclude = tuple(exclude)
        self._names: list[str] = []
        self._handles: list[RemovableHandle] = []
        self._output: Tensor | None = None
        self._variation: float | None = None
        self._reported = _nothing_reported()
        self._key = self._generate_state_key(include=self.include, exclude=self.exclude)

    @property
    def state_key(self) -> str:
        """Tells instances with other selections apart."""
        return self._key

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._forget()
        if self.client_round is None:
            weights = prunable_parameters(pl_module, self.include, exclude=self.exclude)
            if dead := _all_zero(weights):
                _warn(f"no weight is left in {', '.join(dead)}")

    # -- on a client -----------------------------------------------------------------------------------------------

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.client_round is not None:
            for name in prunable_parameters(pl_module, self.include, exclude=self.exclude):
                layer = pl_module.get_submodule(name.rpartition(".")[0])
                self._handles.append(layer.register_forward_hook(self._see))

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._output is not None:
            self._variation = output_variation(self._output)
        self._forget()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._forget()

    @override
    def on_client_round_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, update: SparseUpdate
    ) -> SparseUpdate:
        if self._variation is None:
            return update
        return replace(update, metrics={**update.metrics, _METRIC: self._variation})

    def _see(self, layer: nn.Module, args: Any, output: Any) -> None:
        # what was last seen when the batch ends is the output of the last layer
        one_example = not isinstance(output, Tensor) or output.ndim < 2 or len(output) < 2
        self._output = None if one_example or not layer.training else output.detach()

    def _forget(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._output = None

    # -- on the server ---------------------------------------------------------------------------------------------

    @override
    def on_server_start(self, pl_module: pl.LightningModule, state: ServerState, seed: int) -> ServerState:
        self._names = list(prunable_parameters(pl_module, self.include, exclude=self.exclude))
        self._reported = _nothing_reported()
        return state

    @override
    def on_server_receive(self, state: ServerState, server_round: ServerRound, update: SparseUpdate) -> None:
        variation = update.metrics.get(_METRIC, math.nan)
        if math.isfinite(variation):  # a client's word
            self._reported += torch.tensor([variation, 1.0, variation >= _LEAST_VARIATION])

    @override
    def on_server_received(self, state: ServerState, server_round: ServerRound, total: Total) -> None:
        self._reported = total({_METRIC: self._reported})[_METRIC]

    @override
    def on_server_round_end(self, state: ServerState, server_round: ServerRound) -> ServerState:
        sum_reported, reported, alive = self._reported.tolist()
        self._reported = _nothing_reported()
        if reported:
            server_round.metrics[_METRIC] = sum_reported / reported
        sign = None
        if dead := _all_zero({name: state.weights[name] for name in self._names}):
            sign = f"no weight is left in {', '.join(dead)} after round {server_round.index + 1}"
        elif reported and not alive and server_round.index > 0:
            # before the first round nothing was pruned
            sign = f"the model's output hardly depends on its input any more after round {server_round.index}"
        # with the state, so that a run that was resumed says it once too
        if sign is not None and self.state_key not in state.methods:
            state.methods[self.state_key] = sign
            _warn(sign)
        return state


def _nothing_reported() -> Tensor:
    """Sum of the variations that clients report, how many do, and of how many the output is not as good as constant."""
    return torch.zeros(3, dtype=torch.float64)


def _all_zero(weights: Mapping[str, Tensor]) -> list[str]:
    return [name for name, weight in weights.items() if not bool(weight.detach().any())]


def _warn(sign: str) -> None:
    warnings.warn(
        f"{sign}: pruning may have killed the model for good. Let the sparsity grow over the run (ramp=0.5 in sparsyfed), "
        "keep a share of each layer (layer_floor=0.01), lower the sparsity, or try another learning rate",
        stacklevel=3,
    )
