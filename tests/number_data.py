"""Data sets and data modules whose examples are numbers, so that it is seen who has which."""

from functools import partial

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset


class Numbers(Dataset):
    """Example ``i`` is the number ``i``."""

    def __init__(self, size=12, **attributes):
        self.size = size
        self.__dict__.update(attributes)

    def __getitem__(self, index):
        return index

    def __len__(self):
        return self.size


TWELVE_NUMBERS = partial(DataLoader, Numbers(targets=[0, 1, 2] * 4), batch_size=2, shuffle=True)


class NumbersModule(LightningDataModule):
    """A data module that notes its calls; ``train`` makes its training loader."""

    def __init__(self, train=TWELVE_NUMBERS):
        super().__init__()
        self.train = train
        self.calls = []

    def prepare_data(self):
        self.calls.append("prepare")

    def setup(self, stage):
        self.calls.append(stage)

    def train_dataloader(self):
        self.calls.append("train_dataloader")
        return self.train()


class EvaluatedModule(NumbersModule):
    def val_dataloader(self):
        return DataLoader(Numbers(5))

    def test_dataloader(self):
        return DataLoader(Numbers(7))


def numbers(loader):
    return sorted(int(number) for batch in loader for number in batch)
