"""Data sets in memory: batches at once are the examples one by one."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Subset

from lightning_fedsparse.datasets import ArrayDataset
from lightning_fedsparse.datasets.in_memory import ready_batch


def array_dataset(size=10, **arguments):
    return ArrayDataset(
        torch.arange(size * 4, dtype=torch.uint8).reshape(size, 1, 2, 2), torch.arange(size), **arguments
    )


def test_array_dataset_batches():
    images, targets = array_dataset(full_scale=2.0).__getitems__([2, 0])
    assert images.dtype == torch.float32
    assert images.tolist() == [[[[4, 4.5], [5, 5.5]]], [[[0, 0.5], [1, 1.5]]]]
    assert targets.tolist() == [2, 0]
    assert targets.dtype == torch.int64


def test_array_dataset_gives_single_examples():
    dataset = array_dataset()
    image, target = dataset[np.int64(3)]
    assert image.shape == (1, 2, 2)
    assert image[0, 1, 1] == torch.tensor(15 / 255)
    assert target == 3
    assert len(dataset) == 10


@pytest.mark.parametrize("wrap", [lambda d: d, lambda d: Subset(Subset(d, [9, 8, 7, 6, 5]), [4, 2, 0])])
def test_ready_batches_equal_collated_ones(wrap):
    class Single(torch.utils.data.Dataset):  # the same examples, one by one
        def __init__(self, dataset):
            self.dataset = dataset

        def __getitem__(self, index):
            return self.dataset[index]

        def __len__(self):
            return len(self.dataset)

    dataset = wrap(array_dataset())
    ready = list(DataLoader(dataset, batch_size=2, collate_fn=ready_batch))
    collated = list(DataLoader(Single(dataset), batch_size=2))
    for (images, targets), (other_images, other_targets) in zip(ready, collated, strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(targets, other_targets)


def test_array_dataset_sizes_must_agree():
    with pytest.raises(ValueError, match="3 inputs need as many targets and client keys, got 2 targets"):
        ArrayDataset(torch.zeros(3, 1, 2, 2), torch.zeros(2))
    with pytest.raises(ValueError, match="10 inputs need as many targets and client keys"):
        array_dataset(client_keys=np.arange(3))
