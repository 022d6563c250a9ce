import pytest
import torch
from torch import nn

from lightning_fedsparse.prunable import prunable_parameters


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(3, 3)
        self.decoder = nn.Linear(3, 3)
        self.decoder.weight = self.encoder.weight


def test_default_selection():
    net = Net()
    selected = prunable_parameters(net)
    assert list(selected) == ["conv.weight", "head.1.weight"]
    assert selected["conv.weight"] is net.conv.weight
    assert selected["head.1.weight"] is net.head[1].weight


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(1, 2, 3),
        nn.Conv2d(1, 2, 3),
        nn.Conv3d(1, 2, 3),
        nn.ConvTranspose1d(1, 2, 3),
        nn.ConvTranspose2d(1, 2, 3),
        nn.ConvTranspose3d(1, 2, 3),
        nn.Linear(2, 2),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_prunable_layers(layer):
    assert list(prunable_parameters(layer)) == ["weight"]


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm2d(2), nn.LayerNorm(2), nn.Embedding(3, 2), nn.LSTM(2, 2)], ids=lambda x: type(x).__name__
)
def test_other_layers(layer):
    with pytest.raises(ValueError, match=f"something to prune, got {type(layer).__name__} without"):
        prunable_parameters(layer)


def test_include_selects_by_name_instead():
    lstm = nn.Sequential(nn.LSTM(2, 3), nn.Linear(3, 1))
    assert list(prunable_parameters(lstm, ["0.weight_*"])) == ["0.weight_ih_l0", "0.weight_hh_l0"]
    # overlapping globs select once, in the model's order
    names = ["0.weight_ih_l0", "0.weight_hh_l0", "1.weight"]
    assert list(prunable_parameters(lstm, ["1.weight", "*.weight*"])) == names


def test_exclude_takes_away():
    assert list(prunable_parameters(Net(), exclude=["conv.*"])) == ["head.1.weight"]
    assert list(prunable_parameters(Net(), ["*.weight"], exclude=["norm.*", "head.*"])) == ["conv.weight"]


def test_the_first_may_be_left_out():
    assert list(prunable_parameters(Net(), first_layer=False)) == ["head.1.weight"]
    with pytest.raises(ValueError, match="got Net without a prunable parameter"):
        prunable_parameters(Net(), exclude=["conv.*"], first_layer=False)


def test_globs_are_case_sensitive():
    with pytest.raises(ValueError, match=r"got 'Conv\.\*'"):
        prunable_parameters(Net(), ["Conv.*"])


def test_names_are_state_dict_keys():
    net = Net()
    assert set(prunable_parameters(net)) <= set(net.state_dict())


def test_tied_parameters_count_once():
    assert list(prunable_parameters(Tied())) == ["encoder.weight"]


def test_a_tied_weight_owned_first_by_another_layer_is_found():
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5))
    model[1].weight = model[0].weight
    assert list(prunable_parameters(model)) == ["0.weight"]


def test_frozen_parameters_are_selected():
    assert list(prunable_parameters(nn.Linear(2, 2).requires_grad_(False))) == ["weight"]


def test_integer_parameters_are_never_selected():
    layer = nn.Linear(2, 2)
    layer.codes = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    assert list(prunable_parameters(layer, ["*"])) == ["weight", "bias"]


# errors


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_glob_that_matches_nothing_names_three_near(argument):
    message = (
        rf"expected {argument} globs that match parameters, got 'convs.weight': "
        r"the nearest are \['conv.weight', '\S+', '\S+'\]"
    )
    with pytest.raises(ValueError, match=message):
        prunable_parameters(Net(), **{argument: ["convs.weight"]})


def test_nothing_selected_names_the_class():
    message = "expected a model with something to prune, got Net without a prunable parameter"
    with pytest.raises(ValueError, match=message):
        prunable_parameters(Net(), exclude=["*"])


def test_globs_as_one_string():
    for argument in ("include", "exclude"):
        with pytest.raises(TypeError, match=rf"expected {argument} to be a list of name globs, got the string '\*'"):
            prunable_parameters(Net(), **{argument: "*"})


@pytest.mark.parametrize("include", [(), ("1.*",)])
def test_lazy_parameters(include):
    model = nn.Sequential(nn.Linear(2, 3), nn.LazyLinear(3))
    message = r"expected initialized parameters to prune, got the lazy '1\.weight' in Sequential: run one batch"
    with pytest.raises(ValueError, match=message):
        prunable_parameters(model, include)
    assert list(prunable_parameters(model, exclude=["1.*"])) == ["0.weight"]
    model(torch.zeros(1, 2))
    assert list(prunable_parameters(model)) == ["0.weight", "1.weight"]
