"""What the callbacks cost a training step: the ratio to the same step without them.

    python docs/benchmarks/step_cost.py               # all networks
    python docs/benchmarks/step_cost.py LeNet-5       # one of them

All variants run in the same Trainer set-up on the same ready batches, interleaved in one process on one thread; each round
gives a ratio to its own plain steps, and the figures are medians over the rounds of one run. Only the ratios mean anything
on another machine. Activations are the bytes that autograd holds at once, as DeviceMonitor measures them.
"""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import lightning.pytorch as pl
import torch

from lightning_fedsparse.callbacks import (
    ActivationPruning,
    DeviceMonitor,
    ErrorFeedback,
    ImportanceMasking,
    IncrementalRegularization,
    MagnitudePruning,
    Powerpropagation,
)
from lightning_fedsparse.masks import largest_weights
from lightning_fedsparse.models import AlexNet, ImageClassifier, LeNet5, ResNet18
from lightning_fedsparse.prunable import prunable_parameters
from lightning_fedsparse.quiet import QUIET_TRAINER, quiet_lightning
from lightning_fedsparse.schedules import ConstantSchedule

ROUNDS = 11
SPARSITY = 0.95
# the masks are made before the clock starts and after it stops: steps are measured, not reconfigurations
NEVER_AGAIN = 10**9


class Batches:
    """Ready batches: what the loader costs is not the question."""

    def __init__(self, shape: tuple[int, ...], count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self._batch = (torch.rand(shape, generator=generator), torch.randint(0, 10, shape[:1], generator=generator))
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __iter__(self):
        return iter([self._batch] * self._count)


def masks() -> list[pl.Callback]:
    return [MagnitudePruning(ConstantSchedule(SPARSITY), every=NEVER_AGAIN, end=1.0, fold=False)]


VARIANTS: dict[str, Callable[[], list[pl.Callback]]] = {
    "plain": list,
    "masks": masks,
    "masks, error feedback": lambda: [*masks(), ErrorFeedback()],
    "and norm penalty": lambda: [*masks(), ErrorFeedback(), IncrementalRegularization(ConstantSchedule(1e-3))],
    "masks, pruned activations": lambda: [*masks(), ActivationPruning()],
    "powerpropagation": lambda: [Powerpropagation(1.25)],
    "powerpropagation of sparse weights": lambda: [Cut(), Powerpropagation(1.25)],
    "importance masking": lambda: [ImportanceMasking(1 - SPARSITY, refresh_every=NEVER_AGAIN, fold=False)],
}


class Cut(pl.Callback):
    """Zeroes the smallest weights for good, before the first step."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        weights = {name: parameter.detach() for name, parameter in prunable_parameters(pl_module).items()}
        for name, mask in largest_weights(weights, SPARSITY).items():
            weights[name].mul_(mask)


class Clock(pl.Callback):
    """CPU time between the ends of batches, as the first callback: masks are made in the first batch, which is not in it,
    and once more after the end of the last."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, *args: object) -> None:
        self.times.append(time.process_time())


def seconds_per_step(network: Callable[[], torch.nn.Module], batches: Batches, callbacks: list[pl.Callback]) -> float:
    torch.manual_seed(0)
    model = ImageClassifier(network(), partial(torch.optim.SGD, lr=0.01, weight_decay=5e-4))
    clock = Clock()
    with quiet_lightning():
        trainer = pl.Trainer(**QUIET_TRAINER, max_epochs=1, accelerator="cpu", callbacks=[clock, *callbacks])
        trainer.fit(model, batches)
    return (clock.times[-1] - clock.times[0]) / (len(clock.times) - 1)


def activation_bytes(network: Callable[[], torch.nn.Module], batches: Batches, callbacks: list[pl.Callback]) -> float:
    model = ImageClassifier(network(), partial(torch.optim.SGD, lr=0.01))
    with quiet_lightning():
        trainer = pl.Trainer(**QUIET_TRAINER, max_steps=1, accelerator="cpu", callbacks=[*callbacks, DeviceMonitor()])
        trainer.fit(model, batches)
    return float(trainer.callback_metrics["device/activation_bytes"])


def main() -> None:
    torch.set_num_threads(1)
    print(
        f"{platform.processor() or platform.machine()}, torch {torch.__version__}, one thread, medians of {ROUNDS} rounds"
    )
    print(" | ".join(["network, batch", "ms per plain step", *list(VARIANTS)[1:], "activations, MB: plain, pruned"]))
    cases = [
        ("LeNet-5, 128", LeNet5, (128, 1, 28, 28), 50),
        ("AlexNet, 32", AlexNet, (32, 3, 32, 32), 6),
        ("AlexNet, 128", AlexNet, (128, 3, 32, 32), 4),
        ("ResNet-18, 32", ResNet18, (32, 3, 32, 32), 4),
    ]
    for title, network, shape, steps in [case for case in cases if not sys.argv[1:] or sys.argv[1] in case[0]]:
        batches = Batches(shape, steps)
        times: dict[str, list[float]] = {name: [] for name in VARIANTS}
        for _ in range(ROUNDS):
            for name, callbacks in VARIANTS.items():
                times[name].append(seconds_per_step(network, batches, callbacks()))
        plain = times.pop("plain")
        ratios = [statistics.median(a / b for a, b in zip(other, plain, strict=True)) for other in times.values()]
        held = [
            f"{activation_bytes(network, batches, VARIANTS[name]()) / 2**20:.1f}"
            for name in ("masks", "masks, pruned activations")
        ]
        figures = [f"{1000 * statistics.median(plain):.2f}", *(f"{ratio:.3f}x" for ratio in ratios), ", ".join(held)]
        print(" | ".join([title, *figures]), flush=True)


if __name__ == "__main__":
    main()
