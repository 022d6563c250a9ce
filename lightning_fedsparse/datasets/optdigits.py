"""Optical digits: 3823 + 1797 real images of 8 x 8, ten classes, shipped with the package.

E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998,
https://doi.org/10.24432/C50P49, CC BY 4.0. The test images were written by other people than the training images.
"""

from collections.abc import Sequence
from importlib.resources import as_file, files

import numpy as np
import numpy.typing as npt

from lightning_fedsparse.datasets.arrays import ArrayDataModule, Arrays

__all__ = ["OptdigitsDataModule"]

Bytes = npt.NDArray[np.uint8]


class OptdigitsDataModule(ArrayDataModule):
    """Images of shape (1, 8, 8), pixel values 0..16 scaled to [0, 1]; nothing is downloaded.

    Args:
        batch_size: Images per batch.
        validation_fraction: Share of the training images held out for validation, in [0, 1).
        num_workers: Worker processes of a loader.
        quarter_turns: How often every image is turned by 90 degrees to the left: other data with the same classes.
        classes: Keep the images of these digits only; all of them if empty. Labels stay the digits.

    Raises:
        ValueError: For a class that is no digit.
    """

    full_scale = 16.0

    def __init__(
        self,
        *,
        batch_size: int = 32,
        validation_fraction: float = 0.0,
        num_workers: int = 0,
        quarter_turns: int = 0,
        classes: Sequence[int] = (),
    ) -> None:
        super().__init__(batch_size=batch_size, validation_fraction=validation_fraction, num_workers=num_workers)
        if not set(classes) <= set(range(10)):
            raise ValueError(f"expected classes from 0 to 9, got {list(classes)}")
        self.quarter_turns = quarter_turns
        self.classes = tuple(classes)

    def load(self) -> Arrays:
        """Read the packaged arrays."""
        with as_file(files("lightning_fedsparse.datasets") / "optdigits.npz") as path, np.load(path) as arrays:
            return Arrays(
                *self._half(arrays["train_x"], arrays["train_y"]), *self._half(arrays["test_x"], arrays["test_y"])
            )

    def _half(self, images: Bytes, digits: Bytes) -> tuple[Bytes, Bytes]:
        kept = np.isin(digits, self.classes or range(10))
        turned = np.rot90(images[kept].reshape(-1, 1, 8, 8), self.quarter_turns, axes=(2, 3))
        return turned.copy(), digits[kept]
