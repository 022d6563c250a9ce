"""Clients that a recipe describes."""

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedsparse.data import FederatedDataModule


class BoringData(LightningDataModule):
    """Constructed from a recipe."""

    def __init__(self, size: int = 12, batch_size: int = 4) -> None:
        super().__init__()
        self.size, self.batch_size = size, batch_size

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.zeros(self.size, 1), torch.arange(self.size) % 3), self.batch_size)


RECIPE = """
data:
  class_path: lightning_fedsparse.data.FederatedDataModule
  init_args:
    data:
      class_path: {module}
      init_args: {{size: 30}}
    partition:
      class_path: lightning_fedsparse.partition.DirichletPartition
      init_args: {{num_clients: 3, alpha: 0.5}}
    validation_fraction: 0.2
"""


def parser():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data", required=True)
    return parser


def instantiate(recipe):
    config = parser().parse_string(recipe)
    return getattr(parser(), "instantiate", parser().instantiate_classes)(config).data


def test_constructed_from_yaml():
    data = instantiate(RECIPE.format(module=f"{__name__}.BoringData"))
    assert isinstance(data, FederatedDataModule)
    assert data.client_ids == ["0", "1", "2"]
    sizes = [
        len(loader.dataset)
        for c in data.client_ids
        for loader in (data.client(c).train_loader(), data.client(c).val_loader())
        if loader
    ]
    assert sum(sizes) == 30


def test_yaml_names_a_mistyped_key():
    with pytest.raises(Exception, match="Option 'size' is not accepted"):
        instantiate(RECIPE.format(module="tests.number_data.NumbersModule"))


def test_yaml_mapping_of_clients_is_refused():
    recipe = """
    data:
      class_path: lightning_fedsparse.data.FederatedDataModule
      init_args: {data: {a: {class_path: BoringData}}}
    """
    with pytest.raises(ValueError, match="data must have a train_dataloader, and LightningDataModule has none"):
        instantiate(recipe)
