"""Network architectures and the LightningModules of the recipes."""

from lightning_fedsparse.models.alexnet import AlexNet
from lightning_fedsparse.models.character import CharacterLSTM
from lightning_fedsparse.models.classifier import ImageClassifier, NextCharacter
from lightning_fedsparse.models.fedavg_cnn import FedAvgCNN
from lightning_fedsparse.models.lenet import LeNet5
from lightning_fedsparse.models.regressor import Regressor
from lightning_fedsparse.models.resnet import ResNet18
from lightning_fedsparse.models.sensors import SensorCNN
from lightning_fedsparse.models.small import DigitsCNN, SmallCNN

__all__ = [
    "AlexNet",
    "CharacterLSTM",
    "DigitsCNN",
    "FedAvgCNN",
    "ImageClassifier",
    "LeNet5",
    "NextCharacter",
    "Regressor",
    "ResNet18",
    "SensorCNN",
    "SmallCNN",
]
