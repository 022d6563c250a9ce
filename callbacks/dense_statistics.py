"""BatchNorm statistics of the dense model: how FedDIP's released code fills its buffers.

The released code prunes a copy of the model for each step and throws the copy away, running statistics included; a
second forward pass of the dense model, run to log a loss, fills the real ones. So the model that is served (pruned)
carries the statistics of one that is not. This callback reproduces that, second forward pass and all. It is there for
comparison only: statistics of the pruned forward pass, which need no callback, belong to the model that is served.

Reference: Q. Long et al., "FedDIP", ICDM 2023, https://arxiv.org/abs/2309.06805, released code.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from typing_extensions import override

from lightning_fedsparse.callbacks.base import SparsityCallback
from lightning_fedsparse.effective import EffectiveWeights

__all__ = ["DenseStatistics"]


class DenseStatistics(SparsityCallback):
    """Take BatchNorm's running statistics from a second, dense forward pass of every training batch.

    Raises:
        ValueError: At the start of ``fit`` under manual optimization, where a second ``training_step`` would step again.
    """

    def __init__(self) -> None:
        super().__init__()
        self._before: dict[str, Tensor] = {}

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not pl_module.automatic_optimization:
            raise ValueError(
                f"expected automatic optimization beside DenseStatistics, got {type(pl_module).__name__} with manual: "
                "its training_step can't run a second time without stepping"
            )

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._before = {name: buffer.clone() for name, buffer in _statistics(pl_module).items()}

    @override
    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for name, buffer in _statistics(pl_module).items():
            buffer.copy_(self._before[name])
        self._before = {}
        with EffectiveWeights.of(pl_module).stored():
            # its loss is thrown away and must not be logged a second time
            pl_module.__dict__["log"] = pl_module.__dict__["log_dict"] = lambda *args, **kwargs: None
            try:
                if is_param_in_hook_signature(pl_module.training_step, "batch_idx", min_args=2):
                    pl_module.training_step(batch, batch_idx)
                else:
                    pl_module.training_step(batch)
            finally:
                del pl_module.__dict__["log"], pl_module.__dict__["log_dict"]


def _statistics(module: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": buffer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm)
        for key, buffer in layer.named_buffers(recurse=False)
    }
