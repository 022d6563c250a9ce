"""Known answers about whole networks: what the methods' specifications count in LeNet-5, AlexNet and ResNet-18."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_fedsparse.accounting import Traffic, size_in_bytes
from lightning_fedsparse.callbacks import ActivationPruning, Powerpropagation
from lightning_fedsparse.masks import largest_weights, magnitude_masks, sparsity_of
from lightning_fedsparse.models import AlexNet, LeNet5, ResNet18
from lightning_fedsparse.payload import decode, encode
from lightning_fedsparse.powers import root_
from lightning_fedsparse.prunable import prunable_parameters
from lightning_fedsparse.submodels import importance_factor, submodel_masks, submodel_thresholds
from lightning_fedsparse.update import MaskSet, SparseUpdate, gather
from tests.effective_reference import quiet_trainer

CAPACITIES = [1 / 4, 1 / 16, 1 / 64, 0.64, 0.36, 0.16, 0.04]
# the released image models mask the classifier's bias too
WEIGHTS = ["*conv*weight", "*shortcut.0.weight", "linear.*"]


def numbered(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """As many weights, no two of one magnitude: float32 tells 16 million integers apart."""
    sizes = [parameter.numel() for parameter in parameters.values()]
    numbers = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(0)).float().add_(1).split(sizes)
    return {name: number.view(parameters[name].shape) for name, number in zip(parameters, numbers, strict=True)}


# -- FIARSE ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("classes", "maskable", "total", "kept"),
    [
        (10, 11_164_362, 11_173_962, [2_791_090, 697_772, 174_443, 7_145_191, 4_019_170, 1_786_297, 446_574]),
        (100, 11_210_532, 11_220_132, [2_802_633, 700_658, 175_164, 7_174_740, 4_035_791, 1_793_685, 448_421]),
    ],
)
def test_weights_of_each_submodel(classes: int, maskable: int, total: int, kept: list[int]) -> None:
    model = ResNet18(classes)
    parameters = prunable_parameters(model, WEIGHTS)
    assert sum(parameter.numel() for parameter in parameters.values()) == maskable
    assert sum(parameter.numel() for parameter in model.parameters()) == total
    weights = numbered(parameters)
    for capacity, count in zip(CAPACITIES, kept, strict=True):
        masks = submodel_masks(weights, submodel_thresholds(weights, [list(weights)], capacity))
        assert sum(int(mask.count_nonzero()) for mask in masks.values()) == count


@pytest.mark.parametrize(
    ("capacity", "indexed", "mapped", "upload"),
    [
        (1 / 4, 22_367_120, 12_598_305, 11_202_760),
        (1 / 16, 5_620_576, 4_225_033, 2_829_488),
        (1 / 64, 1_433_944, 2_131_717, 736_172),
    ],
)
def test_bytes_of_a_submodel(capacity: float, indexed: int, mapped: int, upload: int) -> None:
    model = ResNet18()
    parameters = dict(model.named_parameters())
    assert size_in_bytes(parameters) == 44_695_848
    weights = numbered(prunable_parameters(model, WEIGHTS))
    masks = submodel_masks(weights, submodel_thresholds(weights, [list(weights)], capacity))
    held = MaskSet.of({name: masks.get(name) for name in parameters})
    update = SparseUpdate(gather({**parameters, **weights}, held), held, mask_id=held.id)
    # the receiver holds the mask: the values alone
    assert Traffic.counted(update, reference=held, dense=0).total == upload
    # raw values beside indices of 32 bits, or a bit per entry that can be masked; a payload is smaller than both
    kept = sum(int(mask.count_nonzero()) for mask in masks.values())
    assert upload + 4 * kept == indexed
    assert upload + sum(mask.numel() for mask in masks.values()) // 8 == mapped
    payload = encode(update)
    assert len(payload) < min(indexed, mapped)
    assert MaskSet.of(decode(payload).masks).id == held.id


def test_torchs_initialization_ranks_layers_by_their_fan_in() -> None:
    torch.manual_seed(0)
    weights = {name: weight.detach() for name, weight in prunable_parameters(ResNet18(), WEIGHTS).items()}

    def share(masks: dict[str, Tensor], *parts: str) -> float:
        mine = [mask for name, mask in masks.items() if all(part in name for part in parts)]
        return 100 * sum(int(mask.sum()) for mask in mine) / sum(mask.numel() for mask in mine)

    found = {}
    for capacity, theta in ((1 / 64, 0.029187), (1 / 16, 0.019414), (1 / 4, 0.012783)):
        thresholds = submodel_thresholds(weights, [list(weights)], capacity)
        assert thresholds["conv1.weight"] == pytest.approx(theta, rel=2e-3)
        found[capacity] = submodel_masks(weights, thresholds)
    smallest = found[1 / 64]
    assert share({"conv1": smallest["conv1.weight"]}) == pytest.approx(84.8, abs=1.5)
    assert share(smallest, "layer1") == pytest.approx(30.0, abs=0.5)
    assert share(smallest, "layer2", "conv") == pytest.approx(5.1, abs=0.3)
    assert share(smallest, "layer3", "conv") == pytest.approx(0.13, abs=0.1)
    assert share(smallest, "layer4", "conv") == 0
    assert share(smallest, "layer4", "shortcut") == pytest.approx(53, abs=1)
    assert share(smallest, "linear") == pytest.approx(34.0, abs=1.5)
    assert share(found[1 / 16], "layer4", "conv") == pytest.approx(0.97, abs=0.05)
    assert share(found[1 / 4], "layer4", "conv") == pytest.approx(16.9, abs=0.5)


def test_the_factor_is_the_slope_of_the_masks_surrogate() -> None:
    weight = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    ((weight - 0.3) / (weight + 0.3)).clamp(0, 1).backward()
    assert float(weight.grad) == pytest.approx(0.9375, abs=1e-12)  # type: ignore[arg-type]
    assert float((importance_factor(weight.detach(), 0.3) - 1) / weight.detach()) == pytest.approx(0.9375, abs=1e-12)


# -- SparsyFed ---------------------------------------------------------------------------------------------------------


def speech_model() -> nn.Module:
    model = ResNet18(35)
    model.conv1 = nn.Conv2d(1, 64, 7, bias=False)
    return model


@pytest.mark.parametrize(
    ("model", "prunable", "total", "never"),
    [
        (ResNet18(10), 11_164_352, 11_173_962, 9_610),
        (ResNet18(100), 11_210_432, 11_220_132, 9_700),
        (speech_model(), 11_178_560, 11_188_195, 9_635),
    ],
    ids=["cifar10", "cifar100", "speech"],
)
def test_weights_that_can_be_pruned(model: nn.Module, prunable: int, total: int, never: int) -> None:
    assert sum(weight.numel() for weight in prunable_parameters(model).values()) == prunable
    assert sum(parameter.numel() for parameter in model.parameters()) == total
    assert total - prunable == never


@pytest.mark.parametrize(
    ("sparsity", "kept", "reported"),
    [
        (0.9, 1_116_435, 89.9226),
        (0.95, 558_218, 94.9183),
        (0.99, 111_644, 98.9149),
        (0.995, 55_822, 99.4144),
        (0.999, 11_164, 99.8141),
    ],
)
def test_what_a_client_keeps_and_the_most_it_can_report(sparsity: float, kept: int, reported: float) -> None:
    masks = largest_weights(numbered(prunable_parameters(ResNet18(10))), sparsity)
    assert sum(int(mask.count_nonzero()) for mask in masks.values()) == kept
    never = {"never pruned": torch.ones(9_610, dtype=torch.bool)}
    # the dense parameters count as kept
    assert 100 * sparsity_of({**masks, **never}) == pytest.approx(reported, abs=5e-5)


class Layer(pl.LightningModule):
    """One linear layer whose effective weight, input and output gradient are given."""

    weight = torch.tensor([[0.8, 0, 0, -0.5], [0, 0, 0.3, 0]], dtype=torch.float64)
    output_gradient = torch.tensor([[1, -2], [0.5, 0.25]], dtype=torch.float64)

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2).double()
        with torch.no_grad():
            # stored weights of W; the callback's own conversion then finds their powers
            self.layer.weight.copy_(self.weight.sign() * self.weight.abs() ** 1.25)
            self.layer.bias.zero_()

    def training_step(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        self.y = self.layer(x)
        x.register_hook(lambda gradient: setattr(self, "x_gradient", gradient.clone()))
        self.layer.weight.register_hook(lambda gradient: setattr(self, "theta_gradient", gradient.clone()))
        return (self.y * self.output_gradient).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def test_one_step_of_a_linear_layer_with_both_callbacks() -> None:
    module = Layer()
    x = torch.tensor([[0.9, -0.1, 0.4, 0], [-0.7, 0.2, 0, 0.3]], dtype=torch.float64)
    powers = Powerpropagation(1.25)
    trainer = quiet_trainer(max_steps=1, callbacks=[powers, ActivationPruning()])
    trainer.fit(module, DataLoader(x, batch_size=2))  # type: ignore[arg-type]

    def close(found: Tensor, expected: list[list[float]] | list[float]) -> None:
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)

    close(module.y.detach(), [[0.680934, 0.088810], [-0.655750, 0]])
    close(module.x_gradient, [[0.756593, 0, -0.444050, -0.420448], [0.378297, 0, 0.055506, -0.210224]])  # type: ignore[arg-type]
    close(module.theta_gradient, [[0.55, 0, 0.4, 0], [-1.975, 0, -0.8, 0]])  # type: ignore[arg-type]
    # what is left is a module of effective weights: their stored ones tell the step
    after = {"w": module.layer.weight.detach().clone()}
    root_(after, {"w": 1.25})
    close(Layer.weight - after["w"], [[0.650197, 0, 0, 0], [0, 0, -0.740083, 0]])
    close(-module.layer.bias.detach(), [1.5, -1.75])


# -- FedDIP ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "size", "zeros"),
    [
        (LeNet5(), 61_470, [30_735, 49_176, 55_323, 58_396, 60_855]),
        (AlexNet(), 23_262_912, [11_631_456, 18_610_330, 20_936_621, 22_099_766, 23_030_283]),
        (ResNet18(100), 11_038_400, [5_519_200, 8_830_720, 9_934_560, 10_486_480, 10_928_016]),
    ],
    ids=["lenet", "alexnet", "resnet"],
)
def test_zeros_after_global_pruning(model: nn.Module, size: int, zeros: list[int]) -> None:
    shortcuts = ["*shortcut*"] if isinstance(model, ResNet18) else []
    parameters = prunable_parameters(model, exclude=shortcuts)
    assert sum(parameter.numel() for parameter in parameters.values()) == size
    weights = {name: torch.rand(parameter.shape) for name, parameter in parameters.items()}
    for sparsity, count in zip((0.5, 0.8, 0.9, 0.95, 0.99), zeros, strict=True):
        masks = magnitude_masks(weights, sparsity)
        assert sum(int((~mask).count_nonzero()) for mask in masks.values()) == count


@pytest.mark.parametrize(
    ("values", "normalized"),
    [([1.0, 2.0, 3.0, 6.0], [-1.069043, -0.534522, 0.0, 1.603565]), ([1.0, 2.0], [-0.99998, 0.99998])],
)
def test_an_image_is_normalized_by_the_batch_beside_it(values: list[float], normalized: list[float]) -> None:
    model = ResNet18(batch_statistics=True).double().eval()
    assert not list(model.buffers())
    layer = model.bn1
    images = torch.tensor(values, dtype=torch.float64).view(-1, 1, 1, 1).expand(-1, 64, 2, 2)
    assert layer(images)[:, 5, 1, 0].tolist() == pytest.approx(normalized, abs=1e-6)
