"""The swap engine: stored weight <-> effective weight, and the chain rule back.

Every method here maps the *stored* dense weight (the plain ``nn.Parameter``: what ``state_dict``, the optimizer and
checkpoints see) to the *effective* weight that forward and backward use. One engine per module puts the effective
weights into the parameters before a batch, and before the optimizer steps it turns the gradients at the effective
weights into gradients at the stored ones and puts the stored weights back. No parameter is renamed, wrapped or
replaced, so ``deepcopy``, pickling, ``torch.compile``, checkpointing and weight averaging keep working.

The effective weights have memory of their own, and swapping is ``Tensor.set_``: the parameter looks at the one or at the
other, and nothing is copied. What reads a parameter's memory past the parameter, such as a view taken earlier, sees the
one that was in then.

=====================================  =========================================================================
Lightning's event                      what the engine does
=====================================  =========================================================================
``on_train_batch_start``               swap in (idempotent)
``on_before_optimizer_step``           chain rule and swap out, for the parameters of that optimizer
step post hook, manual optimization    swap those parameters in again for the rest of ``training_step``
batch, epoch, train end, exception     swap out, whatever happened
validation, test, predict              swap in and out around each batch
=====================================  =========================================================================

Swaps run under ``no_grad`` and never through ``.data``: autograd's version counters see them, so a graph that is
used across a swap raises instead of being silently wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar
from weakref import WeakKeyDictionary

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_fedsparse.transforms import MaskTransform, Transform

__all__ = ["EffectiveWeights"]


class EffectiveWeights:
    """The engine of one module; get it with :meth:`of`. It lives beside the module, never on it.

    Owners (callbacks) register one transform each; the first one registered *drives* the engine, so that each event is
    handled once however many owners there are.
    """

    _engines: ClassVar[WeakKeyDictionary[nn.Module, EffectiveWeights]] = WeakKeyDictionary()

    def __init__(self) -> None:
        self._owners: dict[int, Transform] = {}
        self._chain: list[Transform] = []
        self._parameters: dict[str, nn.Parameter] = {}
        self._stored: dict[str, Tensor] = {}  # of those inside: where the parameter looked before
        self._effective: dict[str, Tensor] = {}  # kept from batch to batch
        self._handles: list[RemovableHandle] = []
        self._in_batch = False
        self._steps_on = False
        self._prepared: Optimizer | None = None

    @classmethod
    def of(cls, module: nn.Module) -> EffectiveWeights:
        """The engine of ``module``, made at the first call."""
        engine = cls._engines.get(module)
        if engine is None:
            engine = cls._engines[module] = cls()
        return engine

    # -- registration ----------------------------------------------------------------------------------------------

    def register(self, owner: object, transform: Transform, module: nn.Module) -> None:
        """Add (or replace) the owner's transform and bind it to the module's parameters as they are now.

        Raises:
            ValueError: If a name of the transform is not a parameter of the module.
        """
        self.swap_out()
        self._parameters = dict(module.named_parameters())
        missing = transform.names - self._parameters.keys()
        if missing:
            raise ValueError(
                f"{type(module).__name__} has no parameter {min(missing)!r}, which {owner!r} wants to change"
            )
        self._owners[id(owner)] = transform
        self._chain = sorted(self._owners.values(), key=lambda step: step.order)

    def unregister(self, owner: object) -> None:
        """Put the stored weights back and forget the owner's transform; a no-op for an unknown owner."""
        self.swap_out()
        if self._owners.pop(id(owner), None) is not None:
            self._chain = sorted(self._owners.values(), key=lambda step: step.order)
        if not self._owners:
            self._effective.clear()
            self._parameters.clear()
            self.detach_optimizers()

    def is_driven_by(self, owner: object) -> bool:
        """Whether ``owner`` was registered first, so that its hooks drive the engine."""
        return next(iter(self._owners), None) == id(owner)

    def transform_of(self, owner: object) -> Transform:
        """The transform that the owner registered."""
        return self._owners[id(owner)]

    @property
    def transforms(self) -> list[Transform]:
        """The registered transforms, in the order in which they apply."""
        return list(self._chain)

    @property
    def masks(self) -> list[MaskTransform]:
        """The registered mask transforms."""
        return [step for step in self._chain if isinstance(step, MaskTransform)]

    # -- the swap --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def swap_in(self, names: frozenset[str] | None = None) -> None:
        """Put the effective weights into the parameters; idempotent."""
        changed = frozenset().union(*(step.names for step in self._chain if step.changes_weights))
        wanted = [name for name in changed if name not in self._stored and (names is None or name in names)]
        if not wanted:
            return
        weights: dict[str, Tensor] = {name: self._parameters[name].detach() for name in wanted}
        for name, weight in weights.items():
            memory = self._effective.get(name)
            if memory is None or _layout(memory) != _layout(weight):
                self._effective[name] = torch.empty_like(weight)
        so_far = dict(weights)
        for step in self._chain:
            if step.changes_weights:
                mine = [name for name in wanted if name in step.names]
                into = {name: self._effective[name] for name in mine}
                step.apply({name: so_far[name] for name in mine}, into)
                so_far.update(into)
        # all are found before the first is put in: a step that raises has changed nothing
        for name in wanted:
            self._stored[name] = weights[name]
            self._parameters[name].set_(self._effective[name])  # type: ignore[call-overload]  # missing in torch's stub

    @torch.no_grad()
    def swap_out(self, names: frozenset[str] | None = None) -> None:
        """Put the stored weights back; idempotent."""
        for name in [name for name in self._stored if names is None or name in names]:
            self._parameters[name].set_(self._stored.pop(name))  # type: ignore[call-overload]

    @contextmanager
    def stored(self) -> Iterator[None]:
        """Within this context the parameters hold the stored weights; afterwards what was inside is inside again."""
        inside = frozenset(self._stored)
        self.swap_out()
        try:
            yield
        finally:
            if inside:
                self.swap_in(inside)

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer) -> None:
        """Chain rule for the gradients of the optimizer's parameters, then their stored weights back."""
        names = self._names_in(optimizer)
        self.swap_in(names)  # a step outside a training batch still sees the rule
        gradients = {
            name: parameter.grad for name in sorted(names) if (parameter := self._parameters[name]).grad is not None
        }
        for step in reversed(self._chain):
            mine = {name: gradient for name, gradient in gradients.items() if name in step.names}
            step.chain_(
                mine,
                {name: self._stored.get(name, self._parameters[name]) for name in mine},
                {name: self._parameters[name] for name in mine},
            )
        self.swap_out(names)
        for step in self._chain:
            if step.corrects_steps:
                for name in step.names & names:
                    self._effective[name].copy_(self._parameters[name])  # not in use until the next swap
        self._prepared = optimizer

    @torch.no_grad()
    def fold(self, owner: object) -> None:
        """Write the effect of the owner's transform into the stored weights for good."""
        self.swap_out()
        transform = self._owners[id(owner)]
        weights = {name: self._parameters[name] for name in transform.names}
        transform.apply(weights, weights)
        transform.folded()

    @torch.no_grad()
    def fold_all(self) -> None:
        """Write the effect of all transforms into the stored weights for good, in their order."""
        self.swap_out()
        for step in self._chain:
            weights = {name: self._parameters[name] for name in step.names}
            step.apply(weights, weights)
            step.folded()

    def restore_in(self, state_dict: dict[str, Tensor]) -> None:
        """Replace swapped-in parameters of a state dict by what is stored, so that a checkpoint never holds others."""
        for name, stored in self._stored.items():
            held = state_dict.get(name)
            # weight averaging puts its own tensors there, which are stored weights already
            if held is not None and held.data_ptr() == self._parameters[name].data_ptr():
                state_dict[name] = stored.clone()

    # -- optimizers ------------------------------------------------------------------------------------------------

    def attach_optimizers(self, trainer: pl.Trainer, pl_module: pl.LightningModule, driver: pl.Callback) -> None:
        """Check the optimizers and hook into their steps.

        After a step under manual optimization the optimizer's parameters are swapped in for the rest of the batch.

        Raises:
            ValueError: For LBFGS, which evaluates its closure several times per step, and for a ``WeightAveraging``
                callback before the driver where it could average effective weights: under manual optimization, or
                beside a module's own ``on_train_batch_start``, which may end an epoch early.
        """
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, LBFGS):
                raise ValueError(
                    "expected an optimizer that evaluates its closure once per step, got LBFGS: effective weights can't "
                    "be swapped inside its line search"
                )
        self._steps_on = not pl_module.automatic_optimization
        # such a hook may return -1: the epoch then ends with the effective weights in, and callbacks before us see them
        may_cut_epochs = is_overridden("on_train_batch_start", pl_module)
        before = trainer.callbacks[: trainer.callbacks.index(driver)]  # type: ignore[attr-defined]
        if (self._steps_on or may_cut_epochs) and any(isinstance(callback, WeightAveraging) for callback in before):
            raise ValueError(
                f"expected WeightAveraging after {type(driver).__name__} in the Trainer's callbacks under manual "
                "optimization or beside a module's own on_train_batch_start, got it before: it would average effective "
                "instead of stored weights"
            )
        self.detach_optimizers()
        self._handles = [optimizer.register_step_post_hook(self._after_step) for optimizer in trainer.optimizers]

    def detach_optimizers(self) -> None:
        """Remove the step post hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def batch_start(self) -> None:
        """Swap in for a training batch."""
        self._in_batch = True
        self.swap_in()

    def batch_end(self) -> None:
        """Swap out after a training batch, whatever happened in it."""
        self._in_batch = False
        self._prepared = None
        self.swap_out()

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        if self._prepared is optimizer:
            names = self._names_in(optimizer)
            for step in self._chain:
                if step.corrects_steps:
                    mine = step.names & names
                    step.after_step_(
                        {name: self._parameters[name] for name in mine}, {name: self._effective[name] for name in mine}
                    )
        elif self._in_batch:
            raise RuntimeError(
                f"expected every step to go through Lightning's optimizers, as self.optimizers() gives them, got a step "
                f"of a bare {type(optimizer).__name__} (use_pl_optimizer=False): its update would be lost"
            )
        self._prepared = None
        if self._in_batch and self._steps_on:
            self.swap_in(self._names_in(optimizer))

    def _names_in(self, optimizer: Optimizer) -> frozenset[str]:
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        touched = frozenset().union(*(step.names for step in self._chain))
        return frozenset(name for name in touched if id(self._parameters[name]) in stepped)


def _layout(tensor: Tensor) -> tuple[object, ...]:
    return tensor.device, tensor.dtype, tensor.shape, tensor.stride()
