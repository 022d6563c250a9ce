"""The convolutional network of the FedAvg paper: 1,663,370 parameters for grey images of 28 x 28 and ten classes.

After H. B. McMahan, E. Moore, D. Ramage, S. Hampson, B. Aguera y Arcas, "Communication-Efficient Learning of Deep
Networks from Decentralized Data", AISTATS 2017, https://arxiv.org/abs/1602.05629 (section 3): two 5 x 5 convolutions
with 32 and 64 channels, each followed by 2 x 2 max pooling, 512 hidden units, a linear layer. The paper's count of
parameters follows with convolutions that keep the image size. Most weights are in one linear layer (1,605,632 of them),
so it has many to spare.
"""

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["FedAvgCNN"]


class FedAvgCNN(nn.Module):
    """Two convolutions and two linear layers.

    Args:
        num_classes: Number of classes.
        channels: Channels of an image.
        size: Height and width of an image in pixels, at least 4.

    Raises:
        ValueError: If ``size`` leaves no pixel after two poolings.
    """

    def __init__(self, num_classes: int = 10, *, channels: int = 1, size: int = 28) -> None:
        super().__init__()
        if size < 4:
            raise ValueError(f"expected a size of at least 4 pixels, for two poolings, got {size}")
        self.conv1 = nn.Conv2d(channels, 32, 5, padding=2)
        self.conv2 = nn.Conv2d(32, 64, 5, padding=2)
        self.fc1 = nn.Linear(64 * (size // 4) ** 2, 512)
        self.fc2 = nn.Linear(512, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images of shape (n, channels, size, size) to logits of shape (n, num_classes)."""
        x = F.max_pool2d(F.relu(self.conv1(images)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        logits: Tensor = self.fc2(F.relu(self.fc1(x.flatten(1))))
        return logits
