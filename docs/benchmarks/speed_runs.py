"""The runs of the speed page: which variants take turns, and what is checked of them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import torch
from speed_ours import Ours, SentAs, two_workers
from speed_peers import Peer
from speed_rivals import DeepCopies, Hand, HandInProcesses
from speed_tables import WARM_UP, Measured, interleaved, largest_difference
from speed_work import CIFAR10, Cohorts, Work

from lightning_fedsparse import FederatedDataModule
from lightning_fedsparse.callbacks import feddip
from lightning_fedsparse.schedules import Progress, StaircaseSchedule

__all__ = [
    "BARE",
    "BF16",
    "BOTH",
    "CHANNELS_LAST",
    "COPIES",
    "DIP",
    "FLOWER",
    "HAND",
    "ONE",
    "ONE_SENT",
    "PFL",
    "TWO",
    "TWO_SENT",
    "beside_peer",
    "on_gpu",
    "precision",
    "pruning",
    "scaling",
]

CHECKED = 3  # clients in a round after which weights are compared

HAND, BARE = "hand-written loop", "hand-written loop, two processes"
ONE, TWO = "one worker", "two workers"
ONE_SENT, TWO_SENT = "one worker, real payloads", "two workers, real payloads"
DIP, COPIES = "FedDIP's callbacks", "FedDIP by deep copies"
PFL, FLOWER = "pfl-research", "Flower"
BF16, CHANNELS_LAST, BOTH = "bf16-mixed", "channels last", "bf16-mixed, channels last"

# FedDIP's defaults, for the loop that does without its callbacks
RATE_DECAY, STRENGTH, LEVELS = 0.998, 1e-3, 20


def scaling(work: Work, wire: SentAs, rounds: int) -> Measured:
    """One process and two, hand-written and ours; where nothing is encoded, also with real payloads."""
    data = work.data()
    cohorts = Cohorts(work, data)
    of = partial(Ours.of, work, data, WARM_UP + rounds)
    with ExitStack() as stack:
        bare, executors = HandInProcesses(work, cohorts), [two_workers(), two_workers()]
        for processes in (bare, *executors):
            stack.callback(processes.stop)
        ours = {ONE: of(wire=wire), TWO: of(wire=wire, executor=executors[0])}
        if wire == "count":
            ours |= {ONE_SENT: of(), TWO_SENT: of(executor=executors[1])}
        seconds = interleaved({HAND: Hand(work, cohorts), BARE: bare, **ours}, rounds)
    apart = max(largest_difference(ours[ONE].weights, other.weights) for other in ours.values())
    return Measured(seconds, [*same_work(work), f"In the end the weights of ours differ by {apart:.1g}."])


def pruning(work: Work, wire: SentAs, rounds: int) -> Measured:
    """FedDIP by callbacks and as released, beside dense training."""
    data = work.data()
    cohorts = Cohorts(work, data)
    pair = feddip_pair(work, data, cohorts, wire, WARM_UP + rounds)
    variants = {HAND: Hand(work, cohorts), ONE: Ours.of(work, data, WARM_UP + rounds, wire=wire), **pair}
    return Measured(interleaved(variants, rounds), [*same_work(work), same_pruning(work)])


def feddip_pair(
    work: Work, data: FederatedDataModule, cohorts: Cohorts, wire: SentAs, total: int
) -> dict[str, DeepCopies | Ours]:
    callbacks = feddip(lambda_max=STRENGTH, lambda_levels=LEVELS, learning_rate_decay=RATE_DECAY)
    ours = Ours.of(work, data, total, callbacks, wire=wire)
    schedule = StaircaseSchedule(STRENGTH, LEVELS)
    # first, for it takes the masks that are in force before ours has its turn
    copies = DeepCopies(
        work,
        cohorts,
        lambda: {name.removeprefix("network."): mask for name, mask in ours.loop.state.masks.items()},
        lambda index: work.rate * RATE_DECAY**index,
        lambda index: schedule(Progress(index, total)),
    )
    return {COPIES: copies, DIP: ours}


def precision(rounds: int) -> Measured:
    """bfloat16 and another layout."""
    data, total = CIFAR10.data(), WARM_UP + rounds
    of = partial(Ours.of, CIFAR10, data, total, wire="count")
    variants = {
        ONE: of(),
        BF16: of(precision="bf16-mixed"),
        CHANNELS_LAST: of(channels_last=True),
        BOTH: of(precision="bf16-mixed", channels_last=True),
    }
    seconds = interleaved(variants, rounds)
    kept = all(variants[name].is_channels_last() for name in (CHANNELS_LAST, BOTH))
    layout = "The weights are still channels last after the run." if kept else "The layout did not survive the run."
    return Measured(seconds, [f"Training on {CIFAR10.images}.", layout])


def on_gpu(rounds: int) -> Measured:
    """One worker that trains on a GPU, and the hand-written loop there."""
    if not torch.cuda.is_available():
        raise SystemExit("expected a GPU for the table gpu, found none")
    data, total = CIFAR10.data(), WARM_UP + rounds
    of = partial(Ours.of, CIFAR10, data, total, accelerator="gpu")
    variants = {HAND: Hand(CIFAR10, Cohorts(CIFAR10, data), "cuda"), ONE: of(wire="count"), ONE_SENT: of()}
    return Measured(
        interleaved(variants, rounds), [f"Training on {CIFAR10.images}, on {torch.cuda.get_device_name()}."]
    )


def beside_peer(
    name: str, module: str, options: Sequence[str], rounds: int, *, channels_last: bool = False
) -> Measured:
    """A peer's simulator on the CIFAR-10 workload, and ours in its layout."""
    data = CIFAR10.data()
    of = partial(Ours.of, CIFAR10, data, WARM_UP + rounds, channels_last=channels_last)
    with ExitStack() as stack:
        peer, executors = Peer(module, CIFAR10, *options), [two_workers(), two_workers()]
        for processes in (peer, *executors):
            stack.callback(processes.stop)
        ours = {
            ONE: of(wire="count"),
            TWO: of(wire="count", executor=executors[0]),
            TWO_SENT: of(executor=executors[1]),
        }
        seconds = interleaved({HAND: Hand(CIFAR10, Cohorts(CIFAR10, data)), name: peer, **ours}, rounds)
    return Measured(seconds, [f"Training on {CIFAR10.images}.", f"{name} is version {peer.version}."])


