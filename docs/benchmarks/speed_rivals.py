"""What the loop is held against: hand-written federated averaging in one process and in two, and FedDIP's released style.

The hand-written loop is as good as we could make it without leaving PyTorch: one resident network whose weights are
overwritten in place, batches that lie ready in memory, no optimizer object, fused updates over all tensors, sums in place. It
sends, checks and records nothing.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection

import torch
import torch.nn.functional as F
from speed_work import Batch, Cohorts, Work
from torch import Tensor, multiprocessing, nn

__all__ = ["DeepCopies", "Hand", "HandInProcesses"]


def train_clients(
    network: nn.Module,
    weights: Sequence[Tensor],
    total: Sequence[Tensor],
    clients: Iterable[Iterable[Batch]],
    *,
    rate: float,
    decay: float,
) -> None:
    """Train clients one after the other from the same weights, and add what becomes of them to ``total``."""
    parameters = list(network.parameters())
    device = parameters[0].device
    with torch.no_grad():
        for batches in clients:
            torch._foreach_copy_(parameters, weights)
            for images, classes in batches:
                images, classes = images.to(device), classes.to(device)
                with torch.enable_grad():
                    loss = F.cross_entropy(network(images), classes)
                gradients = torch.autograd.grad(loss, parameters)
                if decay:
                    torch._foreach_add_(gradients, parameters, alpha=decay)
                torch._foreach_add_(parameters, gradients, alpha=-rate)
            torch._foreach_add_(total, parameters)


class Hand:
    """The hand-written loop in this process.

    Attributes:
        weights: The global model.
    """

    def __init__(self, work: Work, cohorts: Cohorts, device: str = "cpu") -> None:
        self._work = work
        self._cohorts = cohorts
        self._network = work.new_network().to(device)
        self.weights = [parameter.detach().clone() for parameter in self._network.parameters()]
        self._total = [torch.zeros_like(weight) for weight in self.weights]

    def round(self, index: int) -> float:
        """Run a round; its seconds."""
        clients = self._cohorts.ready(index)
        started = time.perf_counter()
        torch._foreach_zero_(self._total)
        train_clients(self._network, self.weights, self._total, clients, rate=self._work.rate, decay=self._work.decay)
        torch._foreach_div_(self._total, len(clients))
        torch._foreach_copy_(self.weights, self._total)
        float(self.weights[0].sum())  # a GPU has then done all of it
        return time.perf_counter() - started


class HandInProcesses:
    """The hand-written loop in two processes, each pinned to a core and with half of the cohort; weights are shared memory."""

    def __init__(self, work: Work, cohorts: Cohorts) -> None:
        self._cohorts = cohorts
        self.weights = [_shared(parameter.detach()) for parameter in work.new_network().parameters()]
        cores = sorted(os.sched_getaffinity(0))[:2]
        self._totals = [[_shared(weight) for weight in self.weights] for _ in cores]
        work = replace(work)  # without the images that it has read
        context = multiprocessing.get_context("spawn")
        self._connections: list[Connection] = []
        for core, total in zip(cores, self._totals, strict=True):
            ours, theirs = context.Pipe()
            context.Process(target=_serve, args=(theirs, core, work, self.weights, total), daemon=True).start()
            self._connections.append(ours)

    def round(self, index: int) -> float:
        """Run a round; its seconds, which the batches' way to the processes is not among."""
        clients = self._cohorts.ready(index)
        processes = len(self._connections)
        for number, connection in enumerate(self._connections):
            connection.send(clients[number::processes])
        self._hear()
        started = time.perf_counter()
        for connection in self._connections:
            connection.send(None)
        self._hear()
        first, *others = self._totals
        for other in others:
            torch._foreach_add_(first, other)
        torch._foreach_div_(first, len(clients))
        torch._foreach_copy_(self.weights, first)
        return time.perf_counter() - started

    def stop(self) -> None:
        """Let the processes end."""
        for connection in self._connections:
            connection.close()

    def _hear(self) -> None:
        for connection in self._connections:
            connection.recv()


def _shared(tensor: Tensor) -> Tensor:
    return tensor.clone().share_memory_()


def _serve(connection: Connection, core: int, work: Work, weights: list[Tensor], total: list[Tensor]) -> None:
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    network = work.new_network()
    while True:
        try:
            clients = connection.recv()
        except EOFError:
            return
        clients = [[(images.clone(), classes.clone()) for images, classes in batches] for batches in clients]
        connection.send(None)  # here they are
        connection.recv()
        torch._foreach_zero_(total)
        train_clients(network, weights, total, clients, rate=work.rate, decay=work.decay)
        connection.send(None)


class DeepCopies:
    """FedDIP's local steps as its released code does them, in the hand-written loop.

    Each minibatch deep-copies the network, multiplies the copy by the masks, copies its gradients back, and runs the dense
    network a second time for a loss to print (https://github.com/EricLoong/feddip, ``train_model`` in ``client.py``). Batches
    lie ready in memory, which there they do not.

    Args:
        work: The workload.
        cohorts: Its batches.
        masks: Gives the masks in force, by parameter name.
        rate: Learning rate in a round.
        strength: Of the norm penalty in a round.
    """

    def __init__(
        self,
        work: Work,
        cohorts: Cohorts,
        masks: Callable[[], Mapping[str, Tensor | None]],
        rate: Callable[[int], float],
        strength: Callable[[int], float],
    ) -> None:
        self._work = work
        self._cohorts = cohorts
        self._masks = masks
        self._rate = rate
        self._strength = strength
        self._network = work.new_network()
        self.weights = [parameter.detach().clone() for parameter in self._network.parameters()]
        self._started = False

    def round(self, index: int) -> float:
        """Run a round; its seconds."""
        clients = self._cohorts.ready(index)
        masks = {name: mask for name, mask in self._masks().items() if mask is not None}
        started = time.perf_counter()
        parameters = dict(self._network.named_parameters())
        with torch.no_grad():
            for (name, _), weight in zip(parameters.items(), self.weights, strict=True):
                if name in masks:
                    weight.mul_(masks[name])
        total = [torch.zeros_like(weight) for weight in self.weights]
        for batches in clients:
            with torch.no_grad():
                torch._foreach_copy_(list(parameters.values()), self.weights)
            optimizer = self._work.optimizer(parameters.values(), lr=self._rate(index))
            for images, classes in batches:
                self._step(optimizer, images, classes, masks, self._strength(index))
            torch._foreach_add_(total, [parameter.detach() for parameter in parameters.values()])
        torch._foreach_div_(total, len(clients))
        self.weights = total
        return time.perf_counter() - started

    def _step(
        self,
        optimizer: torch.optim.Optimizer,
        images: Tensor,
        classes: Tensor,
        masks: Mapping[str, Tensor],
        strength: float,
    ) -> None:
        optimizer.zero_grad()
        pruned = copy.deepcopy(self._network)
        kept = dict(pruned.named_parameters())
        with torch.no_grad():
            for name, mask in masks.items():
                kept[name].mul_(mask)
        loss = F.cross_entropy(pruned(images), classes)
        for name in masks:
            loss = loss + strength * kept[name].norm()
        loss.backward()
        for parameter, other in zip(self._network.parameters(), pruned.parameters(), strict=True):
            assert other.grad is not None
            parameter.grad = other.grad.clone()
        printed = F.cross_entropy(self._network(images), classes)
        optimizer.step()
        printed.item()
