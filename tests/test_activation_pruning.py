"""Pruned activations: thresholds by hand, gradients against an own backward pass, and bytes that are really saved."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedsparse import load_folded
from lightning_fedsparse.activations import (
    PrunedActivation,
    ReluSigns,
    _pack_bits,
    _pack_bits_on_device,
    _unpack_bits,
    _unpack_bits_on_device,
    activation_threshold,
)
from lightning_fedsparse.callbacks import ActivationPruning, DeviceMonitor, MagnitudePruning, Powerpropagation
from lightning_fedsparse.callbacks.activation_pruning import saving_pruned, saving_signs
from lightning_fedsparse.models import ImageClassifier
from lightning_fedsparse.schedules import ConstantSchedule
from lightning_fedsparse.testing import CHECKS, Check, check_accumulates_gradients
from tests.effective_reference import Net, loader, quiet_trainer, seeded

X = torch.tensor([[0.9, -0.1, 0.4, 0], [-0.7, 0.2, 0, 0.3]])


def pruned(x: Tensor, density: float) -> Tensor:
    return PrunedActivation(x, activation_threshold(x, density)).dense()


# -- the arithmetic ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "density", "threshold", "kept"),
    [
        (X, 0.25, 0.7, [0, 4]),
        (X, 1 - 0.7, 0.4, [0, 2, 4]),
        (torch.tensor([0.5, -0.5, 0.5, 0.2]), 0.5, 0.5, [0, 1, 2]),  # ties stay
        (torch.tensor([0, 0, 0, 0.7]), 0.5, 0.0, [3]),  # zeros enough already
        (X, 1e-7, 0.9, [0]),  # the floor of the released code keeps one
        (torch.arange(60.0), 0.05, 57.0, [57, 58, 59]),  # 0.05 * 60 is a little above 3 in floating point
    ],
)
def test_what_is_kept(x: Tensor, density: float, threshold: float, kept: list[int]) -> None:
    assert activation_threshold(x, density) == pytest.approx(threshold)
    expected = torch.zeros(x.numel())
    expected[kept] = x.flatten()[kept]
    assert torch.equal(pruned(x, density).flatten(), expected)


@given(
    st.lists(st.sampled_from([0.0, 0.5, -0.5, 1.0, -2.0, 3.25]), min_size=1, max_size=40),
    st.floats(1e-7, 1),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
)
def test_the_largest_survive_and_nothing_else(values: list[float], density: float, dtype: torch.dtype) -> None:
    x = torch.tensor(values, dtype=dtype)
    found = pruned(x, density)
    gone = found != x
    assert found.dtype == dtype
    assert bool((found[gone] == 0).all())
    assert int((~gone).sum()) >= density * len(values) - 1e-6
    if bool(gone.any()):
        assert float(x[gone].abs().max()) < float(x[found != 0].abs().min())


@pytest.mark.parametrize("density", [0.001, 0.05, 0.3, 0.434, 0.6])
@pytest.mark.parametrize("kind", ["normal", "relu", "sorted", "bfloat16", "stripes", "few"])
def test_thresholds_of_large_activations_are_exact(kind: str, density: float) -> None:
    x = torch.randn(250_000, generator=torch.Generator().manual_seed(1))
    x = {
        "normal": x,
        "relu": x.relu(),
        "sorted": x.sort().values,
        "bfloat16": x.bfloat16(),
        "stripes": x * (torch.arange(250_000) % 199 > 0),  # what the sample sees is all zero
        "few": x.round(),
    }[kind]
    kept = -(-round(density * 250_000 * 1000) // 1000)
    assert activation_threshold(x, density) == float(x.abs().sort(descending=True).values[kept - 1])


def test_bytes() -> None:
    x = torch.randn(40, 50)
    sparse = PrunedActivation(x, activation_threshold(x, 0.05))
    assert sparse.nbytes == 100 * 4 + 2000 // 8
    half = PrunedActivation(x, activation_threshold(x, 0.5))
    assert half.nbytes == 1000 * 4 + 2000 // 8
    most = PrunedActivation(x, activation_threshold(x, 0.99))
    assert most.nbytes == x.nbytes
    assert torch.equal(most.dense(), pruned(x, 0.99))
    assert ReluSigns(x).nbytes == 2000 // 8


@given(st.lists(st.booleans(), max_size=40))
def test_bits_on_a_cpu_and_on_other_devices(entries: list[bool]) -> None:
    mask = torch.tensor(entries, dtype=torch.bool)
    expected = [sum(bit << place for place, bit in enumerate(entries[i : i + 8])) for i in range(0, len(entries), 8)]
    for pack, unpack in ((_pack_bits, _unpack_bits), (_pack_bits_on_device, _unpack_bits_on_device)):
        bits = pack(mask)
        assert bits.dtype == torch.uint8
        assert bits.tolist() == expected
        assert unpack(bits, len(entries)).tolist() == entries


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_relu_needs_its_signs_only(inplace: bool, dtype: torch.dtype) -> None:
    x = torch.tensor([[1.5, -2.0, 0.0], [-0.0, float("nan"), float("inf")]], dtype=dtype, requires_grad=True)
    g = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], dtype=dtype)
    relu = nn.ReLU(inplace)
    (expected,) = torch.autograd.grad(relu(x * 1), x, g)
    with saving_signs():
        y = relu(x * 1)
    (found,) = torch.autograd.grad(y, x, g)
    assert torch.equal(found, expected)
    assert found.tolist() == [[1, 0, 0], [0, 5, 6]]


# -- one layer ---------------------------------------------------------------------------------------------------------


def test_a_linear_layer_by_hand() -> None:
    w = torch.tensor([[0.8, 0, 0, -0.5], [0, 0, 0.3, 0]], dtype=torch.float64)
    theta = (w.sign() * w.abs() ** 1.25).requires_grad_()
    bias = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    x = X.double().requires_grad_()
    threshold = activation_threshold(x, 1 - 0.625)
    assert threshold == pytest.approx(0.4)
    saving = saving_pruned(x, threshold)
    with saving:
        y = F.linear(x, theta, bias)
    assert saving.hits == 1
    y.backward(torch.tensor([[1, -2], [0.5, 0.25]], dtype=torch.float64))

    def close(found: Tensor | None, expected: list[Any]) -> None:
        assert found is not None
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)

    close(y.detach(), [[0.680934, 0.088810], [-0.655750, 0]])
    close(x.grad, [[0.756593, 0, -0.444050, -0.420448], [0.378297, 0, 0.055506, -0.210224]])
    close(theta.grad, [[0.55, 0, 0.4, 0], [-1.975, 0, -0.8, 0]])
    close(bias.grad, [1.5, -1.75])
    assert theta.grad is not None
    close(theta.grad * 1.25 * w.abs() ** 0.25, [[0.650197, 0, 0, 0], [0, 0, -0.740083, 0]])


class OneLayer(pl.LightningModule):
    """A layer, so that a fit registers the callback's hooks; gradients are taken by hand."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.found: dict[str, Tensor] = {}

    def compute(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0].clone().requires_grad_()
        y = self.compute(self.prepare(x))
        cotangent = torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype)
        loss = (y * cotangent).sum()
        weight = self.layer.weight
        grads = torch.autograd.grad(loss, [x, weight], retain_graph=True)
        self.found = {"y": y.detach(), "x": grads[0], "weight": grads[1]}
        return loss

    def prepare(self, x: Tensor) -> Tensor:
        return x

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def sparse_layer(layer: nn.Module) -> nn.Module:
    weight: Any = layer.weight
    with torch.no_grad():
        weight.mul_(torch.rand(weight.shape, generator=torch.Generator().manual_seed(2)) < 0.25)
    return layer


