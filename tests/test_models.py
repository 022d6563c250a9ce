import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedsparse import FederatedDataModule, FederatedLoop
from lightning_fedsparse.callbacks import feddip
from lightning_fedsparse.datasets import OptdigitsDataModule
from lightning_fedsparse.evaluation import Evaluation
from lightning_fedsparse.models import (
    AlexNet,
    CharacterLSTM,
    DigitsCNN,
    FedAvgCNN,
    ImageClassifier,
    LeNet5,
    NextCharacter,
    Regressor,
    ResNet18,
    SensorCNN,
    SmallCNN,
)
from lightning_fedsparse.partition import IidPartition

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@pytest.mark.parametrize(
    ("network", "image", "classes", "count"),
    [
        (LeNet5, (1, 28, 28), 10, 61_706),
        (FedAvgCNN, (1, 28, 28), 10, 1_663_370),  # the count that the paper states
        (AlexNet, (3, 32, 32), 10, 23_272_266),
        (ResNet18, (3, 32, 32), 100, 11_220_132),
        (SmallCNN, (3, 32, 32), 10, 1_626_442),
        (DigitsCNN, (1, 8, 8), 10, 38_282),
    ],
)
def test_parameters_and_shapes(network, image, classes, count):
    model = network(num_classes=classes)
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert model(torch.rand(2, *image)).shape == (2, classes)


def shapes(model, *kinds):
    return [tuple(module.weight.shape) for module in model.modules() if isinstance(module, kinds)]


def test_lenet_layers():
    model = LeNet5()
    assert shapes(model, nn.Conv2d, nn.Linear) == [(6, 1, 5, 5), (16, 6, 5, 5), (120, 400), (84, 120), (10, 84)]
    assert sum(p.numel() for p in model.parameters() if p.ndim > 1) == 61_470


def test_alexnet_layers():
    model = AlexNet()
    assert sum(p.numel() for p in model.parameters() if p.ndim > 1) == 23_262_912
    assert [module.p for module in model.modules() if isinstance(module, nn.Dropout)] == [0.5, 0.5]


def test_resnet_layers():
    model = ResNet18(100)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert (len(norms), sum(norm.weight.numel() for norm in norms)) == (20, 4800)
    weights = {name: p.numel() for name, p in model.named_parameters() if p.ndim > 1}
    assert sum(weights.values()) == 11_210_432
    shortcuts = {name: size for name, size in weights.items() if "shortcut" in name}
    assert list(shortcuts) == [f"layer{stage}.0.shortcut.0.weight" for stage in (2, 3, 4)]
    assert sum(shortcuts.values()) == 172_032
    prunable = [size for name, size in weights.items() if "conv" in name or name == "linear.weight"]
    assert sum(prunable) == 11_038_400


def test_small_cnn_layers():
    assert shapes(SmallCNN(), nn.Conv2d, nn.Linear) == [(32, 3, 3, 3), (64, 32, 3, 3), (128, 12544), (10, 128)]


def test_fedavg_cnn_layers():
    assert shapes(FedAvgCNN(), nn.Conv2d, nn.Linear) == [(32, 1, 5, 5), (64, 32, 5, 5), (512, 3136), (10, 512)]


def test_fedavg_cnn_takes_colour_images():
    model = FedAvgCNN(channels=3, size=32)
    assert shapes(model, nn.Conv2d, nn.Linear) == [(32, 3, 5, 5), (64, 32, 5, 5), (512, 4096), (10, 512)]
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)


def test_fedavg_cnn_needs_pixels_to_pool():
    with pytest.raises(ValueError, match="^expected a size of at least 4 pixels, for two poolings, got 3$"):
        FedAvgCNN(size=3)


