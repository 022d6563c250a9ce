"""Sparse federated training for PyTorch Lightning: methods as callbacks, rounds with real sparse bytes."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_fedsparse.data import FederatedDataModule
    from lightning_fedsparse.export import load_global
    from lightning_fedsparse.folding import fold, load_folded
    from lightning_fedsparse.loop import FederatedLoop
    from lightning_fedsparse.records import RoundRecord
    from lightning_fedsparse.update import SparseUpdate

__all__ = ["FederatedDataModule", "FederatedLoop", "RoundRecord", "SparseUpdate", "fold", "load_folded", "load_global"]
__version__ = "0.1.0"

_HOMES = {
    "FederatedDataModule": "data",
    "FederatedLoop": "loop",
    "RoundRecord": "records",
    "SparseUpdate": "update",
    "fold": "folding",
    "load_folded": "folding",
    "load_global": "export",
}


def __getattr__(name: str) -> object:
    # on first use: the command's help and lists must not wait for Lightning to import
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
