"""Each composed method in training set-ups as users have them; docs/plain_trainer.md shows them one by one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn
from torch.optim import Adam, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_fedsparse import load_folded
from lightning_fedsparse.callbacks import feddip, fiarse, sparsyfed
from lightning_fedsparse.datasets import OptdigitsDataModule
from lightning_fedsparse.prunable import prunable_parameters
from tests.effective_reference import assert_engine_clean, quiet_trainer

Method = Callable[..., list[pl.Callback]]

METHODS: dict[str, Method] = {
    "feddip": partial(feddip, sparsity=0.75, reconfigure_every=7, end=0.6),
    "sparsyfed": partial(sparsyfed, sparsity=0.75),
    "fiarse": partial(fiarse, capacity=0.25, refresh_every=7, layer_floor=0.05),
}


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> Method:
    return METHODS[request.param]


def zeros_and_size(module: nn.Module, include: tuple[str, ...] = ()) -> tuple[int, int]:
    weights = prunable_parameters(module, include).values()
    return sum(int((weight == 0).sum()) for weight in weights), sum(weight.numel() for weight in weights)


def assert_sparse(module: nn.Module, method: Method, include: tuple[str, ...] = ()) -> None:
    zeros, size = zeros_and_size(module, include)
    if method is METHODS["fiarse"]:
        # weights that have fallen below the threshold since the last extraction are zero too
        assert size - size // 4 <= zeros < size
    else:
        assert zeros == round(0.75 * size)


def assert_same(one: nn.Module, other: nn.Module) -> None:
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], tensor, rtol=0, atol=0, msg=name)


@pytest.fixture(scope="module")
def digits() -> tuple[TensorDataset, TensorDataset]:
    data = OptdigitsDataModule(batch_size=4000)
    data.setup("fit")
    images, classes = next(iter(data.train_dataloader()))
    return TensorDataset(images[:960], classes[:960]), TensorDataset(images[960:1440], classes[960:1440])


class Classifier(pl.LightningModule):
    """AdamW under a cosine schedule per step; validation logs what a ModelCheckpoint watches."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.network = nn.Sequential(
                nn.Conv2d(1, 8, 3, padding=1),
                nn.BatchNorm2d(8),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Flatten(),
                nn.Dropout(0.1),
                nn.Linear(128, 32),
                nn.GELU(),
                nn.Linear(32, 10),
            )

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor]) -> None:
        self.log("accuracy", (self.network(batch[0]).argmax(1) == batch[1]).float().mean(), batch_size=len(batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = AdamW(self.parameters(), lr=1e-2)
        scheduler = CosineAnnealingLR(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def by_epoch(data: TensorDataset) -> DataLoader[Any]:
    """Batches in an order that depends on the epoch only, so that a resumed run meets the same."""
    return DataLoader(data, batch_size=32, sampler=DistributedSampler(data, num_replicas=1, rank=0, seed=0))


@pytest.mark.parametrize("averaging", ["first", "last"])
def test_a_schedule_averaging_and_the_best_checkpoint(
    method: Method, averaging: str, digits: tuple[TensorDataset, TensorDataset], tmp_path: Path
) -> None:
    ema = EMAWeightAveraging(decay=0.9)
    # top_k -1: with the best alone, the "last" of a run whose last epoch is not its best would be an earlier one
    best = ModelCheckpoint(tmp_path, monitor="accuracy", mode="max", save_top_k=-1, save_last=True)
    callbacks = [ema, *method()] if averaging == "first" else [*method(), ema]
    held_out = DataLoader(digits[1], batch_size=480)
    module = Classifier()
    trainer = quiet_trainer([*callbacks, best], max_epochs=4, enable_checkpointing=True)
    trainer.fit(module, by_epoch(digits[0]), held_out)
    assert_sparse(module, method)
    assert_engine_clean(module)
    accuracy = quiet_trainer([]).validate(module, held_out, verbose=False)[0]["accuracy"]
    assert accuracy > 0.8

    trainer.save_checkpoint(tmp_path / "after.ckpt")
    for path in (best.last_model_path, tmp_path / "after.ckpt"):
        assert_same(load_folded(path, Classifier()), module)
    assert best.best_model_score is not None
    served = load_folded(best.best_model_path, Classifier())
    found = quiet_trainer([]).validate(served, held_out, verbose=False)[0]["accuracy"]
    if method is METHODS["sparsyfed"]:
        assert_sparse(served, method)  # what was scored was not cut yet
        assert found > 0.8
    else:
        assert found == pytest.approx(float(best.best_model_score))


def test_accumulation_clipping_and_mixed_precision(
    method: Method, digits: tuple[TensorDataset, TensorDataset], tmp_path: Path
) -> None:
    module = Classifier()
    trainer = quiet_trainer(
        method(), max_epochs=6, accumulate_grad_batches=2, gradient_clip_val=1.0, precision="bf16-mixed"
    )
    held_out = DataLoader(digits[1], batch_size=480)
    trainer.fit(module, by_epoch(digits[0]), held_out)
    assert trainer.global_step == 6 * 15
    assert_sparse(module, method)
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    assert quiet_trainer([]).validate(module, held_out, verbose=False)[0]["accuracy"] > 0.8
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    assert_same(load_folded(tmp_path / "after.ckpt", Classifier()), module)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")  # the interrupted run's
@pytest.mark.parametrize("averaging", [True, False])
def test_resuming_equals_no_interruption(
    method: Method, averaging: bool, digits: tuple[TensorDataset, TensorDataset], tmp_path: Path
) -> None:
    modules = []
    for ckpt_path in (None, tmp_path / "epoch=0.ckpt"):
        torch.manual_seed(0)
        callbacks = [*method(), *([EMAWeightAveraging(decay=0.9)] if averaging else [])]
        saving = ModelCheckpoint(tmp_path, filename="{epoch}", every_n_epochs=1, save_top_k=-1)
        module = Classifier()
        module.network[5].p = 0.0  # dropout draws from a generator that no checkpoint holds
        trainer = quiet_trainer([*callbacks, saving], max_epochs=3, enable_checkpointing=True)
        held_out = DataLoader(digits[1], batch_size=480)
        trainer.fit(module, by_epoch(digits[0]), held_out, ckpt_path=ckpt_path)
        modules.append(module)
    assert_same(modules[1], modules[0])
    assert_sparse(modules[1], method)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch.compile warns about its own internals
def test_compiled(method: Method, digits: tuple[TensorDataset, TensorDataset]) -> None:
    modules = [Classifier(), Classifier()]
    for module, fitted in zip(modules, [modules[0], torch.compile(modules[1], backend="aot_eager")], strict=True):
        torch.manual_seed(0)
        module.network[5].p = 0.0
        quiet_trainer(method(), max_epochs=1, limit_train_batches=10).fit(fitted, by_epoch(digits[0]))
        assert_sparse(module, method)
    for one, other in zip(modules[0].parameters(), modules[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


class Gan(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(
            nn.Linear(16, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.Sigmoid()
        )
        self.discriminator = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1))

    def training_step(self, batch: list[Tensor]) -> None:
        for_generator, for_discriminator = self.optimizers()
        fake = self.generator(torch.randn(len(batch[0]), 16))
        loss = F.softplus(-self.discriminator(batch[0])).mean() + F.softplus(self.discriminator(fake.detach())).mean()
        for_discriminator.zero_grad()
        self.manual_backward(loss)
        for_discriminator.step()
        loss = F.softplus(-self.discriminator(fake)).mean()
        for_generator.zero_grad()
        self.manual_backward(loss)
        for_generator.step()

    def configure_optimizers(self) -> Any:
        return [
            Adam(self.generator.parameters(), lr=2e-3, betas=(0.5, 0.99)),
            Adam(self.discriminator.parameters(), lr=5e-4, betas=(0.5, 0.99)),
        ]


@pytest.mark.parametrize("averaging", [True, False])
def test_two_optimizers(
    method: Method, averaging: bool, digits: tuple[TensorDataset, TensorDataset], tmp_path: Path
) -> None:
    module, real = Gan(), digits[0].tensors[0].flatten(1)

    def error_of_the_mean(gan: Gan) -> float:
        noise = torch.randn(500, 16, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            return float((copy.deepcopy(gan.generator).eval()(noise).mean(0) - real.mean(0)).abs().mean())

    before = error_of_the_mean(module)
    callbacks = [*method(), *([EMAWeightAveraging(decay=0.9)] if averaging else [])]
    trainer = quiet_trainer(callbacks, max_epochs=6)
    trainer.fit(module, by_epoch(digits[0]))
    assert trainer.global_step == 2 * 6 * 30  # both optimizers' steps
    assert_sparse(module, method)
    assert_engine_clean(module)
    assert error_of_the_mean(module) < 0.6 * before
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    assert_same(load_folded(tmp_path / "after.ckpt", Gan()), module)


class Characters(pl.LightningModule):
    """A transformer over the characters of a sentence that repeats: what comes next is certain."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 32)
        self.positions = nn.Parameter(0.02 * torch.randn(16, 32))
        layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 1, nn.LayerNorm(32), enable_nested_tensor=False)
        self.head = nn.Linear(32, 32)

    def loss(self, windows: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(16)
        x = self.layers(self.embedding(windows[:, :-1]) + self.positions, mask=mask, is_causal=True)
        return F.cross_entropy(self.head(x).flatten(0, 1), windows[:, 1:].flatten())

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return self.loss(batch[0])

    def configure_optimizers(self) -> Any:
        return AdamW(self.parameters(), lr=1e-2)


SENTENCE = "pruned weights keep learning and may come back when the masks move "
PROJECTIONS = ("layers.*in_proj_weight", "layers.*out_proj.weight", "layers.*linear?.weight")


@pytest.mark.parametrize("include", [(), PROJECTIONS])
def test_a_transformer(method: Method, include: tuple[str, ...], tmp_path: Path) -> None:
    text = torch.tensor([ord(letter) % 32 for letter in SENTENCE * 12])
    windows = text.unfold(0, 17, 1)
    options = {"activation_pruning": False} if include and method is METHODS["sparsyfed"] else {}
    module = Characters()
    trainer = quiet_trainer(method(include=include, **options), max_epochs=4)
    trainer.fit(module, DataLoader(TensorDataset(windows), batch_size=32, shuffle=True))
    assert_sparse(module, method, include)
    shares = text.bincount().float() / len(text)
    with torch.no_grad():
        assert module.loss(windows) < 0.5 * -(shares * shares.clamp_min(1e-9).log()).sum()
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    assert_same(load_folded(tmp_path / "after.ckpt", Characters()), module)


def test_attention_inputs_are_refused_by_activation_pruning() -> None:
    with pytest.raises(ValueError, match=r"got 'layers.layers.0.self_attn.in_proj_weight' of a MultiheadAttention"):
        quiet_trainer(sparsyfed(include=PROJECTIONS)).fit(
            Characters(), DataLoader(TensorDataset(torch.zeros(4, 17, dtype=torch.long)))
        )