def same_work(work: Work) -> list[str]:
    """How far ours and the hand-written loop are apart after a round of a few clients."""
    work = replace(work, cohort=CHECKED, dropout=False)
    data = work.data()
    hand, ours = Hand(work, Cohorts(work, data)), Ours.of(work, data, 1)
    hand.round(0)
    ours.round(0)
    apart = largest_difference(ours.weights, hand.weights)
    check = (
        f"After a round of {CHECKED} clients without dropout one worker's weights and the hand-written loop's differ by"
    )
    return [f"Training on {work.images}.", f"{check} at most {apart:.1g}."]


def same_pruning(work: Work) -> str:
    """How far FedDIP's two ways are apart after two rounds of a few clients, the second of which has a norm penalty."""
    work = replace(work, cohort=CHECKED, dropout=False)
    data = work.data()
    pair = feddip_pair(work, data, Cohorts(work, data), None, LEVELS)
    masks = pair[DIP].loop.state.masks
    for index in range(2):
        for way in pair.values():
            way.round(index)
    kept = [
        weight if mask is None else weight * mask
        for weight, mask in zip(pair[COPIES].weights, masks.values(), strict=True)
    ]
    return (
        f"FedDIP's two ways differ by at most {largest_difference(pair[DIP].weights, kept):.1g} after two such rounds."
    )
