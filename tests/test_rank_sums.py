"""What ranks tell each other, how their sums become the mean of all updates, and who trains whom."""

from threading import Thread

import pytest
import torch
from torch.distributed import HashStore

from lightning_fedsparse.aggregation import MaskedMean, WeightedMean
from lightning_fedsparse.clients import Client
from lightning_fedsparse.memories import HeldMemories
from lightning_fedsparse.ranks import Alone, GlooRanks
from lightning_fedsparse.sharding import Shards
from lightning_fedsparse.update import SparseUpdate


def on_ranks(size, do):
    """What a function of the ranks gives on each of several, which are threads here."""
    store, found = HashStore(), {}

    def one(rank):
        ranks = GlooRanks(store, rank, size, timeout=20)
        try:
            found[rank] = do(ranks)
        except Exception as error:  # noqa: BLE001
            found[rank] = error
        ranks.close()

    threads = [Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [found[rank] for rank in range(size)]


# -- what ranks tell each other ----------------------------------------------------------------------------------------


def test_every_rank_gets_what_all_have():
    assert on_ranks(3, lambda ranks: ranks.share("x" * ranks.rank)) == [["", "x", "xx"]] * 3


def test_the_first_gathers_and_deals():
    assert on_ranks(3, lambda ranks: ranks.gather({ranks.rank: None})) == [[{0: None}, {1: None}, {2: None}], [], []]
    assert on_ranks(3, lambda ranks: ranks.deal([5, 6, 7] if ranks.rank == 0 else [])) == [5, 6, 7]


def test_totals_by_name_are_those_of_all_and_nothing_counts_as_zero():
    def total(ranks):
        own = {"a": torch.tensor([1.5, 2.0], dtype=torch.float64) * ranks.rank, "n": torch.tensor(ranks.rank)}
        return ranks.total(own | ({"b": torch.ones(1, 2)} if ranks.rank == 1 else {}))

    for sums in on_ranks(3, total):
        assert {name: tensor.tolist() for name, tensor in sums.items()} == {"a": [4.5, 6.0], "n": 3, "b": [[1.0, 1.0]]}
        assert [tensor.dtype for tensor in sums.values()] == [torch.float64, torch.int64, torch.float32]


def test_totals_of_other_shapes_are_refused():
    for error in on_ranks(2, lambda ranks: ranks.total({"a": torch.zeros(ranks.rank + 1)})):
        with pytest.raises(ValueError, match="expected 'a' of one dtype and shape on all ranks"):
            raise error


def test_one_process_alone_is_its_own_company():
    ranks = Alone()
    assert (ranks.share(1), ranks.gather(2), ranks.deal([3])) == ([1], [2], 3)
    assert ranks.total({"a": torch.ones(1)}) == {"a": torch.ones(1)}


# -- sums of updates ---------------------------------------------------------------------------------------------------

TEMPLATE = {"w": torch.tensor([4.0, 5.0, 6.0]), "b": torch.tensor([1.0]), "mean": torch.tensor([2.0])}


def update(value, mask, examples, *, absent="unchanged", kind="weights", buffer=None):
    kept = torch.tensor(mask)
    return SparseUpdate(
        {"w": torch.full((sum(mask),), value), "b": torch.tensor([value])},
        {"w": kept if not all(mask) else None, "b": None},
        num_examples=examples,
        kind=kind,
        absent=absent,
        buffers={} if buffer is None else {"mean": torch.tensor([buffer])},
    )


ALL, FIRST, LAST = [True, True, True], [True, False, False], [False, False, True]
PARTS = {
    "one support": [[update(1.0, FIRST, 2)], [update(4.0, FIRST, 1), update(2.5, FIRST, 3)], [update(8.0, FIRST, 1)]],
    "dense": [[update(1.0, ALL, 2, buffer=1.0)], [update(4.0, ALL, 1, buffer=7.0)], [update(8.0, ALL, 1)]],
    "other supports": [[update(1.0, FIRST, 2), update(3.0, ALL, 1)], [update(4.0, LAST, 1)], [update(8.0, FIRST, 5)]],
    "a rank without any": [[update(1.0, FIRST, 2)], [], [update(8.0, FIRST, 1, buffer=3.0)]],
    "a first rank without any": [[], [update(1.0, FIRST, 2), update(1.5, LAST, 2)], []],
    "a support that only one has": [[update(1.0, FIRST, 1)], [update(2.0, FIRST, 1)], [update(4.0, ALL, 1)]],
}


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("make", [WeightedMean, MaskedMean, lambda: MaskedMean("examples", dtype="float32")])
@pytest.mark.parametrize("kind", ["weights", "delta"])
@pytest.mark.parametrize("absent", ["unchanged", "zero"])
def test_reduced_sums_give_the_mean_of_all_updates(parts, make, kind, absent):
    parts = [[SparseUpdate(**{**vars_of(one), "kind": kind, "absent": absent}) for one in part] for part in parts]

    def reduced(ranks):
        mean = make()
        mean.start(TEMPLATE)
        for one in parts[ranks.rank]:
            mean.add(one)
        mean.reduce(ranks)
        return mean.result()

    expected = make()
    expected.start(TEMPLATE)
    for part in parts:
        for one in part:
            expected.add(one)
    whole = expected.result()
    for found in on_ranks(3, reduced):
        assert found.keys() == whole.keys()
        for name, tensor in whole.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=0)


def vars_of(one):
    return {name: getattr(one, name) for name in ("values", "masks", "num_examples", "buffers")}


def test_only_the_support_that_all_share_is_summed():
    shapes = []

    def reduced(ranks):
        total = ranks.total
        ranks.total = lambda tensors: (
            shapes.append({name: tuple(t.shape) for name, t in tensors.items()}) or total(tensors)
        )
        mean = WeightedMean()
        mean.start(TEMPLATE)
        mean.add(update(1.0, FIRST, 1))
        mean.reduce(ranks)

    on_ranks(2, reduced)
    assert shapes == [{"sums of w": (1,), "sums of b": (1,)}] * 2


def test_updates_of_other_kinds_on_other_ranks_are_refused():
    def reduced(ranks):
        mean = WeightedMean()
        mean.start(TEMPLATE)
        mean.add(update(1.0, ALL, 1, kind="delta" if ranks.rank else "weights"))
        mean.reduce(ranks)

    for error in on_ranks(2, reduced):
        with pytest.raises(ValueError, match="expected updates of one kind, absent and tensors on all ranks"):
            raise error


# -- who trains whom ---------------------------------------------------------------------------------------------------


def test_clients_go_where_their_memory_is_and_else_where_there_is_least_to_do():
    cohort = [
        Client(name, examples, lambda: None) for name, examples in [("a", 5), ("b", 1), ("c", 1), ("d", 9), ("e", 1)]
    ]

    def mine(ranks):
        memories = HeldMemories()
        if ranks.rank == 1:
            memories.put("b", {"x": 1})
        shards = Shards(ranks, memories)
        shards.start()
        before = shards.mine(cohort)
        shards.learn(0, {"d": None})
        return before, shards.mine(cohort)

    # b to rank 1, which has its memory; a to 0; c to 1; d to 1 (2 examples against 5); e to 0
    assert on_ranks(2, mine) == [({"a", "e"}, {"d"}), ({"b", "c", "d"}, {"b", "a", "c", "e"})]
