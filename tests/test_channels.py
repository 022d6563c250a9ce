"""Coupled channels: literals of small networks, the specification's counts and windows, and masked against sliced."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch_pruning as tp
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_fedsparse.channels import ChannelGroup, channel_groups, unit_count, unit_norms, width_masks, window
from lightning_fedsparse.models import DigitsCNN, LeNet5, ResNet18
from lightning_fedsparse.submodels import importance_factor
from lightning_fedsparse.update import SparseUpdate, scatter_

IMAGES = {LeNet5: (1, 28, 28), DigitsCNN: (1, 8, 8), ResNet18: (3, 32, 32)}


def groups_of(net: nn.Module) -> list[ChannelGroup]:
    return channel_groups(net, torch.zeros(1, *IMAGES[type(net)]))


def axes_of(group: ChannelGroup) -> list[tuple[str, int]]:
    return [(axis.name, axis.dim) for axis in group.axes]


# -- known answers -----------------------------------------------------------------------------------------------------


def test_groups_of_lenet() -> None:
    groups = groups_of(LeNet5())
    assert [(group.size, axes_of(group)) for group in groups] == [
        (6, [("conv1.weight", 0), ("conv1.bias", 0), ("conv2.weight", 1)]),
        (16, [("conv2.weight", 0), ("conv2.bias", 0), ("fc1.weight", 1)]),
        (120, [("fc1.weight", 0), ("fc1.bias", 0), ("fc2.weight", 1)]),
        (84, [("fc2.weight", 0), ("fc2.bias", 0), ("fc3.weight", 1)]),
    ]
    # behind the flatten each channel is 5 x 5 inputs in a row
    assert torch.equal(groups[1].axes[-1].units, torch.arange(16).repeat_interleave(25))


def test_groups_of_a_residual_network() -> None:
    groups = groups_of(ResNet18())
    # four stages, whose blocks add up into the same channels, and the inner channels of eight blocks
    assert sorted(group.size for group in groups) == [64] * 3 + [128] * 3 + [256] * 3 + [512] * 3
    stage = next(group for group in groups if ("layer2.0.shortcut.0.weight", 0) in axes_of(group))
    assert axes_of(stage) == [
        ("layer2.0.conv2.weight", 0),
        ("layer2.0.bn2.weight", 0),
        ("layer2.0.bn2.bias", 0),
        ("layer2.0.shortcut.0.weight", 0),
        ("layer2.0.shortcut.1.weight", 0),
        ("layer2.0.shortcut.1.bias", 0),
        ("layer2.1.conv1.weight", 1),
        ("layer2.1.conv2.weight", 0),
        ("layer2.1.bn2.weight", 0),
        ("layer2.1.bn2.bias", 0),
        ("layer3.0.conv1.weight", 1),
        ("layer3.0.shortcut.0.weight", 1),
    ]


class Joined(nn.Module):
    """Two branches of channels side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(1, 2, 3), nn.Conv2d(1, 3, 3)
        self.last = nn.Conv2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([self.left(x), self.right(x)], 1).relu())  # type: ignore[no-any-return]


def test_groups_of_joined_branches() -> None:
    left, right = channel_groups(Joined(), torch.zeros(1, 1, 4, 4))
    assert left.axes[-1].units.tolist() == [0, 1, -1, -1, -1]
    assert right.axes[-1].units.tolist() == [-1, -1, 0, 1, 2]
    masks = width_masks([left, right], [torch.tensor([1]), torch.tensor([0, 2])])
    assert masks["last.weight"][0, :, 0, 0].int().tolist() == [0, 1, 1, 0, 1]
    assert masks["left.bias"].tolist() == [False, True]
    assert masks["right.bias"].tolist() == [True, False, True]