class Pixels(nn.Module):
    """Logits are the first three pixels plus a trainable bias."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(3))

    def forward(self, images):
        return images.flatten(1)[:, :3] + self.bias


def test_evaluation_means_are_over_images():
    images, classes = torch.randn(7, 1, 2, 2), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    loader = DataLoader(TensorDataset(images, classes), batch_size=3)  # the last batch is smaller
    logits = images.flatten(1)[:, :3]
    trainer = Trainer(**QUIET)
    model = ImageClassifier(Pixels())
    for part, run in (("val", trainer.validate), ("test", trainer.test)):
        (metrics,) = run(model, loader, verbose=False)
        assert metrics == {
            f"{part}_loss": pytest.approx(F.cross_entropy(logits, classes).item(), rel=1e-6),
            f"{part}_accuracy": pytest.approx((logits.argmax(1) == classes).float().mean().item()),
        }


def test_training_step_is_the_cross_entropy_and_logs_nothing():
    model = ImageClassifier(Pixels())
    batch = torch.randn(4, 1, 2, 2), torch.tensor([0, 1, 2, 0])
    loss = model.training_step(batch)
    assert loss.item() == pytest.approx(F.cross_entropy(batch[0].flatten(1)[:, :3], batch[1]).item())
    trainer = Trainer(max_epochs=1, **QUIET)
    loader = DataLoader(TensorDataset(*batch))
    trainer.fit(model, loader, loader)
    assert set(trainer.callback_metrics) == {"val_loss", "val_accuracy"}


def test_character_lstm():
    model = CharacterLSTM()
    assert sum(parameter.numel() for parameter in model.parameters()) == 815_945
    characters = torch.randint(0, 65, (2, 7))
    logits = model(characters)
    assert logits.shape == (2, 7, 65)
    changed = characters.clone()
    changed[:, 5:] = 0
    # what comes later is not seen
    torch.testing.assert_close(model(changed)[:, :5], logits[:, :5])


def test_sensor_cnn():
    model = SensorCNN()
    assert sum(parameter.numel() for parameter in model.parameters()) == 217_289
    assert shapes(model, nn.Conv1d, nn.Linear) == [(64, 14, 5), (64, 64, 5), (100, 1920), (1, 100)]
    assert model(torch.rand(2, 14, 30)).shape == (2, 1)
    assert SensorCNN(3, window=5)(torch.rand(2, 3, 5)).shape == (2, 1)


class Successor(nn.Module):
    """Three symbols; sure that after each comes the next."""

    def __init__(self) -> None:
        super().__init__()
        self.sure = nn.Parameter(torch.tensor(2.0))

    def forward(self, characters):
        return self.sure * F.one_hot((characters + 1) % 3, 3)


def test_next_character_means_are_over_all_characters():
    characters = torch.tensor([[0, 1, 2, 0], [0, 1, 1, 1], [2, 0, 0, 0]])
    loader = DataLoader(TensorDataset(characters[:, :-1], characters[:, 1:]), batch_size=2)
    (metrics,) = Trainer(**QUIET).test(NextCharacter(Successor()), loader, verbose=False)
    # three, one and one of nine
    assert metrics["test_accuracy"] == pytest.approx(5 / 9)
    wrong = torch.tensor(2.0).exp().add(2).log().item()
    assert metrics["test_loss"] == pytest.approx(wrong - 2 * 5 / 9)
    loss = NextCharacter(Successor()).training_step((characters[:, :-1], characters[:, 1:]))
    assert loss.item() == pytest.approx(wrong - 2 * 5 / 9)


class Mean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, windows):
        return windows.mean(1, keepdim=True) + self.bias


def test_rmse_is_of_all_examples_and_starts_anew():
    windows, targets = torch.tensor([[0.5, 1.5], [0.0, 0.0], [2.0, 2.0]]), torch.tensor([13.0, 0.0, 16.0])
    loader = DataLoader(TensorDataset(windows, targets), batch_size=2)
    model, trainer = Regressor(Mean(), scale=10.0), Trainer(**QUIET)
    assert model(windows).tolist() == [10, 0, 20]
    for _ in range(2):
        # errors of 3, 0 and 4
        for part, run in (("val", trainer.validate), ("test", trainer.test)):
            (metrics,) = run(model, loader, verbose=False)
            assert metrics == {f"{part}_rmse": pytest.approx((25 / 3) ** 0.5)}
    assert model.training_step((windows, targets)).item() == pytest.approx(0.25 / 3)
    assert list(model.state_dict()) == ["network.bias"]
    assert list(model.buffers()) == []


def test_regressor_needs_a_positive_scale():
    with pytest.raises(ValueError, match="^expected a positive scale of the targets, got 0$"):
        Regressor(Mean(), scale=0)


def test_state_dict_is_the_networks():
    model = ImageClassifier(LeNet5())
    assert list(model.state_dict()) == [f"network.{name}" for name in LeNet5().state_dict()]
    Trainer(**QUIET).validate(
        model, DataLoader(TensorDataset(torch.rand(2, 1, 28, 28), torch.zeros(2).long())), verbose=False
    )
    assert list(model.state_dict()) == [f"network.{name}" for name in LeNet5().state_dict()]


def test_default_optimizer():
    optimizer = ImageClassifier(Pixels()).configure_optimizers()
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.defaults["lr"] == 0.1
    assert optimizer.defaults["momentum"] == 0


PLAIN = """
model:
  class_path: lightning_fedsparse.models.ImageClassifier
  init_args:
    network: {class_path: lightning_fedsparse.models.LeNet5}
