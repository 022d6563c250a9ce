import random
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_fedsparse.sampling import UniformSampling

IDS = [f"client-{i}" for i in range(50)]


def test_pinned_cohort():
    # a change here changes which clients every recorded run met
    assert UniformSampling().sample(IDS, 5, seed=0, round_index=0) == [
        "client-15",
        "client-5",
        "client-9",
        "client-0",
        "client-18",
    ]


def test_seed_and_round_alone_decide():
    first = UniformSampling().sample(IDS, 5, seed=0, round_index=3)
    assert first == UniformSampling().sample(tuple(IDS), 5, seed=0, round_index=3)
    assert first != UniformSampling().sample(IDS, 5, seed=1, round_index=3)
    assert first != UniformSampling().sample(IDS, 5, seed=0, round_index=4)


@settings(deadline=None)
@given(count=st.integers(1, 50), seed=st.integers(0, 2**64), round_index=st.integers(0, 10**6))
def test_cohorts_are_distinct_known_clients(count, seed, round_index):
    cohort = UniformSampling().sample(IDS, count, seed=seed, round_index=round_index)
    assert len(cohort) == len(set(cohort)) == count
    assert set(cohort) <= set(IDS)


def test_every_client_and_every_place_is_equally_likely():
    cohorts = [UniformSampling().sample(IDS[:10], 3, seed=0, round_index=i) for i in range(3000)]
    taken = Counter(client for cohort in cohorts for client in cohort)
    first = Counter(cohort[0] for cohort in cohorts)
    # 900 and 300 expected, standard deviations 25 and 16
    assert all(abs(taken[client] - 900) < 5 * 25 for client in IDS[:10])
    assert all(abs(first[client] - 300) < 5 * 16 for client in IDS[:10])


def test_global_generators_neither_matter_nor_move():
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    UniformSampling().sample(IDS, 5, seed=0, round_index=0)
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


class ManyIds(Sequence):
    """A million ids that count how many of them are looked at."""

    looked_at = 0

    def __len__(self):
        return 1_000_000

    def __getitem__(self, index):
        self.looked_at += 1
        return f"c{index}"


def test_only_the_drawn_ids_are_looked_at():
    ids = ManyIds()
    assert len(UniformSampling().sample(ids, 10, seed=0, round_index=0)) == 10
    assert ids.looked_at == 10


@pytest.mark.parametrize("count", [0, -3])
def test_empty_cohort(count):
    with pytest.raises(ValueError, match=f"expected at least 1 client per round, got {count}"):
        UniformSampling().sample(IDS, count, seed=0, round_index=0)


def test_more_than_there_are():
    with pytest.raises(ValueError, match="expected at most 50 clients per round, as many as there are, got 51"):
        UniformSampling().sample(IDS, 51, seed=0, round_index=0)


@given(count=st.integers(1, 20), asked=st.integers(0, 30), draw=st.integers(0, 5), seed=st.integers(0, 2**64))
def test_a_further_draw_takes_others(count, asked, draw, seed):
    before = IDS[:asked]
    cohort = UniformSampling().sample(IDS, count, seed=seed, round_index=3, draw=draw, excluded=before)
    assert len(cohort) == len(set(cohort)) == count
    assert set(cohort) <= set(IDS) - set(before)


def test_further_draws_are_as_uniform_and_differ():
    draws = [
        UniformSampling().sample(IDS[:10], 3, seed=0, round_index=i, draw=1, excluded=IDS[:4]) for i in range(2000)
    ]
    taken = Counter(client for cohort in draws for client in cohort)
    # 1000 of each expected, standard deviation 22
    assert taken.keys() == set(IDS[4:10])
    assert all(abs(count - 1000) < 5 * 22 for count in taken.values())
    first, second = (UniformSampling().sample(IDS, 10, seed=0, round_index=0, draw=draw) for draw in (0, 1))
    assert first != second


def test_more_than_are_left():
    with pytest.raises(ValueError, match="expected at most 10 clients per round, as many as there are, got 11"):
        UniformSampling().sample(IDS, 11, seed=0, round_index=0, excluded=IDS[:40])
