"""Screening: sizes and directions by hand, and against dense tensors."""

import math

import pytest
import torch

from lightning_fedsparse.screening import Screen, Screening, alignment, change_of, size_of, too_large
from lightning_fedsparse.update import SparseUpdate, reconstruct

MASK = torch.tensor([True, False, True, False])
WEIGHTS = {"w": torch.tensor([1.0, 2.0, 3.0, 4.0])}


def update(values, mask=MASK, **fields):
    return SparseUpdate({"w": torch.tensor(values)}, {"w": mask}, **fields)


@pytest.mark.parametrize(
    ("one", "change", "where"),
    [
        (update([2.0, 5.0], absent="unchanged"), [1.0, 2.0], [0, 2]),
        (update([2.0, 5.0], absent="zero"), [1.0, -2.0, 2.0, -4.0], None),
        (update([2.0, 5.0], kind="delta", absent="unheld"), [2.0, 5.0], [0, 2]),
        (update([2.0, 5.0], kind="delta", absent="zero"), [2.0, 5.0], [0, 2]),
        (update([2.0, 2.0, 2.0, 2.0], None), [1.0, 0.0, -1.0, -2.0], None),
        (update([2.0, 2.0, 2.0, 2.0], None, kind="delta"), [2.0, 2.0, 2.0, 2.0], None),
    ],
)
def test_a_change_is_what_the_server_would_see(one, change, where):
    found, positions = change_of(WEIGHTS, one)["w"]
    assert found.tolist() == change
    assert (None if positions is None else positions.tolist()) == where
    dense = torch.zeros(4, dtype=torch.float64)
    dense[slice(None) if positions is None else positions] = found
    assert torch.equal(dense.float(), reconstruct(WEIGHTS, one)["w"] - WEIGHTS["w"])


def test_sizes_of_clients_of_different_size_compare():
    change = change_of(WEIGHTS, update([4.0, 7.0]))  # 3 and 4 at two weights
    assert size_of(change) == pytest.approx(math.sqrt(25 / 2))
    assert size_of(change_of(WEIGHTS, update([], torch.zeros(4, dtype=torch.bool)))) == 0.0
    everywhere = change_of(WEIGHTS, update([1.0, 1.0, 1.0, 1.0], None, kind="delta"))
    small = change_of(WEIGHTS, update([1.0, 1.0], kind="delta"))
    assert size_of(everywhere) == size_of(small) == 1.0


def test_the_median_is_not_moved_by_what_is_too_large():
    assert too_large([1.0, 1e9, 1.1, 0.9, 1e12], multiple=3.0) == [False, True, False, False, True]
    assert too_large([0.0, 0.0, 0.0], multiple=3.0) == [False, False, False]


def test_alignment_is_the_cosine_to_the_sum_of_the_others_directions():
    generator = torch.Generator().manual_seed(0)
    changes = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    units = changes / changes.norm(dim=1, keepdim=True)
    for number, change in enumerate(changes):
        others = units.sum(0) - units[number]
        expected = float(torch.nn.functional.cosine_similarity(change, others, dim=0))
        assert alignment({"w": (change, None)}, {"w": units.sum(0)}) == pytest.approx(expected)
        held = torch.tensor([0, 2])
        part = change[held]
        rest = units.sum(0)[held] - part / part.norm()
        expected = float(torch.nn.functional.cosine_similarity(part, rest, dim=0))
        assert alignment({"w": (part, held)}, {"w": units.sum(0)}) == pytest.approx(expected)
    nothing = torch.zeros(4, dtype=torch.float64)
    assert alignment({"w": (nothing, None)}, {"w": units.sum(0)}) == 0.0


def screened(screen, *values):
    uploads = {f"c{number}": update(value, None, kind="delta") for number, value in enumerate(values)}
    screening = Screening(screen, WEIGHTS)
    for client_id, one in uploads.items():
        screening.see(client_id, one)
    return screening.refused(uploads.items())


def test_who_is_refused_and_why():
    ones, far, back = [1.0, 1.0, 1.0, 1.0], [9.0, 9.0, 9.0, 9.0], [-1.0, -1.0, -1.0, -1.0]
    assert screened(Screen(norm=5.0), ones, ones, far) == {
        "c2": "expected a change per weight of at most 5 times the cohort's median 1, got 9"
    }
    assert screened(Screen(norm=10.0), ones, ones, far) == {}
    assert screened(Screen(cosine=0.0), ones, ones, far, back) == {
        "c3": "expected a cosine of at least 0 to the others' direction, got -1"
    }
    assert list(screened(Screen(norm=5.0, cosine=0.0), ones, back, ones, ones, far)) == ["c4", "c1"]
    assert screened(Screen(norm=2.0, cosine=0.9), ones, far) == {}  # nobody can say which of two is wrong
