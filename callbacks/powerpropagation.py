r"""Powerpropagation: weights that are powers of what the optimizer sees, so that small ones fall towards zero.

.. math:: \theta = \mathrm{sign}(w)\,|w|^\beta, \qquad \nabla_w L = \beta\,|w|^{\beta-1}\,\nabla_\theta L

The stored weight ``w`` is what optimizers, checkpoints and payloads hold; forward and backward use ``theta``. Large weights
move fast, small ones hardly, so magnitude pruning finds weights that can go. A weight of exactly zero has gradient zero: for
``beta`` above 1 zeros are absorbing, and a mask can only choose among the weights that are left. Weights that are to return
belong in ``exclude``.

Training starts where the module is: the stored weights are set so that the effective ones are the module's own, be they a
fresh initialization or trained already. After a plain ``fit`` the module holds the effective weights and needs no callback.

Use it before pruning. It costs a power per weight and step, and clashes with another Powerpropagation of the same weights.

References: J. Schwarz et al., "Powerpropagation: A sparsity inducing weight reparameterisation", NeurIPS 2021,
https://arxiv.org/abs/2110.00296; "SparsyFed", ICLR 2025, https://arxiv.org/abs/2504.05153 (beta 1.25, spectral exponents).
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_fedsparse.callbacks.base import EffectiveWeightCallback
from lightning_fedsparse.powers import power, power_gradient_, root_, spectral_exponents, truncated_normal_
from lightning_fedsparse.prunable import prunable_parameters
from lightning_fedsparse.rounds import ClientRound, ServerRound
from lightning_fedsparse.seeding import derive_seed
from lightning_fedsparse.server import ServerState
from lightning_fedsparse.transforms import Transform, Weights
from lightning_fedsparse.value_coding import ValueType

__all__ = ["Powerpropagation"]

Exponent = Literal["fixed", "spectral_layer", "spectral_global"]
Initialization = Literal["module", "truncated_normal"]


class _Power(Transform):
    """``w -> sign(w) * |w|**beta``; shares the exponents with its callback, which sees when they are folded in."""

    order = 0

    def __init__(self, exponents: dict[str, float]) -> None:
        super().__init__(list(exponents))
        self._exponents = exponents
        self._slopes: dict[str, Tensor] = {}  # found on the way there, needed on the way back

    def apply(self, weights: Weights, out: Weights) -> None:
        """Raise the weights to their powers."""
        power(weights, self._exponents, out, self._slopes)

    def chain_(self, gradients: Weights, stored: Weights, effective: Weights) -> None:
        """Multiply the gradients by the powers' derivatives at the stored weights."""
        power_gradient_(gradients, self._slopes, self._exponents)

    def folded(self) -> None:
        """From here on the module holds effective weights: a second power would be one too many."""
        self.names = frozenset()
        self._exponents.clear()


