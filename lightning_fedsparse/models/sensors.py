"""A convolutional network over windows of sensor values: 217,289 parameters for 14 sensors and 30 cycles."""

from torch import Tensor, nn

__all__ = ["SensorCNN"]


class SensorCNN(nn.Module):
    """Two convolutions along time and two linear layers; one number comes out.

    Args:
        num_sensors: Sensors of a window.
        window: Time steps of a window.
    """

    def __init__(self, num_sensors: int = 14, *, window: int = 30) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv1d(num_sensors, 64, 5, padding=2),
            nn.ReLU(),
            nn.Conv1d(64, 64, 5, padding=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * window, 100),
            nn.ReLU(),
            nn.Linear(100, 1),
        )

    def forward(self, windows: Tensor) -> Tensor:
        """Map windows of shape (n, num_sensors, window) to numbers of shape (n, 1)."""
        numbers: Tensor = self.layers(windows)
        return numbers
