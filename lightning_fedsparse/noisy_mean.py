r"""A mean with Gaussian noise: no client moves it by more than a bound, and noise as large as a multiple of that hides who it was.

Every client's change, all its weights together, is shortened to an L2 norm of at most :math:`S`; the mean of a weight that
:math:`c_i` clients hold then gets noise of standard deviation :math:`z S / c_i`:

.. math:: \tilde d_i = \frac{1}{c_i} \Big( \sum_{c \in H_i} d_{c,i} \min(1, S / \lVert d_c \rVert) + \mathcal N(0, z^2 S^2) \Big)

A weight that nobody holds gets no noise, and keeps its bits: the noise of a submodel of :math:`k` weights has a norm of about
:math:`z S \sqrt k`, so that small submodels lose less to it. Who holds what must not depend on data: that is so where the
server cuts the submodel (absent ``"unheld"``: FIARSE, HeteroFL, FedRolex). Of other uploads what is absent is no change, or a
weight of zero, and all clients count as holders: noise then falls on every weight, and sparse methods lose their zeros.

Against a client being replaced by one that changes nothing, in one round, this is the Gaussian mechanism with noise
multiplier :math:`z`. What a whole run gives away is for an accountant to say, from :math:`z`, the rounds and the share of clients per
round; it is not in here, and those for Poisson sampling are approximations where cohorts have a fixed size. Nor does noise
cover what else clients tell the server: their training loss, their numbers of examples, who took part.

Reference: H. B. McMahan, D. Ramage, K. Talwar, L. Zhang, "Learning Differentially Private Recurrent Language Models", ICLR 2018,
https://arxiv.org/abs/1710.06963. Holders in place of all clients are our own.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from typing_extensions import override

from lightning_fedsparse.aggregation import MaskedMean
from lightning_fedsparse.ranks import Ranks
from lightning_fedsparse.seeding import derive_seed
from lightning_fedsparse.update import SparseUpdate, as_delta, positions_in

__all__ = ["NoisyMean"]


class NoisyMean(MaskedMean):
    """Mean over holders, all alike, of bounded changes, with Gaussian noise.

    Args:
        bound: S, the largest L2 norm of a client's change.
        noise: z, the noise multiplier; 0 for bounded changes alone.
        seed: Of the noise, for experiments that are to repeat: it follows from the seed and the round's weights. None draws it
            from the system, which is what hides anything.

    Raises:
        ValueError: For numbers out of range; for an update with buffers, whose statistics nothing would hide.
    """

    def __init__(self, bound: float, noise: float, *, seed: int | None = None) -> None:
        super().__init__()
        if not 0 < bound < math.inf:
            raise ValueError(f"expected bound above 0, got {bound}")
        if not 0 <= noise < math.inf:
            raise ValueError(f"expected noise of at least 0, got {noise}")
        self.bound = bound
        self.noise = noise
        self.seed = seed
        self._drawn = 0

    @override
    def start(self, template: Mapping[str, Tensor]) -> None:
        super().start(template)
        self._drawn = secrets.randbits(63) if self.seed is None else _seed_of(self.seed, template)

    @override
    @torch.no_grad()
    def add(self, update: SparseUpdate) -> None:
        template = self._started()
        positions_in(template, update)
        if update.buffers:
            raise ValueError(
                f"expected updates without buffers, which noise does not cover, got {min(update.buffers)!r}: keep them with the "
                "clients (buffers='local') or use a network without BatchNorm"
            )
        change = as_delta(template, update)
        if update.absent != "unheld":
            change = _held_by_all(template, change)
        length = math.sqrt(sum(float(value.double().square().sum()) for value in change.values.values()))
        scale = min(1.0, self.bound / length) if length else 1.0
        super().add(replace(change, values={name: value * scale for name, value in change.values.items()}))

    @override
    def reduce(self, ranks: Ranks) -> None:
        super().reduce(ranks)
        self._drawn = ranks.share(self._drawn)[0]

    @override
    @torch.no_grad()
    def result(self) -> dict[str, Tensor]:
        self._generator = torch.Generator().manual_seed(self._drawn)
        return super().result()

    @override
    def _mean(self, old: Tensor, sums: Tensor, held: Tensor | None, total: int) -> Tensor:
        drawn = torch.randn(sums.shape, generator=self._generator, dtype=sums.dtype).to(sums.device)
        return super()._mean(old, sums + drawn * (self.noise * self.bound), held, total)


def _held_by_all(template: Mapping[str, Tensor], change: SparseUpdate) -> SparseUpdate:
    values = dict(change.values)
    for name, mask in change.masks.items():
        if mask is not None:
            flat = values[name].new_zeros(template[name].numel())
            values[name] = flat.index_copy_(0, change.positions(name), values[name]).view(template[name].shape)
    return replace(change, values=values, masks=dict.fromkeys(values))


def _seed_of(seed: int, template: Mapping[str, Tensor]) -> int:
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in template.items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return derive_seed(seed, "noise", digest.hexdigest())
