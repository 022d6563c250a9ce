"""Masks in the logs of a federation: how far clients and rounds agree, what returns and what leaves.

Per round it adds to the record:

- ``mask_agreement/clients``: intersection over union of the clients' supports, over all pairs;
- ``mask_agreement/rounds``: that of the global supports before and after the round;
- ``regrowth/activated``, ``regrowth/deactivated``: weights that a client brought back from zero, and weights that it
  dropped, against what it received; means over the clients.

A round whose broadcast is dense has nothing to compare with: only the clients' agreement is logged. Put it after the
callbacks that move masks. It acts in a federation only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import lightning.pytorch as pl
from torch import Tensor
from typing_extensions import override

from lightning_fedsparse.callbacks.base import SparsityCallback
from lightning_fedsparse.metrics import MaskAgreement, WeightRegrowth
from lightning_fedsparse.prunable import prunable_parameters
from lightning_fedsparse.rounds import ServerRound, Total
from lightning_fedsparse.server import ServerState
from lightning_fedsparse.update import SparseUpdate

__all__ = ["MaskMonitor"]


class MaskMonitor(SparsityCallback):
    """Log mask agreement and regrowth of every round.

    Args:
        include: Globs of parameter names to watch instead of all convolution and linear weights.
        exclude: Globs of parameter names to leave out.
    """

    def __init__(self, *, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> None:
        super().__init__()
        self.include = tuple(include)
        self.exclude = tuple(exclude)
        self._names: list[str] = []
        self._before: dict[str, Tensor | None] = {}
        self._agreement = MaskAgreement()
        self._regrowth = WeightRegrowth()
        self._key = self._generate_state_key(include=self.include, exclude=self.exclude)

    @property
    def state_key(self) -> str:
        """Tells instances with other selections apart."""
        return self._key

    @override
    def on_server_start(self, pl_module: pl.LightningModule, state: ServerState, seed: int) -> ServerState:
        self._names = list(prunable_parameters(pl_module, self.include, exclude=self.exclude))
        self._reset()
        return state

    @override
    def on_server_receive(self, state: ServerState, server_round: ServerRound, update: SparseUpdate) -> None:
        before, after = self._watched(state.masks), self._watched(update.masks)
        if _sparse(after):
            self._agreement.update(after)
        if _sparse(before):
            self._regrowth.update(before, after)

    @override
    def on_server_received(self, state: ServerState, server_round: ServerRound, total: Total) -> None:
        self._before = self._watched(state.masks)
        for metric, nothing in ((self._agreement, ({},)), (self._regrowth, ({}, {}))):
            held = metric.metric_state if metric.update_called else {}
            sums = total({name: value for name, value in held.items() if isinstance(value, Tensor)})
            if sums and not metric.update_called:
                metric.update(*nothing)  # a metric is only computed of one that was updated
            for name, value in sums.items():
                setattr(metric, name, value)

    @override
    def on_server_round_end(self, state: ServerState, server_round: ServerRound) -> ServerState:
        after = self._watched(state.masks)
        if self._agreement.update_called:
            server_round.metrics["mask_agreement/clients"] = float(self._agreement.compute())
        if _sparse(self._before) and _sparse(after):
            rounds = MaskAgreement()
            rounds.update(self._before)
            rounds.update(after)
            server_round.metrics["mask_agreement/rounds"] = float(rounds.compute())
        if self._regrowth.update_called:
            for name, count in self._regrowth.compute().items():
                server_round.metrics[f"regrowth/{name}"] = float(count)
        self._reset()
        return state

    def _watched(self, masks: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
        return {name: masks[name] for name in self._names}

    def _reset(self) -> None:
        # a client's copy of this callback carries no counts of the rounds before
        self._before = {}
        self._agreement.reset()
        self._regrowth.reset()


def _sparse(masks: Mapping[str, Tensor | None]) -> bool:
    return any(mask is not None for mask in masks.values())
