"""What a training step costs a device: counts by hand, torch's own counter and allocator as references."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from lightning_fedsparse import FederatedDataModule, FederatedLoop
from lightning_fedsparse.activations import PrunedActivation
from lightning_fedsparse.callbacks import ActivationPruning, DeviceMonitor, MagnitudePruning, fiarse, sparsyfed
from lightning_fedsparse.capacities import CapacityList
from lightning_fedsparse.device_costs import LayerCost, product_macs, saved_bytes, sparse_bytes
from lightning_fedsparse.evaluation import Evaluation
from lightning_fedsparse.models import ImageClassifier
from lightning_fedsparse.partition import IidPartition
from lightning_fedsparse.schedules import ConstantSchedule
from tests.effective_reference import quiet_trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`")

# -- the pure parts ----------------------------------------------------------------------------------------------------


def test_three_products_of_which_zeros_are_left_out() -> None:
    cost = LayerCost(1000, weight_density=0.05, activation_density=0.2)
    assert cost.dense_step_macs == 3000
    assert cost.step_macs == pytest.approx(50 + 50 + 200)


def test_a_first_layer_needs_no_gradient_of_its_input_and_a_frozen_weight_none() -> None:
    assert LayerCost(10, weight_density=0.5, input_gradient=False).dense_step_macs == 20
    assert LayerCost(10, weight_density=0.5, input_gradient=False).step_macs == 15
    assert LayerCost(10, weight_density=0.5, weight_gradient=False).step_macs == 10


@pytest.mark.parametrize(
    ("layer", "shape", "macs"),
    [
        (nn.Linear(7, 5), (3, 7), 3 * 5 * 7),
        (nn.Linear(7, 5), (3, 4, 7), 12 * 5 * 7),
        (nn.Conv2d(3, 8, 5), (2, 3, 10, 10), 2 * 8 * 36 * 75),
        (nn.Conv2d(3, 8, 5), (3, 10, 10), 8 * 36 * 75),
        (nn.Conv2d(4, 8, 3, groups=2, stride=2, padding=1), (1, 4, 8, 8), 8 * 16 * 18),
        (nn.Conv1d(3, 8, 5), (2, 3, 12), 2 * 8 * 8 * 15),
        (nn.ConvTranspose2d(4, 6, 3, stride=2), (2, 4, 5, 5), 2 * 4 * 25 * 54),
    ],
)
def test_multiply_adds_of_a_product_by_hand_and_by_torchs_counter(
    layer: nn.Module, shape: tuple[int, ...], macs: int
) -> None:
    x = torch.zeros(shape)
    with FlopCounterMode(display=False) as counter:
        y = layer(x)
    assert product_macs(layer, x, y) == macs
    assert counter.get_total_flops() == 2 * macs


def test_bytes_of_sparse_parameters() -> None:
    tensors = {"a": torch.zeros(80), "b": torch.zeros(80, dtype=torch.bfloat16), "bias": torch.zeros(3)}
    assert sparse_bytes(tensors, {}) == 320 + 160 + 12
    # 8 values of 4 bytes and 10 bytes of bits; 79 values and bits would be more than the dense 160
    assert sparse_bytes(tensors, {"a": 8, "b": 79}) == 32 + 10 + 160 + 12


def test_saved_bytes_by_hand() -> None:
    linear, x = nn.Linear(4, 8), torch.zeros(16, 4)
    meter = saved_bytes(linear.parameters())
    with meter:
        y = linear(x)  # saves its input, 256 bytes, and its weight, which is there anyway
        z = torch.sigmoid(y)  # saves its output, 512 bytes
        loss = (z * z).sum()  # saves z twice more: the same storage
    assert meter.peak == 256 + 512
    loss.backward()
    with meter:
        meter.look()
    assert meter._bytes == 0


def test_what_is_freed_is_not_counted_on() -> None:
    x = torch.zeros(16, 4, requires_grad=True)
    meter = saved_bytes()
    with meter:
        for _ in range(3):
            x.exp().sum().backward()
    assert meter.peak == 256


def test_gradients_of_gradients_pass() -> None:
    x = torch.tensor([2.0], requires_grad=True)
    with saved_bytes():
        (first,) = torch.autograd.grad((x**3).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x)
    assert (first.item(), second.item()) == (12, 12)


def test_a_tensor_changed_in_place_still_raises() -> None:
    x = torch.ones(3, requires_grad=True)
    with saved_bytes():
        y = x.exp()
        loss = (y * y).sum()
        with torch.no_grad():
            y.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_pruned_activations_count_as_they_are_kept() -> None:
    assert not list(PrunedActivation.live)
    meter = saved_bytes()
    with meter:
        pruned = PrunedActivation(torch.arange(100.0), 90.0)
        meter.look()
    assert meter.peak == 10 * 4 + 13  # values and bits
    assert pruned.density == 0.1
    del pruned
    assert not list(PrunedActivation.live)


# -- in a Trainer ------------------------------------------------------------------------------------------------------


def network() -> nn.Sequential:
    """LayerNorm and GELU: the linear layers are the only ones that keep their inputs."""
    return nn.Sequential(nn.Flatten(), nn.LayerNorm(16), nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 8))


def images(count: int = 64) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(
        torch.randn(count, 16, generator=generator), torch.randint(0, 8, (count,), generator=generator)
    )
    data.targets = data.tensors[1]  # type: ignore[attr-defined]
    return data


def fit(callbacks: list[Any], *, monitor_first: bool = False, **options: Any) -> dict[str, float]:
    torch.manual_seed(0)
    monitor = [DeviceMonitor()]
    trainer = quiet_trainer(monitor + callbacks if monitor_first else callbacks + monitor, **options)
    trainer.fit(ImageClassifier(network()), DataLoader(images(), batch_size=32))
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


DENSE_MACS = 32 * (3 * 16 * 64 + 3 * 64 * 8)


def test_a_dense_model() -> None:
    figures = fit([])
    assert figures["device/macs"] == figures["device/dense_macs"] == DENSE_MACS
    assert figures["device/parameter_bytes"] == figures["device/dense_parameter_bytes"] == 4 * (32 + 1088 + 520)


def test_masks_save_multiply_adds_and_bytes_but_no_activations() -> None:
    dense, sparse = fit([]), fit([MagnitudePruning(ConstantSchedule(0.75), scope="layer")])
    assert sparse["device/dense_macs"] == DENSE_MACS
    assert sparse["device/macs"] == 32 * (1024 + 512) * (0.25 + 0.25 + 1)
    assert sparse["device/parameter_bytes"] == 4 * (32 + 64 + 8) + 4 * 384 + 1536 / 8
    assert sparse["device/activation_bytes"] == dense["device/activation_bytes"]


def test_weights_are_no_activations_whichever_callback_comes_first() -> None:
    masks = [MagnitudePruning(ConstantSchedule(0.75), scope="layer")]
    assert fit(masks, monitor_first=True) == fit(masks)


def test_activation_pruning_saves_both() -> None:
    masks = [MagnitudePruning(ConstantSchedule(0.75), scope="layer")]
    kept, pruned = fit(masks), fit([*masks, ActivationPruning()])
    assert pruned["device/macs"] == pytest.approx(32 * (1024 + 512) * 0.75)
    # inputs of 32 x 16 and 32 x 64 floats, of which a quarter stays, with a bit per entry for where
    saved = 32 * (16 + 64) * (4 - 4 / 4 - 1 / 8)
    assert kept["device/activation_bytes"] - pruned["device/activation_bytes"] == saved


def test_activations_as_torchs_allocator_counts_them() -> None:
    module, batch = network(), images(512).tensors
    meter = saved_bytes(module.parameters())
    with meter:
        F.cross_entropy(module(batch[0]), batch[1])
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        loss = F.cross_entropy(module(batch[0]), batch[1])
    held = sum(event.self_cpu_memory_usage for event in profile.key_averages())
    # the allocator does not see the batch, which was there before, and does see the loss
    there_before = sum(tensor.untyped_storage().nbytes() for tensor in batch)
    assert meter.peak - there_before == pytest.approx(held - loss.nbytes, rel=0.01)


@pytest.mark.parametrize(
    "options", [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}, {"gradient_clip_val": 0.1}]
)
def test_measuring_changes_nothing(options: dict[str, Any]) -> None:
    weights = []
    for monitors in ([], [DeviceMonitor()]):
        torch.manual_seed(0)
        module = ImageClassifier(network())
        quiet_trainer([*sparsyfed(0.5), *monitors], **options).fit(module, DataLoader(images(), batch_size=32))
        weights.append([parameter.detach() for parameter in module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch.compile warns about its own internals
def test_a_compiled_module_is_measured_too() -> None:
    torch.manual_seed(0)
    module = ImageClassifier(network())
    trainer = quiet_trainer([MagnitudePruning(ConstantSchedule(0.75), scope="layer"), DeviceMonitor()])
    trainer.fit(torch.compile(module, backend="aot_eager"), DataLoader(images(), batch_size=32))
    assert trainer.callback_metrics["device/macs"] == 32 * (1024 + 512) * 1.5
    assert trainer.callback_metrics["device/activation_bytes"] > 0


def test_figures_reach_the_logger_once_per_epoch(tmp_path: Path) -> None:
    trainer = quiet_trainer([DeviceMonitor()], logger=CSVLogger(tmp_path), max_epochs=3)
    trainer.fit(ImageClassifier(network()), DataLoader(images(), batch_size=32))
    (file,) = tmp_path.rglob("metrics.csv")
    header, *rows = file.read_text(encoding="utf-8").splitlines()
    column = header.split(",").index("device/macs")
    assert [float(row.split(",")[column]) for row in rows] == [DENSE_MACS] * 3


def test_an_error_in_the_first_batch_leaves_no_hook() -> None:
    class Fails(ImageClassifier):
        def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            self(batch[0])
            raise ValueError("mine")

    module = Fails(network())
    with pytest.raises(ValueError, match="mine"):
        quiet_trainer([DeviceMonitor()]).fit(module, DataLoader(images(), batch_size=32))
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in module.modules())
    with torch.autograd.graph.disable_saved_tensors_hooks("refused while some are active"):
        pass


# -- in a federation ---------------------------------------------------------------------------------------------------


def federate(callbacks: list[Any], capacities: list[float] | None = None) -> list[dict[str, float]]:
    torch.manual_seed(0)
    data = FederatedDataModule(
        DataLoaders(), IidPartition(num_clients=4), capacities=None if capacities is None else CapacityList(capacities)
    )
    loop = FederatedLoop(2, 4, callbacks, evaluation=Evaluation(split="none"), console=False)
    return [record.metrics for record in loop.fit(ImageClassifier(network()), data)[1:]]


class DataLoaders(pl.LightningDataModule):
    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(images(), batch_size=16)


def test_the_mean_over_the_clients_is_in_the_round_record() -> None:
    first, second = federate([*sparsyfed(0.5, activation_pruning=False), DeviceMonitor()])
    assert first["device/macs"] == first["device/dense_macs"] == DENSE_MACS / 2  # dense in the first round
    assert second["device/dense_macs"] == DENSE_MACS / 2
    assert second["device/macs"] < 0.95 * DENSE_MACS / 2
    assert not any("@" in name or "capacity" in name for name in second)


def test_each_capacity_has_its_own_figures() -> None:
    _, figures = federate([*fiarse(), DeviceMonitor()], [1.0, 0.25, 0.25, 0.25])
    assert figures["device/macs@1"] == DENSE_MACS / 2
    small = figures["device/macs@0.25"]
    assert small < 0.75 * DENSE_MACS / 2
    assert figures["device/macs"] == pytest.approx((DENSE_MACS / 2 + 3 * small) / 4)
    assert figures["device/parameter_bytes@0.25"] < 0.5 * figures["device/dense_parameter_bytes@0.25"]


@pytest.mark.parametrize("make", [list, lambda: sparsyfed(0.5)])
def test_a_used_monitor_measures_a_federation_anew(make: Callable[[], list[Any]]) -> None:
    monitor = DeviceMonitor()
    quiet_trainer([monitor]).fit(ImageClassifier(network()), DataLoader(images(), batch_size=32))
    assert federate([*make(), monitor])[0]["device/dense_macs"] == DENSE_MACS / 2
