"""The interface of a method: Lightning's hooks plus the federated ones.

A method is a :class:`SparsityCallback`. Its Lightning hooks do the local work and behave the same in a plain
``Trainer`` and in a client's round; its client hooks see the round's beginning and end on a client, its server hooks
run in the main process only. A method that changes the weights that forward and backward use derives from
:class:`EffectiveWeightCallback` and says *how* by one :class:`~lightning_fedsparse.transforms.Transform`; the engine
knows *when*.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_fedsparse.clients import Client
from lightning_fedsparse.effective import EffectiveWeights
from lightning_fedsparse.rounds import ClientRound, ServerRound, Total, UploadRule
from lightning_fedsparse.schedules import Progress
from lightning_fedsparse.server import ServerState
from lightning_fedsparse.transforms import Transform
from lightning_fedsparse.update import SparseUpdate
from lightning_fedsparse.value_coding import ValueType

__all__ = ["CallbackList", "EffectiveWeightCallback", "SparsityCallback"]


class CallbackList(list[pl.Callback]):
    """The callbacks of a composed method, such as ``feddip()``: a plain list that a recipe can name by one path."""


class SparsityCallback(pl.Callback):
    """Base of every method; all hooks are optional.

    ``client_round`` is None in a plain Trainer. In a federation the loop gives every client round a pristine copy of
    the callback, loads the client's memory into it, sets ``client_round`` and calls the client hooks.
    """

    client_round: ClientRound | None = None

    def on_client_round_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, client_round: ClientRound
    ) -> None:
        """On the client, after the broadcast was loaded into ``pl_module`` and before ``fit``."""

    def on_client_round_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, update: SparseUpdate
    ) -> SparseUpdate:
        """On the client, after ``fit``: may replace the update that is about to be sent."""
        return update

    def on_client_upload(self, trainer: pl.Trainer, pl_module: pl.LightningModule, update: SparseUpdate) -> None:
        """On the client, after the upload was coded: ``update`` is what the server will read, rounding included."""

    def on_server_start(self, pl_module: pl.LightningModule, state: ServerState, seed: int) -> ServerState:
        """On the server, before round 0 (and before a checkpoint replaces ``state``); ``seed`` is for own draws."""
        return state

    def on_server_resume(self, state: ServerState) -> None:
        """On the server, after a checkpoint has replaced the state: take from ``state.methods`` what was kept there."""

    def client_broadcast(self, state: ServerState, client: Client, broadcast: SparseUpdate) -> SparseUpdate:
        """On the server: what this client gets of the round's broadcast.

        Where clients get the same, return the same object: it is encoded once.
        """
        return broadcast

    def on_server_receive(self, state: ServerState, server_round: ServerRound, update: SparseUpdate) -> None:
        """On the server, for every valid upload as it comes in, to look at; ``state`` is still what was broadcast.

        Where several processes share a cohort each sees the uploads of its own clients only: what is added up here becomes a
        sum over all of them in :meth:`on_server_received`, which belongs with this hook.
        """

    def on_server_received(self, state: ServerState, server_round: ServerRound, total: Total) -> None:
        """On the server, after the last upload of a round that counts; ``state`` is still what was broadcast.

        Args:
            state: The server's.
            server_round: The round.
            total: Sums named tensors over all processes; called by every one of them, equally often. Put its sums in the place
                of one's own: all processes then go on alike.
        """

    def on_server_round_end(self, state: ServerState, server_round: ServerRound) -> ServerState:
        """On the server, after the server step of a round: masks move here."""
        return state

    def upload_rule(self, state: ServerState, server_round: ServerRound) -> UploadRule | None:
        """What the round's uploads may be, where this method changes them; None leaves it to the other methods."""
        return None

    def refuses_values(self, *, uploads: ValueType, broadcasts: ValueType) -> str | None:
        """Why this method can't work with values that are rounded like this on the wire; None if it can."""
        return None

    def to_effective_(self, weights: dict[str, Tensor], capacity: float | None = None) -> None:
        """Turn global stored weights into those that forward uses, in place: what is evaluated and returned.

        Args:
            weights: All parameters by name.
            capacity: Share of the weights that the submodel holds, for methods that know submodels; None for the model
                that a client without a capacity of its own holds.
        """

    def client_state_dict(self) -> dict[str, Any]:
        """What the client remembers until its next round (tensors and primitives); empty for stateless methods."""
        return {}

    def load_client_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`client_state_dict` returned in the client's previous round."""

    def progress(self, trainer: pl.Trainer) -> Progress:
        """How far the run is: rounds in a federation, optimizer steps in a plain Trainer.

        Under manual optimization, where a batch may take any number of steps, batches are counted instead.

        Raises:
            ValueError: By the schedule that uses it, if the Trainer has no end (``max_epochs=-1``).
        """
        if self.client_round is not None:
            return self.client_round.progress
        steps = trainer.global_step
        if trainer.lightning_module.automatic_optimization:
            total = trainer.estimated_stepping_batches
            # Lightning's answer for a loader without length and a Trainer without max_steps is -1
            return Progress(steps, total if total >= 0 else float("inf"))
        batches = trainer.fit_loop.epoch_loop.batch_progress.total.processed if steps else 0  # type: ignore[attr-defined]
        epochs = trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs >= 0 else float("inf")
        total = trainer.num_training_batches * epochs
        if trainer.max_steps >= 0:
            # as many steps per batch as so far; rounded up, the last batch is the one that reaches max_steps
            total = min(total, -(-trainer.max_steps * batches // steps) if steps else trainer.max_steps)
        return Progress(batches, total)


class EffectiveWeightCallback(SparsityCallback):
    """A method that computes with effective weights; its hooks drive the module's engine."""

    @abstractmethod
    def transform(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Transform | None:
        """The step between stored and effective weights at this moment; None while there is none."""

    @property
    def folds(self) -> bool:
        """Whether the module is to hold the effective weights after a plain ``fit``."""
        return False

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._register(trainer, pl_module)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        engine = EffectiveWeights.of(pl_module)
        if engine.is_driven_by(self):
            engine.attach_optimizers(trainer, pl_module, self)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        engine = EffectiveWeights.of(pl_module)
        if engine.is_driven_by(self):
            engine.batch_start()

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        engine = EffectiveWeights.of(pl_module)
        if engine.is_driven_by(self):
            engine.before_step(optimizer)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        EffectiveWeights.of(pl_module).batch_end()

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # on_train_batch_start may have returned -1, which skips the rest of the epoch and its on_train_batch_end
        EffectiveWeights.of(pl_module).batch_end()

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        EffectiveWeights.of(pl_module).batch_end()

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # only here, after weight averaging has put its average into the module at on_train_end
        engine = EffectiveWeights.of(pl_module)
        if self.folds and self.client_round is None:
            engine.fold(self)
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                # its copy goes into checkpoints also after fit: the average, which is by now what the module holds
                average = callback._average_model if isinstance(callback, WeightAveraging) else None
                if average is not None:
                    average.module.load_state_dict(pl_module.state_dict())

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        EffectiveWeights.of(pl_module).unregister(self)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        EffectiveWeights.of(pl_module).unregister(self)

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # weight averaging, where it comes first, has moved the module's own to the second key
        for key in ("state_dict", "current_model_state"):
            if key in checkpoint:
                EffectiveWeights.of(pl_module).restore_in(checkpoint[key])

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            self._register(trainer, pl_module)

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._register(trainer, pl_module)

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._register(trainer, pl_module)

    @override
    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._swap_in(pl_module)

    @override
    def on_test_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._swap_in(pl_module)

    @override
    def on_predict_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._swap_in(pl_module)

    @override
    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        EffectiveWeights.of(pl_module).swap_out()

    @override
    def on_test_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        EffectiveWeights.of(pl_module).swap_out()

    @override
    def on_predict_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        EffectiveWeights.of(pl_module).swap_out()

    def _register(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        transform = self.transform(trainer, pl_module)
        if transform is not None:
            EffectiveWeights.of(pl_module).register(self, transform, pl_module)

    def _swap_in(self, pl_module: pl.LightningModule) -> None:
        engine = EffectiveWeights.of(pl_module)
        if engine.is_driven_by(self):
            engine.swap_in()
