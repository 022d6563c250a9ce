"""From a federation to a model that serves: what a checkpoint gives is what was evaluated, whatever the method."""

import pytest
import torch

from lightning_fedsparse import FederatedLoop, load_folded
from lightning_fedsparse.callbacks import (
    DynamicSparseTraining,
    FixedMask,
    GradientPruning,
    ImportanceMasking,
    TopKAfterTraining,
    WidthMasking,
    feddip,
    fiarse,
    sparsyfed,
    zerofl,
)
from lightning_fedsparse.capacities import CapacityShares
from lightning_fedsparse.data import FederatedDataModule
from lightning_fedsparse.evaluation import Evaluation
from lightning_fedsparse.schedules import ConstantSchedule
from tests.test_loop import QUIET, Net, clients, loaders
from tests.test_width_masking import Wide, federated

METHODS = {
    "dense": list,
    "feddip": lambda: feddip(0.8, reconfigure_every=1, residual="keep"),
    "sparsyfed": lambda: sparsyfed(0.5),
    "sparsyfed, spectral": lambda: sparsyfed(0.5, exponent="spectral_layer"),
    "sparsyfed, one spectral exponent": lambda: sparsyfed(0.5, exponent="spectral_global"),
    "fiarse": fiarse,
    "fiarse, small": lambda: fiarse(0.3),
    "zerofl": lambda: zerofl(0.5),
    "top-k": lambda: [TopKAfterTraining(ConstantSchedule(0.5))],
    "fixed mask": lambda: [FixedMask(0.5)],
    "gradients": lambda: [GradientPruning(ConstantSchedule(0.5), every=1)],
    "dynamic": lambda: [DynamicSparseTraining(0.5, every=1)],
}


@pytest.mark.parametrize("method", METHODS)
def test_a_federations_checkpoint_holds_the_model_that_was_evaluated(method, tmp_path):
    torch.manual_seed(0)
    model = Net()
    loop = FederatedLoop(3, 4, METHODS[method](), evaluation=QUIET, default_root_dir=tmp_path, console=False)
    loop.fit(model, loaders(clients()))
    served = load_folded(tmp_path / "checkpoints" / "last.ckpt", Net())
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(served.state_dict()[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("selection", ["static", "rolling"])
def test_so_does_one_of_submodels_by_width(selection, tmp_path):
    torch.manual_seed(0)
    model = Wide()
    callbacks = [WidthMasking(0.25, selection=selection)]
    loop = FederatedLoop(2, 2, callbacks, evaluation=QUIET, default_root_dir=tmp_path, console=False)
    loop.fit(model, federated(None))
    served = load_folded(tmp_path / "checkpoints" / "last.ckpt", Wide())
    assert all(torch.equal(served.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_the_submodel_of_a_capacity_is_the_one_that_was_evaluated():
    torch.manual_seed(0)
    own = {name: torch.utils.data.DataLoader(part, batch_size=8) for name, part in clients(4).items()}
    data = FederatedDataModule(own, capacities=CapacityShares({1.0: 0.5, 0.25: 0.5}))
    loop = FederatedLoop(2, 4, fiarse(), evaluation=QUIET, console=False)
    loop.fit(Net(), data)
    small = Net()
    loop.load_submodel(small, 0.25)
    weights = {name: loop.state.weights[name] for name in ("first.weight", "last.weight")}
    pool = torch.cat([weight.abs().flatten() for weight in weights.values()])
    threshold = pool.sort(descending=True).values[int(0.25 * len(pool)) - 1]
    for name, weight in weights.items():
        assert torch.equal(small.state_dict()[name], weight * (weight.abs() >= threshold))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"executor": 2}, r"expected executor of type Executor, such as ProcessExecutor\(workers=2\), got int"),
        ({"evaluation": "test"}, "expected evaluation of type Evaluation, such as .*, got str"),
        ({"wire": "int8"}, "expected wire of type Wire, such as .*, got str"),
        ({"callbacks": ImportanceMasking()}, "expected callbacks of type Sequence, such as .*, got ImportanceMasking"),
        ({"trainer": 3}, "expected trainer of type Mapping, such as .*, got int"),
    ],
)
def test_what_is_of_another_kind_is_one_sentence(arguments, message):
    with pytest.raises(TypeError, match=message):
        FederatedLoop(1, 2, **arguments)


def test_capacities_of_another_kind():
    with pytest.raises(
        TypeError, match=r"expected capacities of type Capacities, such as CapacityMapping\(.*, got dict"
    ):
        FederatedDataModule({"a": loaders(clients()).client("c0").train_loader()}, capacities={"a": 0.5})


def test_an_unknown_split():
    with pytest.raises(ValueError, match="expected split 'validation', 'test' or 'none', got 'val'"):
        Evaluation(split="val")
