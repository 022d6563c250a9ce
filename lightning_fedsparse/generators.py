"""The global random generators, which a user's model and data may draw from."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng

__all__ = ["own_generators"]


@contextmanager
def own_generators(seed: int) -> Iterator[None]:
    """Seed Python's, NumPy's and torch's generators, and put them back afterwards."""
    isolation = isolate_rng()
    isolation.__enter__()
    try:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        # without an accelerator, manual_seed takes a hundred times as long: it notes the seed for devices that never come
        (torch.manual_seed if torch.accelerator.is_available() else torch.default_generator.manual_seed)(seed)
        yield
    finally:
        isolation.__exit__(None, None, None)  # told of an error it would put nothing back
