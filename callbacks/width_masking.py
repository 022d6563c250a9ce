r"""Width masking: submodels of fewer channels per layer, whatever their weights are.

A client of capacity :math:`\gamma` holds :math:`n = \lceil rK \rceil` of the :math:`K` units of every layer, with
:math:`r = \sqrt{\gamma}`, so about :math:`r^2 = \gamma` of the weights. Which units is what the methods differ in:

- ``"static"``, HeteroFL: the first, :math:`0, \dots, n - 1`. The others are only ever trained by larger clients.
- ``"rolling"``, FedRolex: a window that moves by one unit each round, :math:`t, \dots, t + n - 1 \bmod K`, so that in
  :math:`K` rounds every unit is held :math:`n` times. In the released code it moves the other way,
  :math:`-t, \dots, -t + n - 1 \bmod K` (``"rolling_backward"``).
- ``"random"``: drawn anew per layer, client and round.
- ``"largest"``: those whose weights, all that lead to a unit or read it, have the largest norm in the server's model.
  Like FIARSE it goes by magnitude, of units instead of weights, which its authors name as future work; unlike it every
  layer keeps the same share, and gradients have no factor. Submodels are nested.

A client does not hold the biases and the normalization of units that it lacks, nor the weights that lead to them or from
them; all inputs of the first layer and all outputs of the last stay. The masked network computes what the small dense one
would, so clients could be physically small; here, where clients are simulated, they compute with masked dense layers.

In a federation a submodel is evaluated with the units of the coming round (for ``"random"``: a draw of nobody's).
BatchNorm statistics of channels that a client lacks are averaged like others: ``FederatedLoop(buffers="recalibrate")``
measures them anew. Masks that move travel each round, though a FedRolex client could work them out.

Not here: HeteroFL's masked cross-entropy, which leaves classes that a client has no examples of out of its loss.

References: E. Diao, J. Ding, V. Tarokh, "HeteroFL: Computation and Communication Efficient Federated Learning for
Heterogeneous Clients", ICLR 2021, https://arxiv.org/abs/2010.01264. S. Alam, L. Liu, M. Yan, M. Zhang, "FedRolex:
Model-Heterogeneous Federated Learning with Rolling Sub-Model Extraction", NeurIPS 2022,
https://arxiv.org/abs/2212.01548.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_fedsparse.callbacks.submodel import SubmodelCallback
from lightning_fedsparse.channels import ChannelGroup, channel_groups, unit_count, unit_norms, width_masks, window
from lightning_fedsparse.rounds import ServerRound
from lightning_fedsparse.seeding import derive_seed
from lightning_fedsparse.server import ServerState
from lightning_fedsparse.submodels import SubmodelTransform
from lightning_fedsparse.transforms import Transform

__all__ = ["WidthMasking"]

Selection = Literal["static", "rolling", "rolling_backward", "random", "largest"]


class WidthMasking(SubmodelCallback):
    """Train the submodel of a part of every layer's units.

    The channels are found by a forward pass: the LightningModule needs an ``example_input_array``.

    Args:
        capacity: Share of the weights that is held, about, in (0, 1]: in a plain Trainer, and by clients that have no
            capacity of their own.
        selection: Which units: the first (``"static"``), a moving window (``"rolling"``, ``"rolling_backward"``), drawn
            ones (``"random"``), or those of the largest weights (``"largest"``).
        norm: Of a unit's weights under ``"largest"``: ``"l2"`` over all of them, or their ``"mean"`` magnitude, every layer alike.
        scale: Divide the output of every layer that lacks units by the width in training, before a normalization or a
            nonlinearity, so that the next layer sees sums of about the same size at all widths (HeteroFL's scaler). For
            the whole model: a submodel is evaluated without, and biases then weigh more than they did in training.
        refresh_every: Optimizer steps in a plain Trainer that count as a round.
        fold: Whether the module holds the last submodel after a plain ``fit``; otherwise the stored weights.

    Raises:
        ValueError: At construction for an option out of range; at the start for a module without ``example_input_array``,
            or with layers other than convolutions without channel groups, linear layers and BatchNorm along its units.
    """

    def __init__(
        self,
        capacity: float = 1.0,
        selection: Selection = "static",
        *,
        norm: Literal["l2", "mean"] = "l2",
        scale: bool = False,
        refresh_every: int = 100,
        fold: bool = True,
    ) -> None:
        super().__init__(capacity, refresh_every=refresh_every, fold=fold)
        if selection not in get_args(Selection):
            raise ValueError(
                f"expected selection to be one of {', '.join(map(repr, get_args(Selection)))}, got {selection!r}"
            )
        if norm not in ("l2", "mean"):
            raise ValueError(f"expected norm to be 'l2' or 'mean', got {norm!r}")
        self.selection = selection
        self.norm = norm
        self.scale = scale
        self._groups: list[ChannelGroup] = []
        self._round = 0
        self._seed = 0
        self._handles: list[RemovableHandle] = []

    @property
    @override
    def shared(self) -> bool:
        return self.selection != "random"

    @override
    def submodel(self, weights: Mapping[str, Tensor], capacity: float, client_id: str = "") -> dict[str, Tensor]:
        width = math.sqrt(capacity)
        if self.selection == "random":
            generator = torch.Generator().manual_seed(derive_seed(self._seed, "units", self._round, client_id))
            orders = [torch.randperm(group.size, generator=generator) for group in self._groups]
        elif self.selection == "largest":
            orders = [
                unit_norms(group, weights, self.norm).argsort(descending=True, stable=True) for group in self._groups
            ]
        else:
            start = {"static": 0, "rolling": self._round, "rolling_backward": -self._round}[self.selection]
            orders = [window(group.size, 1.0, start) for group in self._groups]
        return width_masks(self._groups, [order[: unit_count(len(order), width)] for order in orders])

    # -- in a Trainer ----------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and self.client_round is None:
            self._round, self._seed = 0, torch.initial_seed()

    @override
    def transform(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Transform | None:
        parameters = dict(pl_module.named_parameters())
        for name, mask in self.masks.items():
            if name not in parameters or (mask is not None and mask.shape != parameters[name].shape):
                raise ValueError(
                    f"expected the module that WidthMasking narrowed last, got {type(pl_module).__name__}, which has no "
                    f"{name!r} of that shape"
                )
        if self.client_round is None:
            self._groups = _trace(pl_module)
            self.masks = self.masks or dict(self.submodel(parameters, self.capacity))
        masks = {name: mask for name, mask in self.masks.items() if mask is not None}
        return SubmodelTransform(masks) if masks else None  # a client that holds everything

    @override
    def refresh(self, pl_module: pl.LightningModule, transform: SubmodelTransform, step: int) -> None:
        self._round = step // self.refresh_every
        self.masks = dict(self.submodel(dict(pl_module.named_parameters()), self.capacity))
        transform.set_masks(self.masks)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        own = None if self.client_round is None else self.client_round.capacity
        width = math.sqrt(self.capacity if own is None else own)
        if self.scale:
            layers = [pl_module.get_submodule(name.removesuffix(".weight")) for name in _narrowed(self.masks)]
            self._handles = [layer.register_forward_hook(_Scaler(width)) for layer in layers]

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self.selection == "largest":
            self.refuse_reparametrization(pl_module, self.masks.keys(), "units are ranked by their stored weights")

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._remove_scalers()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._remove_scalers()

    def _remove_scalers(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "seed": self._seed}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._seed = state_dict["seed"]

    # -- on the server ---------------------------------------------------------------------------------------------

    @override
    def on_server_start(self, pl_module: pl.LightningModule, state: ServerState, seed: int) -> ServerState:
        self._groups = _trace(pl_module)
        self._round, self._seed = 0, seed
        self.masks = {}  # of a plain fit before
        state.methods[self.state_key] = self._round
        return state

    @override
    def on_server_resume(self, state: ServerState) -> None:
        self._round = state.methods[self.state_key]

    @override
    def on_server_round_end(self, state: ServerState, server_round: ServerRound) -> ServerState:
        self._round = state.methods[self.state_key] = server_round.index + 1
        return super().on_server_round_end(state, server_round)


class _Scaler:
    """A forward hook that divides by the width while its layer trains."""

    def __init__(self, width: float) -> None:
        self._width = width

    def __call__(self, layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output / self._width if layer.training else output


def _trace(pl_module: pl.LightningModule) -> list[ChannelGroup]:
    example = pl_module.example_input_array
    if example is None:
        raise ValueError(
            f"expected an example_input_array of {type(pl_module).__name__} to find its channels with, got none: set it in "
            "its __init__, for example to torch.zeros(1, 3, 32, 32)"
        )
    return channel_groups(pl_module, move_data_to_device(example, pl_module.device))


def _narrowed(masks: Mapping[str, Tensor | None]) -> list[str]:
    """Names of the convolution and linear weights that lack outputs."""
    present = {name: mask for name, mask in masks.items() if mask is not None and mask.ndim > 1}
    return [name for name, mask in present.items() if not mask.flatten(1).any(1).all()]
