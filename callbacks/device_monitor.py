"""What a training step costs the device, in the logs: multiply-adds, bytes of parameters, bytes of activations.

Measured on the first batch of each epoch of a plain Trainer, logged at its end through the module's ``log``; on the first
batch of each client's round in a federation, the mean over the clients in the round's record:

- ``device/macs``, ``device/dense_macs``: multiply-adds of the convolution and linear layers that were called, forward and
  backward: theoretical at their densities, and as dense kernels really do them (``device_costs.py`` has the formula);
- ``device/parameter_bytes``, ``device/dense_parameter_bytes``: parameters as values and one bit per position,
  theoretical, and as the dense tensors that torch holds;
- ``device/activation_bytes``: the most that autograd held for the backward pass at once, measured.

Where clients of different capacity take part, each level has its own mean besides, as ``device/macs@0.25``.

The theoretical figures are for hardware that skips zeros. On this one unstructured masks save no time, and training holds
dense weights (twice, while a batch is in, where a method changes them); ``ActivationPruning`` really saves activations.
Every upload carries the figures: about 150 bytes more.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_fedsparse.activations import PrunedActivation, SavedActivation
from lightning_fedsparse.callbacks.base import SparsityCallback
from lightning_fedsparse.device_costs import LayerCost, product_macs, saved_bytes, sparse_bytes
from lightning_fedsparse.prunable import PRUNABLE_LAYERS
from lightning_fedsparse.rounds import ServerRound, Total
from lightning_fedsparse.server import ServerState
from lightning_fedsparse.update import SparseUpdate

__all__ = ["DeviceMonitor"]

_PREFIX = "device/"
_CAPACITY = "device/capacity"


class DeviceMonitor(SparsityCallback):
    """Log what a training step costs the device; put it last, so that it sees what other callbacks did."""

    def __init__(self) -> None:
        super().__init__()
        self._measured: dict[str, float] = {}
        self._meter: saved_bytes | None = None
        self._handles: list[RemovableHandle] = []
        self._calls: list[LayerCost] = []
        self._nonzeros: dict[int, int] = {}
        self._before: set[SavedActivation] = set()
        # by name and capacity, as they are logged: the clients' figures added up, and how many there are
        self._reported: dict[str, Tensor] = {}

    # -- around the first batch --------------------------------------------------------------------------------------

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._measured = {}

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx > 0 or (self.client_round is not None and self._measured):
            return
        self._stop()
        for layer in pl_module.modules():
            if isinstance(layer, PRUNABLE_LAYERS):
                self._handles.append(layer.register_forward_pre_hook(self._enter))
                self._handles.append(layer.register_forward_hook(self._leave))
        self._meter = saved_bytes(pl_module.parameters())
        self._meter.__enter__()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._meter is None:
            return
        parameters = dict(pl_module.named_parameters())
        nonzeros = {name: self._nonzeros[id(p)] for name, p in parameters.items() if id(p) in self._nonzeros}
        self._measured = {
            "device/macs": sum(call.step_macs for call in self._calls),
            "device/dense_macs": sum(call.dense_step_macs for call in self._calls),
            "device/parameter_bytes": sparse_bytes(parameters, nonzeros),
            "device/dense_parameter_bytes": sum(p.nbytes for p in parameters.values()),
            "device/activation_bytes": self._meter.peak,
        }
        self._stop()

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop()  # on_train_batch_start may have returned -1, which leaves out on_train_batch_end
        if self.client_round is None and self._measured:
            pl_module.log_dict(self._measured)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._meter is not None:
            self._meter.__exit__(None, None, None)
        self._meter = None
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._calls.clear()
        self._nonzeros.clear()
        self._before.clear()

    def _enter(self, layer: nn.Module, args: Any) -> None:
        self._before = set(SavedActivation.live)

    def _leave(self, layer: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
        if not (layer.training and torch.is_grad_enabled() and args):
            return
        weight = layer.weight
        assert isinstance(weight, nn.Parameter)
        if id(weight) not in self._nonzeros:
            self._nonzeros[id(weight)] = int(weight.count_nonzero())
        new = set(SavedActivation.live) - self._before
        kept = [saved.density for saved in new if isinstance(saved, PrunedActivation)]
        self._calls.append(
            LayerCost(
                product_macs(layer, args[0], y),
                weight_density=self._nonzeros[id(weight)] / weight.numel(),
                activation_density=kept[0] if kept else 1.0,
                input_gradient=args[0].requires_grad,
                weight_gradient=weight.requires_grad,
            )
        )
        assert self._meter is not None
        self._meter.look()

    # -- in a federation ---------------------------------------------------------------------------------------------

    @override
    def on_client_round_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, update: SparseUpdate
    ) -> SparseUpdate:
        assert self.client_round is not None
        capacity = {} if self.client_round.capacity is None else {_CAPACITY: self.client_round.capacity}
        return replace(update, metrics={**update.metrics, **self._measured, **capacity})

    @override
    def on_server_start(self, pl_module: pl.LightningModule, state: ServerState, seed: int) -> ServerState:
        self._reported = {}
        return state

    @override
    def on_server_receive(self, state: ServerState, server_round: ServerRound, update: SparseUpdate) -> None:
        figures = {name: value for name, value in update.metrics.items() if name.startswith(_PREFIX)}
        if all(math.isfinite(value) for value in figures.values()):  # a client's word
            capacity = figures.pop(_CAPACITY, 1.0)
            for name, value in figures.items():
                _add(self._reported, f"{name}@{capacity:g}", torch.tensor([value, 1.0], dtype=torch.float64))

    @override
    def on_server_received(self, state: ServerState, server_round: ServerRound, total: Total) -> None:
        self._reported = total(self._reported)

    @override
    def on_server_round_end(self, state: ServerState, server_round: ServerRound) -> ServerState:
        shown: dict[str, Tensor] = {}
        for key, figures in self._reported.items():
            _add(shown, key.rpartition("@")[0], figures)
        if len({key.rpartition("@")[2] for key in self._reported}) > 1:
            shown |= self._reported
        server_round.metrics.update({name: float(figures[0] / figures[1]) for name, figures in shown.items()})
        self._reported = {}
        return state


def _add(sums: dict[str, Tensor], name: str, term: Tensor) -> None:
    sums[name] = sums[name] + term if name in sums else term
