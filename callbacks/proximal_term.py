r"""The proximal term of FedProx: clients are held near the weights that they were sent.

.. math:: F(w) = \mathrm{loss}(w) + \frac{\mu}{2} \lVert w - w_0 \rVert^2, \qquad g \leftarrow g + \mu\,(w - w_0)

with :math:`w` every trainable parameter as it is stored (a norm's scale and a bias too), and :math:`w_0` the weights as
broadcast at the start of the client's round. In a plain Trainer :math:`w_0` are the weights at the start of ``fit``, which is
fine-tuning under L2-SP. The logged loss is the user's own, without the term.

Use it where clients differ and train for long; with :math:`\mu` = 0 it is FedAvg to the bit. It goes with every method here:
weights that a mask takes out stay put, and under ``ErrorFeedback``, where they learn, the term holds them too. Beside
``CompressionMemory`` list it first: what that adds back then counts as a step away from the broadcast.

References: T. Li, A. K. Sahu, M. Zaheer, M. Sanjabi, A. Talwalkar, V. Smith, "Federated Optimization in Heterogeneous
Networks", MLSys 2020, https://arxiv.org/abs/1812.06127, equation 2; X. Li, Y. Grandvalet, F. Davoine, "Explicit Inductive Bias
for Transfer Learning with Convolutional Networks", ICML 2018, https://arxiv.org/abs/1802.01483 (L2-SP).
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_fedsparse.callbacks.base import EffectiveWeightCallback
from lightning_fedsparse.effective import EffectiveWeights
from lightning_fedsparse.rounds import ClientRound
from lightning_fedsparse.transforms import Transform, Weights

__all__ = ["ProximalTerm", "proximal_terms"]


@torch.no_grad()
def proximal_terms(weights: Weights, start: Weights, mu: float) -> dict[str, Tensor]:
    """``mu * (w - w_start)`` for each weight: the gradient of the proximal term, as new tensors.

    Args:
        weights: Weights by name, at least one.
        start: Weights to stay near, by the same names.
        mu: Strength, at least 0.

    Example:
        >>> proximal_terms({"w": torch.tensor([1.0, -2.0])}, {"w": torch.tensor([0.5, -2.0])}, 0.5)
        {'w': tensor([0.2500, 0.0000])}
    """
    terms = torch._foreach_sub(list(weights.values()), [start[name] for name in weights])
    torch._foreach_mul_(terms, mu)
    return dict(zip(weights, terms, strict=True))


class _Proximal(Transform):
    """The term's gradient, found at the stored weights once all other steps have brought theirs back."""

    order = -1
    changes_weights = False

    def __init__(self, names: list[str], mu: float, engine: EffectiveWeights) -> None:
        super().__init__(names)
        self.start: dict[str, Tensor] = {}
        self._mu = mu
        self._engine = engine

    def apply(self, weights: Weights, out: Weights) -> None:
        """The term changes no weight."""

    def chain_(self, gradients: Weights, stored: Weights, effective: Weights) -> None:
        """Add the term to the gradients, where no mask keeps the weight from moving."""
        if not gradients:
            return
        terms = proximal_terms(stored, self.start, self._mu)
        for mask in self._engine.masks:
            mask.chain_({name: term for name, term in terms.items() if name in mask.names}, stored, effective)
        torch._foreach_add_(list(gradients.values()), [terms[name] for name in gradients])


class ProximalTerm(EffectiveWeightCallback):
    """Pull every trainable parameter towards where it was at the start.

    Args:
        mu: Strength of the pull, at least 0; FedProx tries 0.001 to 1.

    Raises:
        ValueError: At construction for a negative ``mu``.
    """

    def __init__(self, mu: float) -> None:
        super().__init__()
        if not 0 <= mu < float("inf"):
            raise ValueError(f"expected a proximal strength mu in [0, inf), got {mu}")
        self.mu = mu
        self._start: dict[str, Tensor] = {}

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit" and self.client_round is None:
            self._start = {}

    @override
    def transform(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Transform | None:
        names = list(_trainable(pl_module))
        return _Proximal(names, self.mu, EffectiveWeights.of(pl_module)) if self.mu > 0 else None

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self.mu == 0:
            return
        if not self._start:
            # only here: at the start of fit a reparametrization may still be about to rewrite the stored weights
            self._start = _copy(pl_module)
        step = EffectiveWeights.of(pl_module).transform_of(self)
        assert isinstance(step, _Proximal)
        step.start = {name: self._start[name].to(weight.device) for name, weight in _trainable(pl_module).items()}

    @override
    def on_client_round_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, client_round: ClientRound
    ) -> None:
        if self.mu > 0:
            self._start = _copy(pl_module)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"start": dict(self._start)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._start = dict(state_dict["start"])


def _trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def _copy(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in _trainable(module).items()}