class Powerpropagation(EffectiveWeightCallback):
    """Train ``w`` and compute with ``sign(w) * |w|**beta``.

    Args:
        beta: Exponent, at least 1; 1 changes nothing. Used with ``exponent="fixed"``.
        exponent: ``"fixed"``; ``"spectral_layer"``: one exponent per layer, from its weights at the start of each client
            round (of ``fit`` in a plain Trainer); ``"spectral_global"``: the average of such values, one for all layers. A
            spectral exponent depends on the stored weights, so nothing is converted: these start as the module's weights.
        initialization: ``"module"``: effective weights start as the module's own; ``"truncated_normal"`` (SparsyFed's
            released code): drawn anew with variance 1 / fan-in, biases of these layers 0, at every ``fit`` that does not
            resume, or once per federation.
        include: Globs of parameter names to reparametrize instead of all convolution and linear weights.
        exclude: Globs of parameter names to leave as they are; their zeros can return.

    Attributes:
        exponents: Exponent of each weight that the module holds in stored form; empty once it holds effective weights.

    Raises:
        ValueError: At construction for a ``beta`` below 1 or an unknown option; at the start of ``fit`` for a model without
            such weights or a glob that matches nothing.
    """

    def __init__(
        self,
        beta: float = 1.25,
        *,
        exponent: Exponent = "fixed",
        initialization: Initialization = "module",
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if not 1 <= beta < float("inf"):
            raise ValueError(f"expected an exponent beta in [1, inf), got {beta}")
        if exponent not in ("fixed", "spectral_layer", "spectral_global"):
            raise ValueError(f"expected exponent 'fixed', 'spectral_layer' or 'spectral_global', got {exponent!r}")
        if initialization not in ("module", "truncated_normal"):
            raise ValueError(f"expected initialization 'module' or 'truncated_normal', got {initialization!r}")
        self.beta = beta
        self.exponent = exponent
        self.initialization = initialization
        self.include = tuple(include)
        self.exclude = tuple(exclude)
        self.exponents: dict[str, float] = {}
        self._names: list[str] = []
        self._module: weakref.ref[nn.Module] | None = None
        self._key = self._generate_state_key(include=self.include, exclude=self.exclude)

    @property
    def state_key(self) -> str:
        """Tells instances with other selections apart."""
        return self._key

    def exponents_of(self, weights: Mapping[str, Tensor]) -> dict[str, float]:
        """Exponents for these stored weights."""
        if self.exponent == "fixed":
            return dict.fromkeys(weights, self.beta)
        return spectral_exponents(weights, "layer" if self.exponent == "spectral_layer" else "global")

    @property
    @override
    def folds(self) -> bool:
        return True

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # a module keeps its stored weights over an interrupted fit or a test of a checkpoint; another one has none
        if self.client_round is None and (self._module is None or self._module() is not pl_module):
            self.exponents = {}
            self._module = weakref.ref(pl_module)

    @override
    def transform(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Transform | None:
        return _Power(self.exponents) if self.exponents else None

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.client_round is None and not self.exponents:
            weights = dict(prunable_parameters(pl_module, self.include, exclude=self.exclude))
            self._to_stored_(dict(pl_module.named_parameters()), list(weights), torch.initial_seed())
            self.exponents = self.exponents_of(weights)
        super().on_fit_start(trainer, pl_module)

    @torch.no_grad()
    def _to_stored_(self, parameters: Mapping[str, Tensor], names: Sequence[str], seed: int) -> None:
        """Start: write stored weights in place of a module's own, after drawing these anew where that is wanted."""
        weights = {name: parameters[name].detach() for name in names}
        if self.initialization == "truncated_normal":
            generator = torch.Generator().manual_seed(derive_seed(seed, "powerpropagation"))
            for name, weight in weights.items():
                drawn = torch.empty(weight.shape, dtype=weight.dtype)
                truncated_normal_(drawn, generator)
                weight.copy_(drawn)
                bias = parameters.get(f"{name.removesuffix('weight')}bias")
                if bias is not None:
                    bias.detach().zero_()
        if self.exponent == "fixed":
            root_(weights, self.exponents_of(weights))

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"exponents": dict(self.exponents)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.exponents = dict(state_dict["exponents"])

    def __getstate__(self) -> dict[str, Any]:
        """Without the reference to the module, which can't be pickled."""
        return {**self.__dict__, "_module": None}

    # -- in a federation -------------------------------------------------------------------------------------------

    @override
    def on_client_round_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, client_round: ClientRound
    ) -> None:
        self.exponents = self.exponents_of(dict(prunable_parameters(pl_module, self.include, exclude=self.exclude)))

    @override
    def on_server_start(self, pl_module: pl.LightningModule, state: ServerState, seed: int) -> ServerState:
        self._names = list(prunable_parameters(pl_module, self.include, exclude=self.exclude))
        self._to_stored_(state.weights, self._names, seed)
        return state

    @override
    def on_server_round_end(self, state: ServerState, server_round: ServerRound) -> ServerState:
        # what the checkpoint says of the weights beside them
        self.exponents = self.exponents_of({name: state.weights[name] for name in self._names})
        return state

    @override
    def refuses_values(self, *, uploads: ValueType, broadcasts: ValueType) -> str | None:
        if broadcasts not in ("int8", "int4"):
            return None
        return "a small weight that is rounded to zero can't return, as zero gets no gradient"

    @override
    def to_effective_(self, weights: dict[str, Tensor], capacity: float | None = None) -> None:
        stored = {name: weights[name].detach() for name in self._names}
        power(stored, self.exponents_of(stored), stored)
