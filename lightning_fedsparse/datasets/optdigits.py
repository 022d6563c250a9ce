"""Optical digits: 3823 + 1797 real images of 8 x 8, ten classes, shipped with the package.

E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998,
https://doi.org/10.24432/C50P49, CC BY 4.0. The test images were written by other people than the training images.
"""

from importlib.resources import as_file, files

import numpy as np

from lightning_fedsparse.datasets.arrays import ArrayDataModule, Arrays

__all__ = ["OptdigitsDataModule"]


class OptdigitsDataModule(ArrayDataModule):
    """Images of shape (1, 8, 8), pixel values 0..16 scaled to [0, 1]; nothing is downloaded.

    Args:
        batch_size: Images per batch.
        validation_fraction: Share of the training images held out for validation, in [0, 1).
        num_workers: Worker processes of a loader.
        quarter_turns: How often every image is turned by 90 degrees to the left: other data with the same classes.
    """

    full_scale = 16.0

    def __init__(
        self,
        *,
        batch_size: int = 32,
        validation_fraction: float = 0.0,
        num_workers: int = 0,
        quarter_turns: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, validation_fraction=validation_fraction, num_workers=num_workers)
        self.quarter_turns = quarter_turns

    def load(self) -> Arrays:
        """Read the packaged arrays."""
        with as_file(files("lightning_fedsparse.datasets") / "optdigits.npz") as path, np.load(path) as arrays:
            train_x, test_x = (
                np.rot90(arrays[name].reshape(-1, 1, 8, 8), self.quarter_turns, axes=(2, 3)).copy()
                for name in ("train_x", "test_x")
            )
            return Arrays(train_x, arrays["train_y"], test_x, arrays["test_y"])