def test_masks_of_rows_and_columns() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))
    groups = channel_groups(net, torch.zeros(1, 2))
    masks = width_masks(groups, [torch.tensor([0, 2]), torch.tensor([1])])
    assert {name: mask.int().tolist() for name, mask in masks.items()} == {
        "0.weight": [[1, 1], [0, 0], [1, 1]],  # all inputs of the network
        "0.bias": [1, 0, 1],
        "2.weight": [[0, 0, 0], [1, 0, 1]],
        "2.bias": [0, 1],
        "4.weight": [[0, 1], [0, 1]],  # all outputs, whose bias has no mask
    }


@pytest.fixture
def perceptron() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False)).double()
    first = [[0.5, 0.1, -0.2], [0.05, 0.02, 0.01], [-0.6, 0.4, 0.3], [0.2, -0.1, 0.1]]
    second = [[0.3, 0.01, -0.5, 0.2], [-0.2, 0.02, 0.4, 0.1]]
    double = partial(torch.tensor, dtype=torch.float64)
    net.load_state_dict({"0.weight": double(first), "2.weight": double(second)})
    return net


def test_units_by_the_norm_of_what_leads_to_them_and_reads_them(perceptron: nn.Sequential) -> None:
    (group,) = channel_groups(perceptron, torch.zeros(1, 3, dtype=torch.float64))
    norms = unit_norms(group, dict(perceptron.named_parameters()))
    assert norms.tolist() == pytest.approx([0.655744, 0.059161, 1.00995, 0.331662], abs=1e-6)
    means = unit_norms(group, dict(perceptron.named_parameters()), "mean")
    assert means.tolist() == pytest.approx([0.258333, 0.020833, 0.441667, 0.141667], abs=1e-6)
    kept = norms.argsort(descending=True)[:2].sort().values
    assert kept.tolist() == [0, 2]
    factors = importance_factor(norms[kept], float(norms[kept].min()))
    assert factors.tolist() == pytest.approx([1.5, 1.47739], abs=1e-6)


def test_the_two_largest_units_masked_sliced_and_put_back(perceptron: nn.Sequential) -> None:
    (group,) = channel_groups(perceptron, torch.zeros(1, 3, dtype=torch.float64))
    x = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)
    masks = width_masks([group], [torch.tensor([0, 2])])
    weights = dict(perceptron.named_parameters())
    masked = torch.func.functional_call(perceptron, {name: weights[name] * mask for name, mask in masks.items()}, x)
    sliced = F.relu(x @ weights["0.weight"][[0, 2]].T) @ weights["2.weight"][:, [0, 2]].T
    assert masked.flatten().tolist() == pytest.approx([0.06, -0.04], abs=1e-12)
    assert sliced.flatten().tolist() == pytest.approx([0.06, -0.04], abs=1e-12)
    change = {"0.weight": torch.zeros(4, 3)}
    scatter_(change, SparseUpdate({"0.weight": torch.full((6,), 0.1)}, {"0.weight": masks["0.weight"]}))
    assert torch.equal(change["0.weight"], torch.tensor([0.1, 0.0, 0.1, 0.0])[:, None].expand(4, 3))


def test_norms_of_units_that_several_inputs_belong_to() -> None:
    net = LeNet5()
    weights = dict(net.named_parameters())
    for group, (leads, reads, inputs) in zip(
        groups_of(net), [("conv1", "conv2", 1), ("conv2", "fc1", 25), ("fc1", "fc2", 1), ("fc2", "fc3", 1)], strict=True
    ):
        to = weights[f"{leads}.weight"].double()
        on = weights[f"{reads}.weight"].double().unflatten(1, (group.size, inputs)).transpose(0, 1)
        expected = [torch.cat([to[unit].flatten(), on[unit].flatten()]).norm().item() for unit in range(group.size)]
        assert unit_norms(group, weights).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("classes", "width", "parameters"),
    [
        (10, 1, 11173962),
        (10, 0.5, 2797610),
        (10, 0.25, 701466),
        (10, 0.125, 176402),
        (10, 0.8, 7175586),
        (10, 0.6, 4049352),
        (10, 0.4, 1803314),
        (10, 0.2, 457578),
    ],
)
def test_parameters_of_resnet_by_width(classes: int, width: float, parameters: int) -> None:
    net = ResNet18(classes)
    groups = groups_of(net)
    masks = width_masks(groups, [window(group.size, width) for group in groups])
    counts = [int(masks[n].sum()) if n in masks else p.numel() for n, p in net.named_parameters()]
    assert sum(counts) == parameters


