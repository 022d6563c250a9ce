"""ResNet-18 with a stem for colour images of 32 x 32: 11,220,132 parameters for 100 classes.

After K. He, X. Zhang, S. Ren, J. Sun, "Deep Residual Learning for Image Recognition", CVPR 2016,
https://arxiv.org/abs/1512.03385: a 3 x 3 stem without pooling, as in FedDIP's CIFAR-100 runs
(https://arxiv.org/abs/2309.06805).
"""

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["BasicBlock", "ResNet18"]


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut, which is 1 x 1 where the shape changes.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        stride: Stride of the first convolution.
        batch_statistics: As of :class:`ResNet18`.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, batch_statistics: bool = False) -> None:
        super().__init__()
        tracked = not batch_statistics
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels, track_running_stats=tracked)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels, track_running_stats=tracked)
        self.relu1 = nn.ReLU()
        self.relu2 = nn.ReLU()
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut.append(nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(out_channels, track_running_stats=tracked))

    def forward(self, x: Tensor) -> Tensor:
        """Map shape (n, in_channels, h, w) to (n, out_channels, h / stride, w / stride)."""
        y = self.relu1(self.bn1(self.conv1(x)))
        output: Tensor = self.relu2(self.bn2(self.conv2(y)) + self.shortcut(x))
        return output


class ResNet18(nn.Module):
    """A stem, four stages of two blocks each with 64, 128, 256 and 512 channels, and a linear layer.

    Args:
        num_classes: Number of classes.
        batch_statistics: Whether each batch is normalized by its own statistics in evaluation too, as in FIARSE's released
            code, and none are kept. What is predicted for an image then depends on those beside it.
    """

    def __init__(self, num_classes: int = 10, *, batch_statistics: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64, track_running_stats=not batch_statistics)
        self.relu = nn.ReLU()
        block = partial(BasicBlock, batch_statistics=batch_statistics)
        self.layer1 = nn.Sequential(block(64, 64, 1), block(64, 64, 1))
        self.layer2 = nn.Sequential(block(64, 128, 2), block(128, 128, 1))
        self.layer3 = nn.Sequential(block(128, 256, 2), block(256, 256, 1))
        self.layer4 = nn.Sequential(block(256, 512, 2), block(512, 512, 1))
        self.linear = nn.Linear(512, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images of shape (n, 3, 32, 32) to logits of shape (n, num_classes)."""
        x = self.relu(self.bn1(self.conv1(images)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.linear(F.avg_pool2d(x, 4).flatten(1))
        return logits
