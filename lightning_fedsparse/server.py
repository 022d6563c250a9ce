"""The server's state, and its step: any ``torch.optim`` optimizer on the pseudo-gradient.

The pseudo-gradient is ``old - mean`` (Reddi et al., "Adaptive Federated Optimization", ICLR 2021), so SGD with learning
rate 1 is FedAvg. That case *copies* the mean instead of computing ``old - (old - mean)``, whose rounding would leave
many pruned coordinates not quite zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from lightning_fedsparse.masks import sparsity_of
from lightning_fedsparse.schema import Schema
from lightning_fedsparse.update import MaskSet, SparseUpdate, gather

__all__ = ["OptimizerFactory", "ServerOptimizer", "ServerState"]

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]


@dataclass
class ServerState:
    """Everything that the server knows about the model.

    Args:
        weights: Stored global weights by parameter name; off the masks they are zero between rounds.
        buffers: Global buffers by name (BatchNorm statistics and the like).
        masks: The masks in force, for every parameter a mask or None; a new set when masks move.
        methods: The methods' own state, by a key of their choice: tensors and primitives only.
        capacities: Share of the weights that each client can hold, by id; empty where clients have none of their own.
    """

    weights: dict[str, Tensor]
    buffers: dict[str, Tensor]
    masks: MaskSet
    methods: dict[str, Any] = field(default_factory=dict)
    capacities: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, module: nn.Module) -> ServerState:
        """Copy a module's parameters and persistent buffers; no masks yet."""
        weights = {name: parameter.detach().cpu().clone() for name, parameter in module.named_parameters()}
        persistent = module.state_dict().keys()
        buffers = {name: buffer.detach().cpu().clone() for name, buffer in module.named_buffers() if name in persistent}
        return cls(weights, buffers, MaskSet.of(dict.fromkeys(weights)))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Weights and buffers together: the template of an aggregate."""
        return {**self.weights, **self.buffers}

    @property
    def schema(self) -> Schema:
        """What the model's tensors are, which its clients know as well."""
        return Schema.of(self.weights, self.buffers)

    @property
    def prunable_sparsity(self) -> float:
        """Fraction of zeros that the masks hold, over the masked parameters; 0 without masks."""
        return sparsity_of(self.masks)

    def set_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Put masks in force (parameters that are not named keep theirs) and zero the weights off them."""
        changed = MaskSet.of({**self.masks, **masks})
        if changed.id != self.masks.id:
            self.masks = changed
        self.apply_masks()

    @torch.no_grad()
    def apply_masks(self) -> None:
        """Zero the weights off the masks."""
        for name, mask in self.masks.items():
            if mask is not None:
                self.weights[name].mul_(mask)

    def broadcast(self) -> SparseUpdate:
        """What a client starts the round from: values on the masks, and the buffers."""
        return SparseUpdate(
            values=gather(self.weights, self.masks),
            masks=self.masks,
            absent="zero",
            buffers=self.buffers,
            mask_id=None if self.masks.is_dense else self.masks.id,
        )

    @torch.no_grad()
    def load_into(self, module: nn.Module) -> None:
        """Write weights (zero off the masks) and buffers into a module of the same names."""
        targets = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        for name, tensor in self.tensors.items():
            targets[name].detach().copy_(tensor)


class ServerOptimizer:
    """Takes one step per round from the aggregate.

    Args:
        factory: Makes the optimizer from an iterable of parameters, as LightningCLI's ``OptimizerCallable`` does;
            None is SGD with learning rate 1, that is FedAvg.
    """

    def __init__(self, factory: OptimizerFactory | None = None) -> None:
        self._factory = factory
        self._optimizer: Optimizer | None = None
        self._parameters: dict[str, nn.Parameter] = {}

    def step(self, state: ServerState, mean: Mapping[str, Tensor]) -> None:
        """Move the state's weights towards the mean in place; buffers take the mean as it is.

        Args:
            state: The server's state.
            mean: New tensors by name, as an aggregator's ``result()`` gives them.

        Raises:
            ValueError: If the state's weights are not the tensors that the optimizer was made for.
        """
        optimizer = self._optimizer_of(state)
        with torch.no_grad():
            for name, buffer in state.buffers.items():
                buffer.copy_(mean[name])
            if optimizer is None or _is_plain_copy(optimizer):
                for name, weight in state.weights.items():
                    weight.copy_(mean[name])
                return
            for name, parameter in self._parameters.items():
                parameter.grad = parameter.detach() - mean[name]
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for name, mask in state.masks.items():
                if mask is not None:
                    # momentum must not fill coordinates that nobody sent
                    state.weights[name].masked_fill_(~mask & (mean[name] == 0), 0)

    def state_dict(self) -> dict[str, Any]:
        """State of the optimizer, empty before the first step."""
        return self._optimizer.state_dict() if self._optimizer is not None else {}

    def load_state_dict(self, state: ServerState, saved: dict[str, Any]) -> None:
        """Take back a saved state of the optimizer for the given server state."""
        optimizer = self._optimizer_of(state)
        if saved and optimizer is not None:
            optimizer.load_state_dict(saved)

    def _optimizer_of(self, state: ServerState) -> Optimizer | None:
        if self._factory is not None and self._optimizer is None:
            # the parameters share their memory with the state's weights: a step moves those
            self._parameters = {name: nn.Parameter(weight) for name, weight in state.weights.items()}
            self._optimizer = self._factory(self._parameters.values())
        for name, parameter in self._parameters.items():
            if parameter.data_ptr() != state.weights[name].data_ptr():
                raise ValueError(
                    f"expected server hooks to change weights in place beside a server optimizer, got another tensor as {name!r}"
                )
        return self._optimizer


def _is_plain_copy(optimizer: Optimizer) -> bool:
    return isinstance(optimizer, SGD) and all(
        group["lr"] == 1 and group["momentum"] == 0 and group["weight_decay"] == 0 and not group["maximize"]
        for group in optimizer.param_groups
    )
