import math
from dataclasses import MISSING, fields
from types import MappingProxyType

import pytest
import torch

from lightning_fedsparse.accounting import Traffic, entropy_bound
from lightning_fedsparse.payload import encode
from lightning_fedsparse.records import RoundRecord, read_history
from lightning_fedsparse.update import MaskSet, SparseUpdate, gather


def entropy(share):
    return -(share * math.log2(share) + (1 - share) * math.log2(1 - share))


def update_on(masks, **kwargs):
    tensors = {name: torch.ones(1000) for name in masks}
    return SparseUpdate(gather(tensors, masks), masks, **kwargs)


A = torch.arange(1000) < 100  # keeps 100 of 1000
B = (torch.arange(1000) < 80) | (torch.arange(1000) >= 995)  # drops 20 of these, adds 5


def test_bound_is_the_sum_over_tensors_of_masks_and_raw_values():
    update = update_on({"a": A, "b": B, "c": None}, buffers={"mean": torch.ones(7), "steps": torch.tensor(1)})
    masks = 1000 * (entropy(0.1) + entropy(0.085)) / 8
    assert entropy_bound(update) == math.ceil(masks + 4 * (100 + 85 + 1000 + 7) + 8)


def test_bound_given_a_mask_that_the_receiver_holds():
    held = MaskSet.of({"w": A})
    assert entropy_bound(update_on(MaskSet.of({"w": A.clone()})), reference=held) == 400
    assert entropy_bound(update_on({"w": A.clone()}), reference=held) == 400
    changed = 100 * entropy(20 / 100) + 900 * entropy(5 / 900)
    assert entropy_bound(update_on({"w": B}), reference=held) == math.ceil(changed / 8 + 4 * 85)
    other_shape = MaskSet.of({"w": torch.ones(3, dtype=torch.bool)})
    assert entropy_bound(update_on({"w": A}), reference=other_shape) == entropy_bound(update_on({"w": A}))


@pytest.mark.parametrize("mask", [torch.zeros(1000, dtype=torch.bool), torch.ones(1000, dtype=torch.bool)])
def test_masks_that_say_nothing_take_nothing(mask):
    assert entropy_bound(update_on({"w": mask})) == 4 * int(mask.sum())


def test_payloads_come_near_the_bound():
    generator = torch.Generator().manual_seed(0)
    masks = {
        f"layer{i}": torch.rand(40_000, generator=generator) < density for i, density in enumerate((0.02, 0.1, 0.4))
    }
    tensors = {name: torch.randn(40_000, generator=generator) for name in masks}
    update = SparseUpdate(gather(tensors, masks), masks)
    traffic = Traffic.of(encode(update), update, reference=None, dense=480_000)
    assert traffic.total == traffic.positions + traffic.values + traffic.header
    assert 0.8 * traffic.bound < traffic.total < 0.9 * traffic.bound
    # positions alone against theirs
    assert traffic.positions < 1.03 * (traffic.bound - 4 * update.num_values) + 30


def test_traffic_adds_up_and_refused_payloads_are_headers():
    refused = Traffic.of_refused(5, dense=100)
    assert refused == Traffic(total=5, header=5, dense=100)
    both = Traffic.sum([refused, Traffic(total=7, positions=1, values=2, header=4, dense=100, bound=6)])
    assert both == Traffic(total=12, positions=1, values=2, header=9, dense=200, bound=6)
    assert Traffic.sum([]) == Traffic()


def test_a_rounds_scalars_copy_no_client():
    numbers = {part.name: 3 for part in fields(RoundRecord) if part.default is part.default_factory is MISSING}
    clients = MappingProxyType({"a": None})  # which can't be copied
    record = RoundRecord(**numbers, metrics={"loss": 0.5}, clients=clients, traffic_up=Traffic(bound=7))
    assert record.scalars["bound_bytes_up"] == 7
    assert record.scalars["loss"] == 0.5
    assert record.scalars["skipped"] == 0
    assert not {"round", "clients", "accept"} & record.scalars.keys()


def test_traffic_is_added_up_without_copies():
    codings = MappingProxyType({"gaps": 2})
    assert Traffic.sum([Traffic(total=5, codings=codings)] * 2) == Traffic(total=10, codings={"gaps": 4})


def test_histories_of_versions_that_did_not_count_can_be_read(tmp_path):
    old = (
        '{"round": 1, "clients_sampled": 5, "clients_returned": 5, "clients_failed": 0, "train_loss": 0.5, "sparsity": 0.5, '
        '"bytes_down": 10, "bytes_up": 20, "total_bytes_down": 10, "total_bytes_up": 20, "dense_bytes_down": 100, '
        '"dense_bytes_up": 100, "seconds": 1.5, "metrics": {"test_loss": 1.0}, "failures": {}}'
    )
    (tmp_path / "history.jsonl").write_text(old + "\n")
    (record,) = read_history(tmp_path / "history.jsonl")
    assert (record.bytes_up, record.traffic_up, record.transfer_seconds, record.clients) == (20, None, None, {})
    assert RoundRecord.from_json(record.to_json()) == record
    assert "bound_bytes_up" not in record.scalars
    (tmp_path / "history.jsonl").write_text(old[:-1] + ', "clients": {"a": {}}}\n')
    with pytest.raises(ValueError, match="expected one round record per line, got something else in line 1"):
        read_history(tmp_path / "history.jsonl")
