"""Loaders of clients: the batches of a plain DataLoader, to the bit and to the draw."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from lightning_fedsparse.loaders import LoaderSettings, _tensors_of


class Pairs(Dataset):
    """Examples that are not tensors' rows."""

    def __init__(self, noisy=False):
        self.noisy = noisy

    def __len__(self):
        return 30

    def __getitem__(self, index):
        return {"x": torch.full((2,), float(index)) + (torch.rand(2) if self.noisy else 0), "name": str(index)}


def tensors():
    generator = torch.Generator().manual_seed(3)
    return TensorDataset(
        torch.randn(30, 2, 3, generator=generator), torch.arange(30), torch.rand(30, dtype=torch.float64)
    )


def seen(loader):
    """Everything that a training of two epochs sees, with draws of its own between the batches."""
    torch.manual_seed(5)
    batches = []
    for _ in range(2):
        iterator = iter(loader)
        torch.rand(1)  # Lightning calls hooks here, which may draw
        for batch in iterator:
            batches.append((batch, float(torch.rand(()))))
    return batches, torch.get_rng_state()


def equal(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype and a.stride() == b.stride()
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize(
    "dataset",
    [tensors(), Pairs(), Pairs(noisy=True), Subset(tensors(), range(5, 25)), Subset(Pairs(), range(5, 25))],
    ids=["tensors", "examples", "random examples", "subset of tensors", "subset of examples"],
)
def test_the_batches_and_draws_of_a_data_loader(dataset, shuffle, drop_last):
    settings = LoaderSettings.of(DataLoader(dataset, batch_size=4, shuffle=shuffle, drop_last=drop_last))
    indices = np.array([1, 2, 3, 5, 7, 11, 13, 14, 17, 19])
    ours = settings.loader(indices, train=True)
    plain = DataLoader(Subset(dataset, indices.tolist()), batch_size=4, shuffle=shuffle, drop_last=drop_last)
    assert isinstance(ours, DataLoader)
    assert len(ours) == len(plain)
    mine, after = seen(ours)
    theirs, afterwards = seen(plain)
    assert len(mine) == 2 * len(plain)
    assert equal(mine, theirs)
    assert torch.equal(after, afterwards)


def test_a_collate_function_of_the_users_own_gets_the_examples():
    loader = DataLoader(tensors(), batch_size=4, collate_fn=lambda examples: [len(example) for example in examples])
    assert list(LoaderSettings.of(loader).loader(np.arange(6), train=True)) == [[3, 3, 3, 3], [3, 3]]


def test_which_data_sets_are_gathered_by_the_batch():
    class Own(TensorDataset):
        def __getitem__(self, index):
            return super().__getitem__(index)[0] * 2

    assert _tensors_of(tensors()) is not None
    assert _tensors_of(Own(torch.zeros(3, 1))) is None
    assert _tensors_of(TensorDataset(torch.zeros(3, 4).T)) is None  # stacked examples would have other strides
    assert _tensors_of(Pairs()) is None
