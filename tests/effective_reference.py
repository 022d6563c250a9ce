"""A small model and an independent training loop to hold the swap engine against.

The loop knows no swap: the effective weight is an expression in the autograd graph (``torch.func.functional_call``), so
autograd itself applies the chain rule, and masks come from a stable sort.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedsparse.effective import EffectiveWeights

Batch = Sequence[Tensor]
WEIGHTS = ("first.weight", "second.weight")


def sgd(parameters: Iterable[nn.Parameter]) -> Optimizer:
    return SGD(parameters, lr=0.2, momentum=0.9, weight_decay=0.01)


def adamw(parameters: Iterable[nn.Parameter]) -> Optimizer:
    return AdamW(parameters, lr=0.02, weight_decay=0.1)


class Net(pl.LightningModule):
    """A 6-8-3 classifier that writes down what it saw: the weights of every forward, by stage."""

    def __init__(self, optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] = sgd) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 3)
        self.make_optimizer = optimizer
        self.seen: dict[str, list[dict[str, Tensor]]] = {}

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))

    def loss(self, batch: Batch, stage: str) -> Tensor:
        self.seen.setdefault(stage, []).append(weights_of(self))
        return F.cross_entropy(self(batch[0]), batch[1])

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        return self.loss(batch, "train")

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())


class EvaluatedNet(Net):
    """The same with steps for validation, test and prediction."""

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch, "validation"))

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.loss(batch, "test")

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.loss(batch, "predict")
        return self(batch[0])


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def seeded(make: Callable[[], pl.LightningModule]) -> Any:
    """The same initial weights at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return make()


def loader(batches: int = 5, batch_size: int = 4) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(batches * batch_size, 6, generator=generator)
    y = torch.randint(0, 3, (batches * batch_size,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=batch_size)


def quiet_trainer(callbacks: Sequence[pl.Callback], **options: Any) -> pl.Trainer:
    defaults = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(**{**defaults, **options}, callbacks=list(callbacks))


def assert_engine_clean(module: nn.Module) -> None:
    """No owner, no kept copy, no hook on an optimizer is left, and nothing is swapped in."""
    engine = EffectiveWeights.of(module)
    assert not engine._owners
    assert not engine._stored
    assert not engine._effective
    assert not engine._handles


def sorted_masks(weights: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """One global magnitude ranking by a full stable sort."""
    flat = torch.cat([weight.abs().flatten() for weight in weights.values()])
    keep = torch.ones(len(flat), dtype=torch.bool)
    keep[torch.sort(flat, stable=True).indices[: round(sparsity * len(flat))]] = False
    parts = keep.split([weight.numel() for weight in weights.values()])
    return {name: part.view_as(weight) for (name, weight), part in zip(weights.items(), parts, strict=True)}


def reference_fit(
    module: Net,
    batches: Sequence[Batch],
    *,
    sparsity_at: Callable[[int], float | None],
    feedback: bool,
    strength_at: Callable[[int], float] = lambda step: 0.0,
    accumulate: int = 1,
    epochs: int = 2,
    clip: float | None = None,
    after_step: Callable[[], None] = lambda: None,
) -> dict[str, Tensor]:
    """Train by hand; returns the last masks.

    ``sparsity_at(step)`` is the sparsity to prune to before the step (and after the last one), None to leave the masks.
    The module ends with its stored weights.
    """
    optimizer = module.make_optimizer(module.parameters())
    parameters = dict(module.named_parameters())
    masks = {name: torch.ones_like(parameters[name]) for name in WEIGHTS}

    def prune(step: int) -> None:
        sparsity = sparsity_at(step)
        with torch.no_grad():
            if sparsity is not None:
                # without feedback a pruned weight is gone for the ranking too, whatever momentum did to it meanwhile
                ranked = {n: parameters[n] if feedback else parameters[n] * masks[n] for n in WEIGHTS}
                masks.update({name: mask.float() for name, mask in sorted_masks(ranked, sparsity).items()})
                if not feedback:
                    for name in WEIGHTS:
                        parameters[name].mul_(masks[name])

    step = 0
    for _ in range(epochs):
        for start in range(0, len(batches), accumulate):
            window = batches[start : start + accumulate]
            prune(step)
            optimizer.zero_grad()
            for x, y in window:
                effective = {}
                for name in WEIGHTS:
                    weight = parameters[name]
                    if feedback:
                        effective[name] = weight + (weight * masks[name] - weight).detach()
                    else:
                        effective[name] = weight * masks[name]
                # as Lightning does, a window that is cut short is divided by the full length
                (F.cross_entropy(functional_call(module, effective, x), y) / accumulate).backward()
            if strength_at(step):
                effective = {
                    n: p + (p * masks[n] - p).detach() if feedback else p * masks[n]
                    for n, p in parameters.items()
                    if n in WEIGHTS
                }
                (strength_at(step) * sum(w.norm() for w in effective.values())).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(module.parameters(), clip)
            optimizer.step()
            after_step()
            step += 1
    prune(step)
    return {name: mask.bool() for name, mask in masks.items()}