@pytest.mark.parametrize(
    ("start", "width", "units"),
    [
        (0, 0.5, [0, 1, 2, 3]),
        (0, 0.25, [0, 1]),
        (0, 0.125, [0]),
        (1, 0.5, [1, 2, 3, 4]),
        (5, 0.5, [5, 6, 7, 0]),
        (1, 0.25, [1, 2]),
        (5, 0.25, [5, 6]),
        (1, 0.125, [1]),
        (5, 0.125, [5]),
        (-1, 0.5, [7, 0, 1, 2]),  # FedRolex's released code
        (-5, 0.5, [3, 4, 5, 6]),
        (-1, 0.25, [7, 0]),
        (-5, 0.25, [3, 4]),
        (-1, 0.125, [7]),
        (-5, 0.125, [3]),
    ],
)
def test_windows(start: int, width: float, units: list[int]) -> None:
    assert window(8, width, start).tolist() == units


def test_counts_are_rounded_up_but_not_by_rounding_errors() -> None:
    assert 0.1 * 30 > 3 - 1e-9
    assert [unit_count(30, 0.1), unit_count(30, 0.11), unit_count(3, 0.01), unit_count(7, 1.0)] == [3, 4, 1, 7]
    assert unit_count(15, 0.04**0.5) == 3


@given(st.integers(1, 40), st.floats(0.01, 1), st.sampled_from([1, -1]))
def test_a_rolling_window_visits_every_unit_as_often(size: int, width: float, direction: int) -> None:
    visits = torch.zeros(size, dtype=torch.int64)
    for step in range(size):
        visits[window(size, width, direction * step)] += 1
    assert visits.tolist() == [unit_count(size, width)] * size


# -- the masked network is the narrow one ------------------------------------------------------------------------------


def some_units(groups: list[ChannelGroup]) -> list[Tensor]:
    return [torch.randperm(group.size)[: unit_count(group.size, 0.4)].sort().values for group in groups]


def masked(net: nn.Module, groups: list[ChannelGroup], kept: list[Tensor]) -> nn.Module:
    net = copy.deepcopy(net)
    parameters = dict(net.named_parameters())
    for name, mask in width_masks(groups, kept).items():
        parameters[name].data *= mask
    return net