def fit_one(module: OneLayer, x: Tensor, *callbacks: pl.Callback, **options: Any) -> dict[str, Tensor]:
    data = torch.utils.data.DataLoader([(x, 0)], batch_size=None)
    quiet_trainer(callbacks, **{"max_epochs": 1, **options}).fit(module, data)
    return module.found


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 5), (4, 6)),
    "linear 3-D": (lambda: nn.Linear(6, 5), (4, 3, 6)),
    "linear 1-D": (lambda: nn.Linear(6, 5, bias=False), (6,)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3), (2, 3, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3, padding=1, stride=2), (2, 3, 8, 8)),
    "conv2d unbatched": (lambda: nn.Conv2d(3, 4, 3), (3, 8, 8)),
    "conv2d grouped": (lambda: nn.Conv2d(4, 8, 3, groups=2, padding="same"), (2, 4, 8, 8)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 2, 4, 4, 4)),
    "conv transposed 1d": (lambda: nn.ConvTranspose1d(3, 4, 3), (2, 3, 9)),
    "conv transposed": (lambda: nn.ConvTranspose2d(3, 4, 3), (2, 3, 5, 5)),
    "conv transposed 3d": (lambda: nn.ConvTranspose3d(2, 3, 2), (2, 2, 4, 4, 4)),
}


