"""Powers of weights: the arithmetic's known answers, and when a Trainer converts, folds and leaves alone."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor

from lightning_fedsparse import fold, load_folded
from lightning_fedsparse.callbacks import ErrorFeedback, MagnitudePruning, Powerpropagation
from lightning_fedsparse.powers import power, power_gradient_, root_, spectral_exponents, truncated_normal_
from lightning_fedsparse.schedules import ConstantSchedule
from tests.effective_reference import WEIGHTS, Net, loader, quiet_trainer, seeded, weights_of

W = [0.8, -0.5, 0.1, 0.0, -0.02, 1.5]
G = [0.3, -0.2, 0.5, 1.0, -0.4, 0.1]


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(found: Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(found, tensor(*expected), rtol=0, atol=1e-6)


def powers(weight: Tensor, beta: float) -> Tensor:
    weights = {"w": weight.clone()}
    power(weights, {"w": beta}, weights)
    return weights["w"]


def gradient(weight: Tensor, at_power: Tensor, beta: float) -> Tensor:
    gradients, slopes = {"w": at_power.clone()}, {}
    power({"w": weight}, {"w": beta}, {"w": torch.empty_like(weight)}, slopes)
    power_gradient_(gradients, slopes, {"w": beta})
    return gradients["w"]


# -- the arithmetic ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("beta", "theta", "slope", "expected"),
    [
        (
            1.25,
            [0.756593, -0.420448, 0.056234, 0, -0.007521, 1.660023],
            [1.182177, 1.051121, 0.702927, 0, 0.470075, 1.383352],
            [0.354653, -0.210224, 0.351463, 0, -0.188030, 0.138335],
        ),
        (2.0, [0.64, -0.25, 0.01, 0, -0.0004, 2.25], [1.6, 1, 0.2, 0, 0.04, 3], [0.48, -0.2, 0.1, 0, -0.016, 0.3]),
        (1.0, W, [1.0] * 6, G),
    ],
)
def test_powers_and_their_gradients(beta: float, theta: list[float], slope: list[float], expected: list[float]) -> None:
    close(powers(tensor(*W), beta), theta)
    close(gradient(tensor(*W), torch.ones(6, dtype=torch.float64), beta), slope)
    close(gradient(tensor(*W), tensor(*G), beta), expected)


def test_one_step_of_sgd_with_decay() -> None:
    w = tensor(*W)
    w = w - 0.5 * (gradient(w, tensor(*G), 1.25) + 1e-3 * w)
    close(w, [0.622273, -0.394638, -0.075782, 0, 0.074025, 1.430082])


def test_stored_weights_whose_powers_are_given() -> None:
    weights = {"w": tensor(0.05, -0.02, 0.001, -0.3)}
    root_(weights, {"w": 1.25})
    close(weights["w"], [0.091028, -0.043734, 0.003981, -0.381678])
    close(powers(weights["w"], 1.25), [0.05, -0.02, 0.001, -0.3])


@given(
    st.lists(st.floats(-10, 10), min_size=1, max_size=8),
    st.floats(1, 4) | st.just(1.25),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
)
def test_the_gradient_is_autograds_and_never_nan(values: list[float], beta: float, dtype: torch.dtype) -> None:
    w = torch.tensor(values, dtype=dtype)
    found = gradient(w, torch.ones_like(w), beta)
    assert bool(found.isfinite().all())
    if beta > 1:
        assert bool((found[w == 0] == 0).all())
    if dtype == torch.float64:
        leaf = w.clone().requires_grad_()
        (leaf.sign() * leaf.abs().pow(beta)).sum().backward()
        # autograd has no slope at 0: sign and |.| both give 0 there
        torch.testing.assert_close(found[w != 0], leaf.grad[w != 0], rtol=1e-9, atol=1e-12)  # type: ignore[index]


@pytest.mark.parametrize(("fan_in", "deviation"), [(27, 0.218786), (576, 0.047369), (4608, 0.016747), (512, 0.050242)])
def test_truncated_normal(fan_in: int, deviation: float) -> None:
    weight = torch.empty(200, fan_in)
    truncated_normal_(weight, torch.Generator().manual_seed(0))
    assert float(weight.abs().max()) <= 2 * deviation + 1e-6
    assert float(weight.abs().max()) > 1.95 * deviation
    # cutting shrinks the deviation by 0.8796, to 1 / sqrt(fan_in)
    assert float(weight.std()) == pytest.approx(1 / math.sqrt(fan_in), rel=0.03)


def test_spectral_exponents() -> None:
    # sigma = 3 sqrt 5 = 6.708204; 12 / sigma = 1.788854
    weights = {"w": tensor(3, 0, 4, 5).view(2, 2)}
    assert spectral_exponents(weights, "layer") == {"w": pytest.approx(1.447214, abs=1e-6)}
    assert spectral_exponents(weights, "global") == {"w": pytest.approx(1.596285, abs=5e-5)}
    assert spectral_exponents({"w": torch.zeros(2, 2)}, "layer") == {"w": 1.0}
    both = spectral_exponents({**weights, "zero": torch.zeros(2, 2)}, "global")
    assert both == {"w": pytest.approx(1.29815), "zero": pytest.approx(1.29815)}
    # signs do not matter, a convolution is read as (out, in * height * width)
    assert spectral_exponents({"w": -weights["w"].view(2, 1, 2, 1)}, "layer") == spectral_exponents(weights, "layer")


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 100))
def test_spectral_exponents_have_converged(rows: int, columns: int, seed: int) -> None:
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    sigma = float(torch.linalg.svdvals(w.abs())[0])
    assert spectral_exponents({"w": w}, "layer")["w"] == pytest.approx(1 + float(w.abs().mean()) / sigma, abs=1e-7)


# -- in a Trainer ------------------------------------------------------------------------------------------------------


class Evaluated(Net):
    """With a test, and nothing to validate."""

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.loss(batch, "test")


def fit(module: Evaluated, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    trainer = quiet_trainer(callbacks, **options)
    trainer.fit(module, loader())
    return trainer


class ByAutograd(Evaluated):
    """Powerpropagation without any callback: the powers are part of the forward pass."""

    beta = 1.25

    def forward(self, x: Tensor) -> Tensor:
        first, second = (layer.weight.sign() * layer.weight.abs().pow(self.beta) for layer in (self.first, self.second))
        hidden = torch.tanh(torch.nn.functional.linear(x, first, self.first.bias))
        return torch.nn.functional.linear(hidden, second, self.second.bias)


@pytest.mark.parametrize("beta", [1.0, 1.25, 2.0, 3.0])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_equals_autograd_through_the_powers(beta: float, accumulate: int) -> None:
    module, reference = seeded(Evaluated).double(), seeded(ByAutograd).double()
    reference.beta = beta
    with torch.no_grad():
        for name in WEIGHTS:
            weight = reference.get_parameter(name)
            weight.copy_(weight.sign() * weight.abs().pow(1 / beta))
    options = {"accumulate_grad_batches": accumulate, "precision": "64-true"}
    fit(module, Powerpropagation(beta), **options)
    fit(reference, **options)
    for name, weight in weights_of(reference).items():
        expected = weight.sign() * weight.abs().pow(beta) if name in WEIGHTS else weight
        torch.testing.assert_close(module.get_parameter(name), expected, rtol=0, atol=1e-12)


def test_beta_one_changes_nothing() -> None:
    module, plain = seeded(Evaluated), seeded(Evaluated)
    fit(module, Powerpropagation(1.0))
    fit(plain)
    for name, weight in weights_of(plain).items():
        assert torch.equal(module.get_parameter(name), weight)


class Sees(pl.Callback):
    def __init__(self) -> None:
        self.stored: dict[str, Tensor] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.stored = weights_of(pl_module)


def test_training_starts_where_the_module_is() -> None:
    module = seeded(Evaluated)
    before = weights_of(module)
    sees = Sees()
    fit(module, Powerpropagation(2.0, exclude=["second.weight"]), sees)
    torch.testing.assert_close(module.seen["train"][0]["first.weight"], before["first.weight"])
    root = before["first.weight"].abs().sqrt()
    torch.testing.assert_close(sees.stored["first.weight"].abs(), root)
    assert torch.equal(sees.stored["second.weight"], before["second.weight"])


def test_fresh_weights_from_a_truncated_normal() -> None:
    first, again, sees = seeded(Evaluated), seeded(Evaluated), Sees()
    for module in (first, again):
        torch.manual_seed(4)
        fit(module, Powerpropagation(initialization="truncated_normal"), sees)
    start = first.seen["train"][0]
    assert float(start["first.weight"].abs().max()) < 2 / math.sqrt(6) / 0.8796
    assert not bool(sees.stored["first.bias"].any())
    assert torch.equal(start["first.weight"], again.seen["train"][0]["first.weight"])
    torch.testing.assert_close(start["first.weight"], powers(sees.stored["first.weight"], 1.25), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("exponent", ["spectral_layer", "spectral_global"])
def test_spectral_exponents_are_those_of_the_modules_weights(exponent: Any) -> None:
    module, sees = seeded(Evaluated), Sees()
    before = {name: weight for name, weight in weights_of(module).items() if name in WEIGHTS}
    fit(module, Powerpropagation(exponent=exponent), sees)
    expected = spectral_exponents(before, "layer" if exponent == "spectral_layer" else "global")
    for name, weight in before.items():
        assert torch.equal(sees.stored[name], weight)
        torch.testing.assert_close(module.seen["train"][0][name], powers(weight, expected[name]))


def test_zeros_stay_zero_under_decay_and_momentum() -> None:
    module = seeded(Evaluated)
    with torch.no_grad():
        module.first.weight[:4] = 0
    fit(module, Powerpropagation())
    assert int(module.first.weight[:4].count_nonzero()) == 0
    assert int(module.first.weight[4:].count_nonzero()) == module.first.weight[4:].numel()


# -- whether the module holds stored or effective weights --------------------------------------------------------------


class Saves(pl.Callback):
    def __init__(self, path: Path, epoch: int) -> None:
        self.path = path
        self.epoch = epoch

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == self.epoch:
            trainer.save_checkpoint(self.path)


def evaluated(module: Evaluated, *callbacks: pl.Callback, **options: Any) -> dict[str, Tensor]:
    module.seen["test"] = []
    quiet_trainer(callbacks).test(module, loader(), verbose=False, **options)
    return module.seen["test"][0]


def test_after_fit_the_module_holds_powers_and_evaluation_leaves_them_alone() -> None:
    module, power = seeded(Evaluated), Powerpropagation(2.0)
    fit(module, power)
    held = weights_of(module)
    assert power.exponents == {}
    seen = evaluated(module, power)
    for name in WEIGHTS:
        assert torch.equal(seen[name], held[name])
    assert all(torch.equal(module.get_parameter(name), weight) for name, weight in held.items())


def test_a_checkpoint_of_the_middle_is_evaluated_at_its_powers(tmp_path: Path) -> None:
    path = tmp_path / "end.ckpt"
    module = seeded(Evaluated)
    fit(module, Powerpropagation(2.0), Saves(path, 1))
    held = weights_of(module)
    power, other = Powerpropagation(2.0), seeded(Evaluated)
    for _ in range(2):  # the second time the module has the stored weights already
        seen = evaluated(other, power, ckpt_path=path)
        for name in WEIGHTS:
            assert torch.equal(seen[name], held[name])
    seen = evaluated(other, power)
    assert all(torch.equal(seen[name], held[name]) for name in WEIGHTS)
    folded = load_folded(path, seeded(Evaluated))
    assert all(torch.equal(folded.get_parameter(name), weight) for name, weight in held.items())


def test_a_checkpoint_after_fit_is_folded_already(tmp_path: Path) -> None:
    path = tmp_path / "after.ckpt"
    module = seeded(Evaluated)
    trainer = fit(module, Powerpropagation(2.0))
    trainer.save_checkpoint(path)
    held = weights_of(module)
    folded = load_folded(path, seeded(Evaluated))
    assert all(torch.equal(folded.get_parameter(name), weight) for name, weight in held.items())
    seen = evaluated(seeded(Evaluated), Powerpropagation(2.0), ckpt_path=path)
    assert all(torch.equal(seen[name], held[name]) for name in WEIGHTS)


def test_powers_come_before_masks_in_a_folded_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "end.ckpt"
    module = seeded(Evaluated)
    callbacks = [MagnitudePruning(ConstantSchedule(0.5), every=3), ErrorFeedback(), Powerpropagation(2.0)]
    fit(module, *callbacks, Saves(path, 1))
    folded = load_folded(path, seeded(Evaluated))
    for name, weight in weights_of(module).items():
        assert torch.equal(folded.get_parameter(name), weight)


def test_folding_by_hand_inside_fit_is_not_repeated_at_its_end() -> None:
    class FoldsAtEnd(Evaluated):
        def on_train_end(self) -> None:
            fold(self)

    module, expected = seeded(FoldsAtEnd), seeded(Evaluated)
    fit(module, Powerpropagation(2.0))
    fit(expected, Powerpropagation(2.0))
    for name, weight in weights_of(expected).items():
        assert torch.equal(module.get_parameter(name), weight)


def test_resuming_does_not_convert_again(tmp_path: Path) -> None:
    path = tmp_path / "middle.ckpt"
    straight, resumed = seeded(Evaluated), seeded(Evaluated)
    fit(straight, Powerpropagation(), Saves(path, 0))
    quiet_trainer([Powerpropagation()]).fit(resumed, loader(), ckpt_path=path)
    for name, weight in weights_of(straight).items():
        assert torch.equal(resumed.get_parameter(name), weight)


class Stops(pl.Callback):
    def on_train_batch_end(self, *args: Any) -> None:
        raise RuntimeError("power cut")


def test_after_an_interruption_the_same_module_goes_on_and_another_starts_anew() -> None:
    power, module, other, fresh = (
        Powerpropagation(2.0),
        seeded(Evaluated),
        seeded(Evaluated),
        seeded(Evaluated),
    )
    with pytest.raises(RuntimeError, match="power cut"):
        fit(module, power, Stops())
    held = weights_of(module)
    seen = evaluated(module, power)
    torch.testing.assert_close(seen["first.weight"], held["first.weight"] * held["first.weight"].abs())
    fit(other, power)
    fit(fresh, Powerpropagation(2.0))
    for name, weight in weights_of(fresh).items():
        assert torch.equal(other.get_parameter(name), weight)


def test_averaged_weights_are_folded_last() -> None:
    module = seeded(Evaluated)
    fit(module, EMAWeightAveraging(decay=0.5), Powerpropagation(2.0))
    other = seeded(Evaluated)
    fit(other, Powerpropagation(2.0), EMAWeightAveraging(decay=0.5))
    plain = seeded(Evaluated)
    fit(plain, Powerpropagation(2.0))
    for name in WEIGHTS:
        assert torch.equal(module.get_parameter(name), other.get_parameter(name))
        assert not torch.equal(module.get_parameter(name), plain.get_parameter(name))
        torch.testing.assert_close(module.get_parameter(name), plain.get_parameter(name), rtol=0, atol=0.1)


def test_copies_forget_the_module() -> None:
    power = Powerpropagation()
    fit(seeded(Evaluated), power)
    for clone in (copy.deepcopy(power), pickle.loads(pickle.dumps(power))):
        assert clone.state_dict() == power.state_dict()


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.5}, r"expected an exponent beta in \[1, inf\), got 0.5"),
        ({"beta": math.inf}, r"expected an exponent beta in \[1, inf\), got inf"),
        ({"exponent": "svd"}, "expected exponent 'fixed', 'spectral_layer' or 'spectral_global', got 'svd'"),
        ({"initialization": "zeros"}, "expected initialization 'module' or 'truncated_normal', got 'zeros'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Powerpropagation(**options)
