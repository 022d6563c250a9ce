"""Small convolutional networks: one for colour images of 32 x 32, one for the 8 x 8 digits of the quick start.

``SmallCNN`` has the shape that federated benchmarks on CIFAR-10 often use, for instance pfl-research (F. Granqvist,
C. Song, A. Cahill, R. van Dalen, M. Pelikan, Y. S. Chan, X. Feng, N. Krishnaswami, V. Jina, M. Chitnis, "pfl-research:
simulation framework for accelerating research in Private Federated Learning", NeurIPS 2024,
https://arxiv.org/abs/2404.06430).
"""

from torch import Tensor, nn

__all__ = ["DigitsCNN", "SmallCNN"]


class SmallCNN(nn.Module):
    """Two convolutions without padding and two linear layers, with dropout: 1,626,442 parameters for ten classes.

    Args:
        num_classes: Number of classes.
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 32, 3),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Dropout(0.25),
            nn.Flatten(),
            nn.Linear(12544, 128),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(128, num_classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Map images of shape (n, 3, 32, 32) to logits of shape (n, num_classes)."""
        logits: Tensor = self.layers(images)
        return logits


class DigitsCNN(nn.Module):
    """Two convolutions and two linear layers for grey images of 8 x 8: 38,282 parameters for ten classes.

    Args:
        num_classes: Number of classes.
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(512, 64),
            nn.ReLU(),
            nn.Linear(64, num_classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Map images of shape (n, 1, 8, 8) to logits of shape (n, num_classes)."""
        logits: Tensor = self.layers(images)
        return logits
