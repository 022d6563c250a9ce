"""What a pruned training step with error feedback costs: the ratio to the same step without callbacks.

    python docs/benchmarks/step_cost.py               # all networks
    python docs/benchmarks/step_cost.py LeNet-5       # one of them

Both variants run in the same Trainer set-up on the same ready batches, interleaved in one process on one thread; the
figures are medians over the rounds of one run. Only the ratios mean anything on another machine.
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

from lightning_fedsparse.callbacks import ErrorFeedback, IncrementalRegularization, MagnitudePruning
from lightning_fedsparse.models import AlexNet, ImageClassifier, LeNet5, ResNet18
from lightning_fedsparse.quiet import QUIET_TRAINER, quiet_lightning
from lightning_fedsparse.schedules import ConstantSchedule

NEVER_AGAIN = 10**9  # the masks are made once: a step is measured, not a reconfiguration


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


def pruning() -> list[pl.Callback]:
    return [MagnitudePruning(ConstantSchedule(0.95), every=NEVER_AGAIN, fold=False), ErrorFeedback()]


def with_penalty() -> list[pl.Callback]:
    return [*pruning(), IncrementalRegularization(ConstantSchedule(1e-3))]


def seconds_per_step(network: Callable[[], torch.nn.Module], batches: Batches, callbacks: list[pl.Callback]) -> float:
    torch.manual_seed(0)
    model = ImageClassifier(network(), partial(torch.optim.SGD, lr=0.01, weight_decay=5e-4))
    with quiet_lightning():
        trainer = pl.Trainer(**QUIET_TRAINER, max_epochs=1, accelerator="cpu", callbacks=callbacks)
        started = time.perf_counter()
        trainer.fit(model, batches)
    return (time.perf_counter() - started) / len(batches)


def main() -> None:
    torch.set_num_threads(1)
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, one thread, medians of 11 rounds")
    print("network, batch | ms per plain step | pruned, error feedback | and norm penalty")
    cases = [
        ("LeNet-5, 128", LeNet5, (128, 1, 28, 28), 50),
        ("AlexNet, 32", AlexNet, (32, 3, 32, 32), 5),
        ("ResNet-18, 32", ResNet18, (32, 3, 32, 32), 3),
    ]
    for title, network, shape, steps in [case for case in cases if not sys.argv[1:] or sys.argv[1] in case[0]]:
        batches = Batches(shape, steps)
        variants = {"plain": list, "pruned": pruning, "penalty": with_penalty}
        times: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(11):
            for name, callbacks in variants.items():
                times[name].append(seconds_per_step(network, batches, callbacks()))
        plain, pruned, penalty = (statistics.median(times[name]) for name in variants)
        print(f"{title} | {1000 * plain:.2f} | {pruned / plain:.3f}x | {penalty / plain:.3f}x", flush=True)


if __name__ == "__main__":
    main()