"""
FULL = """
model:
  class_path: lightning_fedsparse.models.ImageClassifier
  init_args:
    network: {class_path: lightning_fedsparse.models.ResNet18, init_args: {num_classes: 100}}
    optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.2, weight_decay: 5.0e-4}}
    lr_scheduler: {class_path: torch.optim.lr_scheduler.ExponentialLR, init_args: {gamma: 0.9}}
"""


def parser():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningModule, "model", required=True)
    return parser


def instantiate(recipe):
    config = parser().parse_string(recipe)
    return getattr(parser(), "instantiate", parser().instantiate_classes)(config).model


def test_constructed_from_yaml():
    model = instantiate(FULL)
    assert isinstance(model, ImageClassifier)
    assert model.network.linear.out_features == 100
    configured = model.configure_optimizers()
    assert configured["optimizer"].defaults["lr"] == 0.2
    assert configured["optimizer"].defaults["weight_decay"] == 5e-4
    assert isinstance(configured["lr_scheduler"], torch.optim.lr_scheduler.ExponentialLR)


@pytest.mark.parametrize("recipe", [PLAIN, FULL])
def test_resolved_configuration_builds_the_same(recipe):
    resolved = parser().dump(parser().parse_string(recipe))
    first, again = instantiate(recipe), instantiate(resolved)
    assert parser().dump(parser().parse_string(resolved)) == resolved
    optimizers = []
    for model in (first, again):
        configured = model.configure_optimizers()
        optimizers.append(configured["optimizer"] if isinstance(configured, dict) else configured)
    assert type(optimizers[0]) is type(optimizers[1])
    assert optimizers[0].defaults == optimizers[1].defaults


@pytest.mark.parametrize(
    "make", [lambda: ImageClassifier(LeNet5()), lambda: instantiate(PLAIN), lambda: instantiate(FULL)]
)
def test_copies_and_pickles(make):
    model = make()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.state_dict().keys() == model.state_dict().keys()
        assert type(other.configure_optimizers()) is type(model.configure_optimizers())


@pytest.mark.slow
def test_digits_are_learned():
    model, data = ImageClassifier(DigitsCNN()), OptdigitsDataModule(validation_fraction=0.1)
    trainer = Trainer(max_epochs=12, num_sanity_val_steps=0, **QUIET)
    trainer.fit(model, data)
    (metrics,) = trainer.test(model, data, verbose=False)
    assert metrics["test_accuracy"] > 0.96


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_channels_last_is_another_layout_of_the_same_federation(precision):
    def train(channels_last):
        torch.manual_seed(1)
        model = ImageClassifier(DigitsCNN(), image_shape=(1, 8, 8), channels_last=channels_last)
        data = FederatedDataModule(OptdigitsDataModule(), IidPartition(num_clients=20))
        trainer = {"max_steps": 3, "precision": precision, "accelerator": "cpu"}
        loop = FederatedLoop(2, 2, feddip(0.8), trainer, evaluation=Evaluation("none"), console=False)
        loop.fit(model, data)
        return model, loop.history[-1].train_loss

    model, loss = train(channels_last=True)
    plain, expected = train(channels_last=False)
    filters = [parameter for parameter in model.parameters() if parameter.ndim == 4]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in filters)
    assert loss == pytest.approx(expected, rel=1e-4 if precision == "32-true" else 0.02)
    held = [parameter.count_nonzero() for parameter in model.parameters()]
    assert held == [parameter.count_nonzero() for parameter in plain.parameters()]