def expected_gradients(layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Two plain passes: a dense one, and one over the pruned input for the weight's gradient."""
    weight: Any = layer.weight
    density = int(weight.count_nonzero()) / weight.numel()
    smallest = (
        x.abs()
        .flatten()
        .sort(descending=True)
        .values[-(-round(density * weight.numel()) * x.numel() // weight.numel()) - 1]
    )
    x_hat = x * (x.abs() >= smallest)
    found = {}
    for name, value in (("dense", x), ("pruned", x_hat)):
        leaf = value.clone().requires_grad_()
        y = layer(leaf)
        loss = (y * torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype)).sum()
        grads = torch.autograd.grad(loss, [leaf, weight])
        found[name] = (y.detach(), *grads)
    return {"y": found["dense"][0], "x": found["dense"][1], "weight": found["pruned"][2], "full": found["dense"][2]}


@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_of_every_kind_of_layer(kind: str) -> None:
    make, shape = LAYERS[kind]
    layer = sparse_layer(make())
    x = torch.randn(shape)
    expected = expected_gradients(copy.deepcopy(layer), x)
    found = fit_one(OneLayer(layer), x, ActivationPruning())
    assert torch.equal(found["y"], expected["y"])
    assert torch.equal(found["x"], expected["x"])
    torch.testing.assert_close(found["weight"], expected["weight"], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found["weight"], expected["full"], atol=1e-3)


def test_layouts_that_are_not_contiguous() -> None:
    class Transposed(OneLayer):
        def prepare(self, x: Tensor) -> Tensor:
            return x.transpose(1, 2)

    class ChannelsLast(OneLayer):
        def prepare(self, x: Tensor) -> Tensor:
            return x.contiguous(memory_format=torch.channels_last)

    class Twice(OneLayer):
        def compute(self, x: Tensor) -> Tensor:
            return self.layer(input=x) + self.layer(x)

    for module, shape, prepared, factor in (
        (Transposed(sparse_layer(nn.Linear(6, 5))), (2, 6, 3), lambda x: x.transpose(1, 2), 1),
        (ChannelsLast(sparse_layer(nn.Conv2d(3, 4, 3))), (2, 3, 6, 6), lambda x: x, 1),
        (Twice(sparse_layer(nn.Conv2d(3, 4, 3))), (2, 3, 6, 6), lambda x: x, 2),
    ):
        x = torch.randn(shape)
        expected = expected_gradients(copy.deepcopy(module.layer), prepared(x))
        found = fit_one(module, x, ActivationPruning())
        torch.testing.assert_close(found["weight"], factor * expected["weight"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_inside_activation_checkpointing(reentrant: bool) -> None:
    class Checkpointed(OneLayer):
        def compute(self, x: Tensor) -> Tensor:
            return checkpoint(self.layer, x, use_reentrant=reentrant)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            y = self.compute(batch[0].clone().requires_grad_())
            return (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum()

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.found["weight"] = self.layer.weight.grad.clone()

    layer, x = sparse_layer(nn.Conv2d(3, 4, 3)), torch.randn(2, 3, 6, 6)
    expected = expected_gradients(copy.deepcopy(layer), x)
    found = fit_one(Checkpointed(layer), x, ActivationPruning())
    torch.testing.assert_close(found["weight"], expected["weight"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["linear 3-D", "conv2d"])
def test_under_autocast(kind: str) -> None:
    make, shape = LAYERS[kind]
    layer, x = sparse_layer(make()), torch.randn(shape)
    reference = copy.deepcopy(layer)
    found = fit_one(OneLayer(layer), x, ActivationPruning(), precision="bf16-mixed")
    low = x.bfloat16()
    density = int(reference.weight.count_nonzero()) / reference.weight.numel()  # type: ignore[operator, union-attr]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = reference(pruned(low, density))
    grads = torch.autograd.grad(
        (y * torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype)).sum(), reference.weight
    )
    torch.testing.assert_close(found["weight"], grads[0], rtol=0, atol=0)
    assert found["y"].dtype == torch.bfloat16


def test_a_layer_that_saves_something_else_than_its_input_is_found() -> None:
    layer = sparse_layer(nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"))
    with pytest.raises(RuntimeError, match="expected 'layer.weight' to save its input .* that pads its input itself"):
        fit_one(OneLayer(layer), torch.randn(2, 3, 6, 6), ActivationPruning())


def test_an_error_in_a_layer_is_the_one_to_see_and_leaves_nothing_behind() -> None:
    module = OneLayer(sparse_layer(nn.Linear(6, 5)))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fit_one(module, torch.randn(2, 7), ActivationPruning())
    x = torch.randn(2, 6, requires_grad=True)
    assert not module.layer._forward_hooks
    assert not module.layer._forward_pre_hooks
    (x.exp() * 2).sum().backward()
    assert x.grad is not None


# -- in a Trainer ------------------------------------------------------------------------------------------------------


def prune(**options: Any) -> MagnitudePruning:
    return MagnitudePruning(ConstantSchedule(0.75), every=100, **options)


@pytest.fixture
def compressed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, float]]:
    """Size and threshold of every activation that is compressed."""
    made: list[tuple[int, float]] = []
    original = PrunedActivation.__init__

    def spy(self: PrunedActivation, activation: Tensor, threshold: float) -> None:
        made.append((activation.numel(), threshold))
        original(self, activation, threshold)

    monkeypatch.setattr(PrunedActivation, "__init__", spy)
    return made


def test_dense_layers_are_left_alone(compressed: list[Any]) -> None:
    module, plain = seeded(Net), seeded(Net)
    quiet_trainer([ActivationPruning()]).fit(module, loader())
    quiet_trainer([]).fit(plain, loader())
    assert not compressed
    for one, other in zip(module.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)


def test_evaluation_never_prunes(compressed: list[Any]) -> None:
    class Validated(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.loss(batch, "validation")
            with torch.enable_grad():
                self.loss(batch, "validation")

    module = seeded(Validated)
    quiet_trainer([prune(), ActivationPruning()], limit_train_batches=3).fit(module, loader(), loader())
    assert len(compressed) == 2 * 3 * 2  # two layers, three batches, two epochs


def test_frozen_and_excluded_layers_are_left_alone(compressed: list[Any]) -> None:
    module = seeded(Net)
    module.first.weight.requires_grad = False
    quiet_trainer([prune(), ActivationPruning(exclude=["second.*"])]).fit(module, loader())
    assert not compressed


def test_thresholds_of_every_batch_or_of_the_first(compressed: list[tuple[int, float]]) -> None:
    quiet_trainer([prune(), ActivationPruning(include=["first.weight"])]).fit(seeded(Net), loader())
    assert len({threshold for _, threshold in compressed}) == 5  # five batches, twice the same
    compressed.clear()
    pruning = ActivationPruning(include=["first.weight"], threshold="first_batch")
    quiet_trainer([prune(), pruning]).fit(seeded(Net), loader())
    (threshold,) = {threshold for _, threshold in compressed}
    assert pruning.state_dict() == {"activation_thresholds": {"first.weight": threshold}}


def test_a_checkpoint_folds_no_threshold_of_activations_into_weights(tmp_path: Path) -> None:
    module = seeded(Net)
    trainer = quiet_trainer([prune(), ActivationPruning(threshold="first_batch")])
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    folded = load_folded(tmp_path / "end.ckpt", seeded(Net))
    for name, parameter in module.named_parameters():
        assert torch.equal(folded.get_parameter(name), parameter)


def test_the_first_layer_may_be_left_alone(compressed: list[Any]) -> None:
    quiet_trainer([prune(), ActivationPruning(first_layer=False)]).fit(seeded(Net), loader())
    assert len(compressed) == 5 * 2  # one of two layers, five batches, two epochs


def test_the_density_follows_the_layers_own_effective_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, float]] = []
    original = activation_threshold

    def spy(x: Tensor, density: float) -> float:
        seen.append((x.numel(), density))
        return original(x, density)

    monkeypatch.setattr("lightning_fedsparse.callbacks.activation_pruning.activation_threshold", spy)
    module = seeded(Net)
    quiet_trainer([Powerpropagation(), prune(fold=False), ActivationPruning()]).fit(module, loader())
    weights = module.seen["train"]
    found = [density for _, density in seen]
    expected = [
        int(before[name].count_nonzero()) / before[name].numel()
        for before in weights
        for name in ("first.weight", "second.weight")
    ]
    assert found == expected
    assert found[0] != found[1]


def test_weights_are_counted_once_per_optimizer_step(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[str] = []
    pruning = ActivationPruning(include=["first.weight"])
    density = pruning._density

    def spy(name: str, weight: Tensor) -> float:
        if name not in pruning._densities:
            counted.append(name)
        return density(name, weight)

    monkeypatch.setattr(pruning, "_density", spy)
    trainer = quiet_trainer([prune(), pruning], accumulate_grad_batches=2)
    trainer.fit(seeded(Net), loader())
    assert len(counted) == trainer.global_step == 6


def test_a_tied_weight_prunes_for_every_layer_that_has_it(compressed: list[Any]) -> None:
    class Tied(Net):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(8, 6)
            self.again = nn.Linear(6, 8)
            self.again.weight = self.first.weight
            self.embedding.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            ids = torch.zeros(len(x), dtype=torch.long)
            return self.second(torch.tanh(self.first(x) + self.again(x + self.embedding(ids))))

    quiet_trainer([prune(), ActivationPruning()], max_epochs=1).fit(seeded(Tied), loader())
    assert len(compressed) == 3 * 5


@pytest.mark.parametrize("check", [check for check in CHECKS if check is not check_accumulates_gradients])
def test_conformance_beside_pruning(check: Check, tmp_path: Path) -> None:
    # all but gradient accumulation: a threshold per batch differs from one per larger batch, as it should
    check(lambda: [prune(), ActivationPruning()], tmp_path)
    check(lambda: [prune(), ActivationPruning(threshold="first_batch")], tmp_path)


# -- memory ------------------------------------------------------------------------------------------------------------


def held_bytes(module: nn.Module, x: Tensor, density: float) -> int:
    """What a forward pass leaves allocated for the backward one, as torch's allocator counts it."""
    handles = []
    stack: list[saving_pruned] = []
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and density < 1:

            def enter(layer: nn.Module, args: Any) -> None:
                stack.append(saving_pruned(args[0], activation_threshold(args[0], density)))
                stack[-1].__enter__()

            def leave(layer: nn.Module, args: Any, output: Any) -> None:
                stack.pop().__exit__(None, None, None)

            handles += [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        loss = module(x).sum()
    for handle in handles:
        handle.remove()
    loss.backward()
    return sum(event.self_cpu_memory_usage for event in prof.key_averages())  # type: ignore[attr-defined]


def test_memory_that_a_forward_pass_holds() -> None:
    # inputs of the linear layers come from LayerNorm and GELU, which keep their own inputs and not their outputs
    block = nn.Sequential(
        nn.LayerNorm(64), nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64), nn.LayerNorm(64), nn.Linear(64, 256)
    )
    x = torch.randn(512, 64)
    dense, sparse = held_bytes(block, x, 1.0), held_bytes(block, x, 0.05)
    saved = 4 * 512 * (64 + 256 + 64)
    kept = 4 * (1639 + 6554 + 1639)  # values; torch's allocator does not see numpy's bits
    assert dense - sparse == pytest.approx(saved - kept, abs=64)


class Functional(nn.ReLU):
    """What can't be told apart from outside: a ReLU inside another module's forward."""


@pytest.mark.parametrize(("relu", "kept"), [(nn.ReLU, 0), (Functional, 64 * 256 * 4)])
def test_behind_a_relu_memory_shrinks_if_it_is_a_module(relu: type[nn.ReLU], kept: int) -> None:
    def activation_bytes(*callbacks: pl.Callback) -> float:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(64, 256, bias=False), relu(), nn.Linear(256, 10, bias=False))
        masks = MagnitudePruning(ConstantSchedule(0.75), scope="layer")
        trainer = quiet_trainer([masks, *callbacks, DeviceMonitor()])
        data = DataLoader(TensorDataset(torch.randn(64, 64), torch.randint(0, 10, (64,))), batch_size=64)
        trainer.fit(ImageClassifier(network), data, data)
        return float(trainer.callback_metrics["device/activation_bytes"])

    # linear inputs at a quarter and their bits, and the ReLU's bits or its output
    rest = activation_bytes() - 4 * 64 * (64 + 256)
    behind = 64 * 256 // 8 if kept == 0 else kept
    assert activation_bytes(ActivationPruning()) - rest == 64 * (64 + 256) * (4 / 4 + 1 / 8) + behind


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": "once"}, "expected threshold 'per_batch' or 'first_batch', got 'once'"),
        ({"density_floor": 0.0}, r"expected density_floor in \(0, 1\], got 0.0"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ActivationPruning(**options)


def test_layers_that_it_cannot_handle() -> None:
    class Recurrent(Net):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(6, 6)

    with pytest.raises(ValueError, match="got 'lstm.weight_ih_l0' of a LSTM: exclude it"):
        quiet_trainer([ActivationPruning(include=["lstm.weight*"])]).fit(seeded(Recurrent), loader())
    with pytest.raises(ValueError, match="got 'first.bias' of a Linear: exclude it"):
        quiet_trainer([ActivationPruning(include=["first.*"])]).fit(seeded(Net), loader())
