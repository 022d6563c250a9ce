"""Mask agreement, regrowth and density excess: counts by hand, and what a federation logs of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_fedsparse import FederatedLoop
from lightning_fedsparse.callbacks import MaskMonitor, TopKAfterTraining, feddip
from lightning_fedsparse.masks import intersection_over_union
from lightning_fedsparse.metrics import DensityExcess, MaskAgreement, WeightRegrowth
from lightning_fedsparse.schedules import ConstantSchedule
from tests.test_loop import QUIET, Net, clients, loaders

FIRST = {"w": torch.tensor([0.9, 0, 0, 0.4]) != 0}
SECOND = {"w": torch.tensor([0.5, -0.3, 0, 0]) != 0}


def agreement(*sets: dict[str, Tensor]) -> float:
    metric = MaskAgreement()
    for masks in sets:
        metric.update(masks)
    return float(metric.compute())


def test_agreement_of_two_clients() -> None:
    assert agreement(FIRST, SECOND) == pytest.approx(1 / 3)
    assert agreement(FIRST, FIRST) == 1.0
    assert agreement({"w": torch.zeros(3, dtype=torch.bool)}, {"w": torch.zeros(3, dtype=torch.bool)}) == 1.0


@given(st.integers(2, 5), st.integers(1, 9), st.integers(0, 50))
def test_agreement_over_all_pairs(sets: int, size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    masks = [{"a": torch.rand(size, generator=generator) < 0.5, "dense": None} for _ in range(sets)]
    bare = [{"a": one["a"]} for one in masks]
    pairs = [(a["a"], b["a"]) for i, a in enumerate(masks) for b in masks[i + 1 :]]
    either = sum(int((a | b).sum()) for a, b in pairs)
    expected = sum(int((a & b).sum()) for a, b in pairs) / either if either else 1.0
    assert agreement(*masks) == pytest.approx(expected)
    if sets == 2:
        assert agreement(*masks) == pytest.approx(intersection_over_union(*bare))


def test_regrowth_in_both_directions() -> None:
    broadcast = {"w": torch.tensor([0.8, -0.075, 0, 0.3]) != 0}
    metric = WeightRegrowth()
    metric.update(broadcast, FIRST)
    assert {name: float(count) for name, count in metric.compute().items()} == {"activated": 0, "deactivated": 1}
    other = WeightRegrowth()
    other.update(broadcast, SECOND)
    assert {name: float(count) for name, count in other.compute().items()} == {"activated": 0, "deactivated": 1}
    metric.update({"w": torch.tensor([False, False, True, True])}, SECOND)
    assert {name: float(count) for name, count in metric.compute().items()} == {"activated": 1, "deactivated": 1.5}


def test_regrowth_from_and_to_dense() -> None:
    metric = WeightRegrowth()
    metric.update({"w": None, "v": SECOND["w"], "x": None}, {"w": FIRST["w"], "v": None, "x": None})
    assert {name: float(count) for name, count in metric.compute().items()} == {"activated": 2, "deactivated": 2}


def test_density_excess() -> None:
    metric = DensityExcess()
    metric.update({"w": torch.tensor([True, True, False, True, False])}, 0.7)  # keeps 3; round(3.5) = 4 zeros leave 1
    assert float(metric.compute()) == pytest.approx(0.4)
    metric.update({"w": torch.zeros(5, dtype=torch.bool)}, 0.7)
    assert float(metric.compute()) == pytest.approx(0.1)


def test_masks_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="expected masks over 4 weights, as the first set had, got 3"):
        agreement(FIRST, {"w": torch.ones(3, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"expected masks of the same names, got \['w'\] and \['v'\]"):
        WeightRegrowth().update(FIRST, {"v": FIRST["w"]})
    with pytest.raises(ValueError, match=r"expected masks of one shape for 'w', got \(4,\) and \(3,\)"):
        WeightRegrowth().update(FIRST, {"w": torch.ones(3, dtype=torch.bool)})


# -- in a federation ---------------------------------------------------------------------------------------------------


def run(callbacks: list, rounds: int = 3) -> FederatedLoop:
    torch.manual_seed(0)
    loop = FederatedLoop(rounds, 3, callbacks, {"max_epochs": 2}, evaluation=QUIET, console=False)
    loop.fit(Net(), loaders(clients()))
    return loop


def test_what_a_federation_logs_per_round() -> None:
    uploads: list[list[dict[str, Tensor]]] = []

    class Spy(MaskMonitor):
        def on_server_receive(self, state, server_round, update):
            super().on_server_receive(state, server_round, update)
            if server_round.index == len(uploads):
                uploads.append([{name: state.masks[name] for name in self._names}])
            uploads[-1].append({name: update.masks[name] for name in self._names})

    loop = run([TopKAfterTraining(ConstantSchedule(0.8)), Spy()])
    first, second, third = (record.metrics for record in loop.history[1:])
    assert set(first) == {"density_excess", "mask_agreement/clients"}
    assert set(second) == {
        "density_excess",
        "mask_agreement/clients",
        "mask_agreement/rounds",
        "regrowth/activated",
        "regrowth/deactivated",
    }
    assert set(third) == set(second)
    broadcast, *sent = uploads[1]
    back = [sum(int((masks[n] & ~broadcast[n]).sum()) for n in masks) for masks in sent]
    gone = [sum(int((broadcast[n] & ~masks[n]).sum()) for n in masks) for masks in sent]
    assert second["regrowth/activated"] == pytest.approx(sum(back) / 3)
    assert sum(back) > 0  # plain weights do return
    assert second["regrowth/deactivated"] == pytest.approx(sum(gone) / 3)
    after = uploads[2][0]
    assert second["mask_agreement/rounds"] == pytest.approx(intersection_over_union(broadcast, after))
    assert second["mask_agreement/clients"] == pytest.approx(agreement(*sent))
    # 176 weights, 35 of them kept by a client
    kept = sum(int(mask.sum()) for mask in after.values())
    assert second["density_excess"] == pytest.approx((kept - 35) / 176)


def test_shared_masks_agree_and_masks_that_stand_still_show_no_regrowth() -> None:
    callbacks = [*feddip(sparsity=0.5, initial_sparsity=0.5, reconfigure_every=10), MaskMonitor(exclude=["last.*"])]
    for record in run(callbacks).history[1:]:
        assert record.metrics["mask_agreement/clients"] == 1.0
        assert record.metrics["mask_agreement/rounds"] == 1.0
        assert record.metrics["regrowth/activated"] == 0.0


def test_a_dense_federation_has_nothing_to_log() -> None:
    assert all(record.metrics == {} for record in run([MaskMonitor()]).history)
