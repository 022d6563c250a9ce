"""Who can hold how much: lists, mappings, shares and functions, and what is wrong with them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedsparse import FederatedDataModule
from lightning_fedsparse.capacities import (
    Capacities,
    CapacityFunction,
    CapacityList,
    CapacityMapping,
    CapacityShares,
    held_count,
    listed_capacities,
    mapped_capacities,
    shared_capacities,
)
from lightning_fedsparse.evaluation import Evaluation

IDS = ["a", "b", "c", "d"]


def data(capacities: Capacities | None, seed: int = 0) -> FederatedDataModule:
    """Clients a to d with 2, 4, 6 and 8 examples."""
    loaders = {
        name: DataLoader(TensorDataset(torch.zeros(size, 1)), batch_size=2)
        for name, size in zip(IDS, (2, 4, 6, 8), strict=True)
    }
    return FederatedDataModule(loaders, capacities=capacities, seed=seed)


def of(module: FederatedDataModule) -> list[float | None]:
    return [module.client(name).capacity for name in module.client_ids]


def test_a_list_is_in_client_order() -> None:
    assert of(data(CapacityList([1.0, 0.5, 0.25, 1.0]))) == [1.0, 0.5, 0.25, 1.0]


def test_a_mapping_is_by_id() -> None:
    assert of(data(CapacityMapping({"d": 0.1, "c": 0.2, "b": 0.3, "a": 0.4}))) == [0.4, 0.3, 0.2, 0.1]


def test_shares_go_in_client_order() -> None:
    assert of(data(CapacityShares({1.0: 0.25, 0.25: 0.5, 0.0625: 0.25}))) == [1.0, 0.25, 0.25, 0.0625]
    hundred = shared_capacities([str(i) for i in range(100)], dict.fromkeys((1.0, 0.25, 0.0625, 0.015625), 0.25))
    assert list(hundred.values()) == [1.0] * 25 + [0.25] * 25 + [0.0625] * 25 + [0.015625] * 25


def test_a_function_gets_the_client() -> None:
    assert of(data(CapacityFunction(lambda client: client.num_examples / 8))) == [0.25, 0.5, 0.75, 1.0]


def test_without_capacities_clients_have_none() -> None:
    assert of(data(None)) == [None] * 4


def test_shuffled_shares_follow_from_the_seed() -> None:
    shares = {1.0: 0.5, 0.5: 0.5}
    drawn = {tuple(of(data(CapacityShares(shares, shuffle=True), seed))) for seed in range(20)}
    assert 1 < len(drawn) <= 6
    assert all(sorted(levels) == [0.5, 0.5, 1.0, 1.0] for levels in drawn)
    again = [of(data(CapacityShares(shares, shuffle=True), seed=3)) for _ in range(2)]
    assert again[0] == again[1]


@given(st.lists(st.integers(1, 20), min_size=1, max_size=5), st.integers(1, 40))
def test_every_level_gets_its_share_to_within_one_client(parts: list[int], scale: int) -> None:
    clients = [str(i) for i in range(sum(parts) * scale)]
    shares = {1 / (level + 1): part / sum(parts) for level, part in enumerate(parts)}
    values = list(shared_capacities(clients, shares).values())
    assert [values.count(level) for level in shares] == [part * scale for part in parts]


def test_shares_come_from_a_recipe() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--capacities", type=Capacities)
    path = "lightning_fedsparse.capacities."
    for text, expected in {
        f"{{class_path: {path}CapacityShares, init_args: {{shares: {{1.0: 0.5, 0.25: 0.5}}}}}}": CapacityShares(
            {1.0: 0.5, 0.25: 0.5}
        ),
        f"{{class_path: {path}CapacityList, init_args: {{values: [1, 0.5]}}}}": CapacityList([1.0, 0.5]),
        f"{{class_path: {path}CapacityMapping, init_args: {{by_client: {{a: 1, b: 0.5}}}}}}": CapacityMapping(
            {"a": 1.0, "b": 0.5}
        ),
    }.items():
        assert parser.instantiate(parser.parse_args([f"--capacities={text}"])).capacities == expected


def test_what_a_federation_knows_of_its_clients_capacities() -> None:
    assert data(CapacityList([1.0, 0.5, 0.25, 0.125])).capacities == {"a": 1.0, "b": 0.5, "c": 0.25, "d": 0.125}
    assert data(None).capacities == {}


def test_a_capacity_holds_what_a_sparsity_leaves() -> None:
    assert [held_count(capacity, 10, "") for capacity in (1.0, 0.5, 0.25, 0.06)] == [10, 5, 2, 1]
    with pytest.raises(ValueError, match="holds at least one of 10 weights, got 0.05 for client 'a'"):
        held_count(0.05, 10, "for client 'a'")


@pytest.mark.parametrize("capacity", [0.0, -0.5, 1.5, float("nan")])
def test_a_capacity_outside_its_range(capacity: float) -> None:
    with pytest.raises(ValueError, match=rf"expected a capacity in \(0, 1\], got {capacity} for client 'b'"):
        listed_capacities(["a", "b"], [1.0, capacity])
    with pytest.raises(ValueError, match=r"expected a capacity in \(0, 1\], got .* as a level"):
        shared_capacities(IDS, {capacity: 1.0})
    with pytest.raises(ValueError, match=r"expected a capacity in \(0, 1\], got .* to evaluate at"):
        Evaluation(capacities=[0.5, capacity])
    with pytest.raises(ValueError, match=r"expected a capacity in \(0, 1\], got .* for client 'a'"):
        data(CapacityFunction(lambda client: capacity)).setup("fit")


def test_capacities_that_do_not_fit_the_clients() -> None:
    with pytest.raises(ValueError, match="expected one capacity for each of the 4 clients, got 2"):
        of(data(CapacityList([1.0, 0.5])))
    with pytest.raises(ValueError, match="expected capacities of clients that exist, got one for 'e'"):
        mapped_capacities(IDS, {**dict.fromkeys(IDS, 0.5), "e": 0.5})
    with pytest.raises(ValueError, match="expected a capacity for every client, got none for 'c'"):
        mapped_capacities(IDS, {"a": 0.5, "b": 0.5, "d": 0.5})


def test_shares_that_do_not_sum_up() -> None:
    with pytest.raises(
        ValueError, match=r"expected shares of the clients that sum to 1, got 0.75 from \{1.0: 0.5, 0.5: "
    ):
        shared_capacities(IDS, {1.0: 0.5, 0.5: 0.25})
    with pytest.raises(ValueError, match="expected positive shares of the clients, got -0.5 for capacity 0.5"):
        shared_capacities(IDS, {1.0: 1.5, 0.5: -0.5})
    with pytest.raises(ValueError, match="expected at least one client for each level, got none of 4 for capacity 0.5"):
        shared_capacities(IDS, {1.0: 0.95, 0.5: 0.05})
