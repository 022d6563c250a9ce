"""Network architectures and the LightningModules of the recipes."""

from lightning_fedsparse.models.alexnet import AlexNet
from lightning_fedsparse.models.classifier import ImageClassifier
from lightning_fedsparse.models.fedavg_cnn import FedAvgCNN
from lightning_fedsparse.models.lenet import LeNet5
from lightning_fedsparse.models.resnet import ResNet18
from lightning_fedsparse.models.small import DigitsCNN, SmallCNN

__all__ = ["AlexNet", "DigitsCNN", "FedAvgCNN", "ImageClassifier", "LeNet5", "ResNet18", "SmallCNN"]
