"""Sparse federated training for PyTorch Lightning: methods as callbacks, rounds with real sparse bytes."""

from lightning_fedsparse.data import FederatedDataModule
from lightning_fedsparse.folding import fold, load_folded
from lightning_fedsparse.loop import FederatedLoop
from lightning_fedsparse.records import RoundRecord
from lightning_fedsparse.update import SparseUpdate

__all__ = ["FederatedDataModule", "FederatedLoop", "RoundRecord", "SparseUpdate", "fold", "load_folded"]
__version__ = "0.1.0"