def test_a_masked_cnn_equals_one_sliced_by_hand() -> None:
    net = LeNet5()
    groups = groups_of(net)
    kept = some_units(groups)
    a, b, c, d = kept
    pixels = (b[:, None] * 25 + torch.arange(25)).flatten()

    def sliced(x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(F.conv2d(x, net.conv1.weight[a], net.conv1.bias[a], padding=2)), 2)  # type: ignore[index]
        x = F.max_pool2d(F.relu(F.conv2d(x, net.conv2.weight[b][:, a], net.conv2.bias[b])), 2)  # type: ignore[index]
        x = F.relu(F.linear(x.flatten(1), net.fc1.weight[c][:, pixels], net.fc1.bias[c]))
        x = F.relu(F.linear(x, net.fc2.weight[d][:, c], net.fc2.bias[d]))
        return F.linear(x, net.fc3.weight[:, d], net.fc3.bias)

    x = torch.randn(3, 1, 28, 28)
    torch.testing.assert_close(masked(net, groups, kept)(x), sliced(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", [LeNet5, DigitsCNN, ResNet18])
def test_a_masked_network_equals_one_pruned_physically(kind: Any) -> None:
    net = kind().eval()
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()  # type: ignore[union-attr, operator]
            layer.running_var.uniform_(0.5, 2)  # type: ignore[union-attr, operator]
            nn.init.normal_(layer.bias)
    groups = groups_of(net)
    kept = some_units(groups)
    narrow, x = copy.deepcopy(net), torch.randn(2, *IMAGES[kind])
    graph = tp.DependencyGraph().build_dependency(narrow, example_inputs=x)
    for group, units in zip(groups, kept, strict=True):
        name = next(axis.name for axis in group.axes if axis.dim == 0 and len(axis.shape) > 1)
        layer = narrow.get_submodule(name.removesuffix(".weight"))
        prune = tp.prune_conv_out_channels if isinstance(layer, nn.Conv2d) else tp.prune_linear_out_channels
        gone = sorted(set(range(group.size)) - set(units.tolist()))
        graph.get_pruning_group(layer, prune, gone).prune()
    assert sum(p.numel() for p in narrow.parameters()) < 0.3 * sum(p.numel() for p in net.parameters())
    with torch.no_grad():
        torch.testing.assert_close(masked(net, groups, kept)(x), narrow(x), rtol=0, atol=1e-6)


# -- what a look leaves behind, and what is refused --------------------------------------------------------------------


def test_looking_changes_nothing() -> None:
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Dropout(), nn.Flatten(), nn.Linear(12, 2))
    net[1].eval()
    net[0].requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    random = torch.get_rng_state()
    with torch.no_grad():
        (group,) = channel_groups(net, torch.ones(1, 1, 4, 4))
    assert ("0.weight", 0) in axes_of(group), "a frozen layer has units too"
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert [layer.training for layer in net] == [True, False, True, True, True]
    assert [p.requires_grad for p in net.parameters()] == [False, False, True, True, True, True]
    assert all(p.grad is None for p in net.parameters())


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.factor, self.last = nn.Linear(4, 8), nn.Parameter(torch.ones(8)), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.factor * self.first(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("net", "shape", "what"),
    [
        (nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2)), (1, 4), "'1', which is LayerNorm"),
        (
            nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8, elementwise_affine=False), nn.Linear(8, 2)),
            (1, 4),
            "'1', which is LayerNorm",
        ),
        (nn.Sequential(nn.Linear(4, 8), nn.PReLU(8), nn.Linear(8, 2)), (1, 4), "'1', which is PReLU"),
        (
            nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 2, 1)),
            (1, 1, 8, 8),
            "'1', which is Conv2d",
        ),
        (Scaled(), (1, 4), "'Parameter', which is Parameter"),
    ],
    ids=["LayerNorm", "LayerNorm without weights", "PReLU", "channel groups", "a parameter of its own"],
)
def test_layers_that_a_mask_does_not_narrow_are_refused(net: nn.Module, shape: Any, what: str) -> None:
    with pytest.raises(ValueError, match=f"expected convolutions without channel groups.* along the units, got {what}"):
        channel_groups(net, torch.zeros(shape))


def test_a_network_without_units_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a network with hidden units, got Linear without any"):
        channel_groups(nn.Linear(3, 2), torch.zeros(1, 3))


class JoinedFlat(Joined):
    """Torch-Pruning 1.6.1 takes the two branches for one."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(20, 2)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([self.left(x), self.right(x)], 1).relu().flatten(1))  # type: ignore[no-any-return]


class ChannelsLast(nn.Module):
    """A flatten in which the inputs of a channel are not in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 4, 3), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu().permute(0, 2, 3, 1).flatten(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [JoinedFlat, ChannelsLast])
def test_a_network_whose_channels_get_lost_is_refused(kind: Any) -> None:
    with pytest.raises(ValueError, match=f"whose channels can be followed from layer to layer, got {kind.__name__}"):
        channel_groups(kind(), torch.zeros(1, 1, 4, 4))
