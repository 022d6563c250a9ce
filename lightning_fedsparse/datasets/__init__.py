"""Data sets: readers, downloads and the data modules of the recipes."""

from lightning_fedsparse.datasets.arrays import ArrayDataModule, ArrayDataset
from lightning_fedsparse.datasets.cifar10 import CIFAR10DataModule
from lightning_fedsparse.datasets.in_memory import InMemoryDataModule, ReadyDataset
from lightning_fedsparse.datasets.mnist import FashionMNISTDataModule, MNISTDataModule
from lightning_fedsparse.datasets.mnist_writers import MNISTWritersDataModule
from lightning_fedsparse.datasets.optdigits import OptdigitsDataModule
from lightning_fedsparse.datasets.shakespeare import ShakespeareDataModule
from lightning_fedsparse.datasets.turbofan import TurbofanDataModule

__all__ = [
    "ArrayDataModule",
    "ArrayDataset",
    "CIFAR10DataModule",
    "FashionMNISTDataModule",
    "InMemoryDataModule",
    "MNISTDataModule",
    "MNISTWritersDataModule",
    "OptdigitsDataModule",
    "ReadyDataset",
    "ShakespeareDataModule",
    "TurbofanDataModule",
]
