r"""A mean with Gaussian noise: no client moves it by more than a bound, and noise of a multiple of that hides who did.

Every client's change, all its weights together, is shortened to an L2 norm of at most :math:`S`; the mean of a weight that
:math:`c_i` clients hold then gets noise of standard deviation :math:`z S / c_i`:

.. math:: \tilde d_i = \frac{1}{c_i} \Big( \sum_{c \in H_i} d_{c,i} \min(1, S / \lVert d_c \rVert) + \mathcal N(0, z^2 S^2) \Big)

All clients hold every weight, and noise falls on all of them: what a client does not send it does not change, or pruned
to zero. Where the server cuts the submodels (FIARSE, HeteroFL, FedRolex), from the weights that all know and a client's
capacity, who holds what is no secret, and ``holders="masks"`` counts only them: weights that nobody holds get no noise and
keep their bits, and as the noise of :math:`k` weights has a norm of about :math:`z S \sqrt k`, small submodels lose less to
it. Masks that clients move by their data (FedDST, what grows back under FedDIP) must not be counted like that.

Against a client being replaced by one that changes nothing, in one round, this is the Gaussian mechanism with noise
multiplier :math:`z`. What a whole run gives away is for an accountant to say, from :math:`z`, the rounds and the share of clients per
round; it is not in here, and those for Poisson sampling are approximations where cohorts have a fixed size. Noise covers the
mean alone, and not what else comes of uploads: losses and numbers of examples in the record, what a ``Screen`` refuses, who
failed, and what methods gather on the server to move masks by. NumPy's generator is none for cryptography.

Reference: H. B. McMahan, D. Ramage, K. Talwar, L. Zhang, "Learning Differentially Private Recurrent Language Models", ICLR 2018,
https://arxiv.org/abs/1710.06963. Holders in place of all clients are our own.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import numpy as np
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
        holders: Of a weight: ``"all"`` clients, or those whose masks keep it (``"masks"``), where masks tell nothing of data.
        seed: Of the noise, for experiments that are to repeat: it follows from the seed and the round's weights. None draws it
            from the system, which is what hides anything.

    Raises:
        ValueError: For a value out of range; for an update with buffers, whose statistics nothing would hide, or with values
            that are not finite.
    """

    def __init__(
        self, bound: float, noise: float, *, holders: Literal["all", "masks"] = "all", seed: int | None = None
    ) -> None:
        super().__init__()
        if not 0 < bound < math.inf:
            raise ValueError(f"expected bound above 0, got {bound}")
        if not 0 <= noise < math.inf:
            raise ValueError(f"expected noise of at least 0, got {noise}")
        if holders not in ("all", "masks"):
            raise ValueError(f"expected holders 'all' or 'masks', got {holders!r}")
        self.bound = bound
        self.noise = noise
        self.holders = holders
        self.seed = seed
        self._drawn = 0
        self._generator = np.random.default_rng(0)

    @override
    def start(self, template: Mapping[str, Tensor]) -> None:
        super().start(template)
        self._drawn = secrets.randbits(128) if self.seed is None else _seed_of(self.seed, template)

    @override
    @torch.no_grad()
    def add(self, update: SparseUpdate) -> None:
        template = self._started()
        positions_in(template, update)
        if update.buffers:
            raise ValueError(
                f"expected updates without buffers, which noise does not cover, got {min(update.buffers)!r}: take a network whose "
                "layers keep no statistics (track_running_stats=False), or buffers='local', whose global model has none"
            )
        # absent as if it were sent and did not change
        counted = replace(update, absent="unchanged") if (update.absent, self.holders) == ("unheld", "all") else update
        change = as_delta(template, counted)
        length = math.sqrt(sum(float(value.square().sum()) for value in change.values.values()))
        if not length < math.inf:
            raise ValueError(f"expected changes with a finite norm, got {length}")
        scale = min(1.0, self.bound / length) if length else 1.0
        super().add(replace(change, values={name: value * scale for name, value in change.values.items()}))

    @override
    def reduce(self, ranks: Ranks) -> None:
        super().reduce(ranks)
        self._drawn = ranks.share(self._drawn)[0]

    @override
    @torch.no_grad()
    def result(self) -> dict[str, Tensor]:
        self._generator = np.random.default_rng(self._drawn)
        return super().result()

    @override
    def _mean(self, old: Tensor, sums: Tensor, held: Tensor | None, total: int) -> Tensor:
        drawn = torch.from_numpy(self._generator.standard_normal(len(sums))).to(sums)
        return super()._mean(old, sums + drawn * (self.noise * self.bound), held, total)


def _seed_of(seed: int, template: Mapping[str, Tensor]) -> int:
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in template.items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return derive_seed(seed, "noise", digest.hexdigest())
