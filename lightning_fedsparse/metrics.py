"""How masks agree, what returns and what leaves, and how much denser a model is than its target: torchmetrics.

Masks are bool tensors by name (True = kept); None stands for a dense tensor, whose entries are all kept.

Reference: "SparsyFed", ICLR 2025, https://arxiv.org/abs/2504.05153, whose notebooks compare the masks of rounds by
intersection over union and count the weights that local training and pruning activate and deactivate.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = ["DensityExcess", "MaskAgreement", "WeightRegrowth"]

Masks = Mapping[str, Tensor | None]


class MaskAgreement(Metric):
    r"""Intersection over union of masks, over all pairs of the mask sets given.

    .. math:: \sum_{a<b} |M_a \cap M_b| \Big/ \sum_{a<b} |M_a \cup M_b|

    For two sets that is their IoU. It needs one count per weight, however many sets there are; sets that are all empty agree
    (1.0). Dense tensors are left out.

    Example:
        >>> agreement = MaskAgreement()
        >>> agreement.update({"a": torch.tensor([True, True, False])})
        >>> agreement.update({"a": torch.tensor([False, True, True])})
        >>> agreement.compute()
        tensor(0.3333, dtype=torch.float64)
    """

    full_state_update = False
    holders: Tensor
    sets: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("holders", torch.zeros(0, dtype=torch.int32), dist_reduce_fx="sum")
        self.add_state("sets", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, masks: Masks) -> None:
        """Add one set of masks, of the same names and shapes as the others.

        Raises:
            ValueError: If the number of masked weights differs from that of the sets before.
        """
        flat = torch.cat([torch.zeros(0, dtype=torch.bool), *(m.reshape(-1) for m in masks.values() if m is not None)])
        if self.sets and flat.numel() != self.holders.numel():
            raise ValueError(
                f"expected masks over {self.holders.numel()} weights, as the first set had, got {flat.numel()}"
            )
        held = flat.to(self.holders.device, torch.int32)
        self.holders = self.holders + held if self.sets else held
        self.sets = self.sets + 1

    def compute(self) -> Tensor:
        """Share of the weights kept by either of a pair that both keep, in [0, 1]; 0-dim float64."""
        holders = self.holders.to(torch.float64)
        others = self.sets - holders
        pairs = self.sets * (self.sets - 1) / 2
        both = (holders * (holders - 1) / 2).sum()
        either = (pairs - others * (others - 1) / 2).sum()
        return both / either if either > 0 else torch.ones((), dtype=torch.float64, device=holders.device)


class WeightRegrowth(Metric):
    """Weights that come back and weights that leave between two supports, on average over the updates.

    Example:
        >>> regrowth = WeightRegrowth()
        >>> regrowth.update({"a": torch.tensor([True, False, False])}, {"a": torch.tensor([False, True, True])})
        >>> regrowth.compute()
        {'activated': tensor(2., dtype=torch.float64), 'deactivated': tensor(1., dtype=torch.float64)}
    """

    full_state_update = False
    activated: Tensor
    deactivated: Tensor
    updates: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for state in ("activated", "deactivated", "updates"):
            self.add_state(state, torch.tensor(0), dist_reduce_fx="sum")

    def update(self, before: Masks, after: Masks) -> None:
        """Compare a support with the one it became, over the names of both.

        Raises:
            ValueError: If names or shapes differ.
        """
        if before.keys() != after.keys():
            raise ValueError(f"expected masks of the same names, got {sorted(before)} and {sorted(after)}")
        for name, old in before.items():
            new = after[name]
            if old is not None and new is not None and old.shape != new.shape:
                shapes = f"{tuple(old.shape)} and {tuple(new.shape)}"
                raise ValueError(f"expected masks of one shape for {name!r}, got {shapes}")
            if old is not None:
                self.activated = self.activated + ((~old).sum() if new is None else (new & ~old).sum())
            if new is not None:
                self.deactivated = self.deactivated + ((~new).sum() if old is None else (old & ~new).sum())
        self.updates = self.updates + 1

    def compute(self) -> dict[str, Tensor]:
        """Mean counts per update: ``activated`` (zero to kept) and ``deactivated`` (kept to zero); float64."""
        updates = self.updates.to(torch.float64)
        return {"activated": self.activated / updates, "deactivated": self.deactivated / updates}


class DensityExcess(Metric):
    """Share of the weights that masks keep beyond ``n - round(sparsity * n)``; the mean over the updates.

    Example:
        >>> excess = DensityExcess()
        >>> excess.update({"a": torch.tensor([True, True, True, False])}, sparsity=0.5)
        >>> excess.compute()  # 3 are kept instead of 2, of 4
        tensor(0.2500, dtype=torch.float64)
    """

    full_state_update = False
    excess: Tensor
    updates: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("excess", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("updates", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, masks: Mapping[str, Tensor], sparsity: float) -> None:
        """Hold masks against a target.

        Args:
            masks: Masks of all weights that the target is about.
            sparsity: Target fraction of zeros, in [0, 1).
        """
        total = sum(mask.numel() for mask in masks.values())
        kept = sum(int(mask.count_nonzero()) for mask in masks.values())
        self.excess = self.excess + (kept - (total - round(sparsity * total))) / total
        self.updates = self.updates + 1

    def compute(self) -> Tensor:
        """Mean excess density; negative where masks keep fewer; 0-dim float64."""
        return self.excess / self.updates
