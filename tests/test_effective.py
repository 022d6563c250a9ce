"""The swap engine in automatic optimization, held against a loop in which autograd does the chain rule."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from lightning_fedsparse.callbacks import ErrorFeedback, IncrementalRegularization, MagnitudePruning
from lightning_fedsparse.effective import EffectiveWeights
from lightning_fedsparse.schedules import ConstantSchedule, LinearSchedule, StaircaseSchedule
from lightning_fedsparse.transforms import MaskTransform, Weights
from tests.effective_reference import (
    WEIGHTS,
    Net,
    adamw,
    assert_engine_clean,
    loader,
    quiet_trainer,
    reference_fit,
    seeded,
    sgd,
    weights_of,
)


class OneLayer(pl.LightningModule):
    """Loss ``(w . x - y)**2 / 2`` of one weight row, with plain SGD."""

    def __init__(self, weight: list[float], weight_decay: float = 0.0) -> None:
        super().__init__()
        self.layer = nn.Linear(len(weight), 1, bias=False)
        self.weight_decay = weight_decay
        with torch.no_grad():
            self.layer.weight.copy_(torch.tensor([weight]))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return ((self.layer(x) - y) ** 2).sum() / 2

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), lr=0.1, weight_decay=self.weight_decay)


def one_step(module: OneLayer, callbacks: list[pl.Callback], x: list[float]) -> list[float]:
    data = torch.utils.data.TensorDataset(torch.tensor([x]), torch.tensor([[3.0]]))
    quiet_trainer(callbacks, max_epochs=1).fit(module, torch.utils.data.DataLoader(data))
    return module.layer.weight.detach().flatten().tolist()


def half(*, fold: bool = False, every: int = 1) -> MagnitudePruning:
    return MagnitudePruning(ConstantSchedule(0.5), every=every, end=1.0, fold=fold)


# -- answers on paper: w = (1, -.2), m = (1, 0), x = (1, 2), y = 3 gives w_eff . x = 1 and the gradient (-2, -4) -------


def test_error_feedback_updates_the_pruned_weight() -> None:
    assert one_step(OneLayer([1.0, -0.2]), [half(), ErrorFeedback()], [1.0, 2.0]) == pytest.approx([1.2, 0.2])


def test_without_feedback_the_pruned_weight_is_gone() -> None:
    assert one_step(OneLayer([1.0, -0.2]), [half()], [1.0, 2.0]) == pytest.approx([1.2, 0.0])


def test_weight_decay_acts_on_the_dense_weights() -> None:
    module = OneLayer([1.0, -0.2], weight_decay=5e-4)
    assert one_step(module, [half(), ErrorFeedback()], [1.0, 2.0]) == pytest.approx([1.19995, 0.20001])


def test_the_penalty_pulls_kept_weights_only() -> None:
    callbacks = [half(), ErrorFeedback(), IncrementalRegularization(ConstantSchedule(0.1))]
    assert one_step(OneLayer([1.0, -0.2]), callbacks, [1.0, 2.0]) == pytest.approx([1.19, 0.2])


@pytest.mark.parametrize(("feedback", "left"), [(True, [0.0, 0.4]), (False, [0.3, 0.0])])
def test_a_pruned_weight_comes_back_with_feedback_only(feedback: bool, left: list[float]) -> None:
    # x = (0, 2) drives the pruned second weight from -.2 to .4, past the first; the mask at the end of fit sees that
    callbacks = [half(fold=True), *([ErrorFeedback()] if feedback else [])]
    assert one_step(OneLayer([0.3, -0.2]), callbacks, [0.0, 2.0]) == pytest.approx(left)


def test_a_layer_of_zeros_gets_a_penalty_of_zero() -> None:
    module = OneLayer([0.0, 0.0])
    one_step(module, [IncrementalRegularization(ConstantSchedule(0.1))], [0.0, 0.0])
    assert module.layer.weight.tolist() == [[0.0, 0.0]]


# -- against the reference loop ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("feedback", [True, False])
@pytest.mark.parametrize("optimizer", [sgd, adamw])
def test_training_equals_the_reference(
    optimizer: Callable[..., Any], feedback: bool, accumulate: int, clip: float | None
) -> None:
    # 5 batches: with accumulation the last window of an epoch has one batch only
    total = 10 if accumulate == 1 else 6
    module, twin = (seeded(lambda: Net(optimizer)) for _ in range(2))
    pruning = MagnitudePruning(LinearSchedule(0.2, 0.8), every=2, end=1.0, fold=False)
    callbacks = [pruning, *([ErrorFeedback()] if feedback else [])]
    quiet_trainer(callbacks, accumulate_grad_batches=accumulate, gradient_clip_val=clip).fit(module, loader())
    masks = reference_fit(
        twin,
        list(loader()),
        sparsity_at=lambda step: 0.2 + 0.6 * step / total if step % 2 == 0 or step == total else None,
        feedback=feedback,
        accumulate=accumulate,
        clip=clip,
    )
    for name, expected in weights_of(twin).items():
        if feedback or name not in WEIGHTS:
            torch.testing.assert_close(module.get_parameter(name), expected, rtol=0, atol=1e-7)
        else:
            torch.testing.assert_close(module.get_parameter(name) * masks[name], expected, rtol=0, atol=1e-7)
    for name, mask in masks.items():
        assert torch.equal(pruning.masks[name], mask)
    assert_engine_clean(module)


@pytest.mark.parametrize("feedback", [True, False])
def test_plain_steps_equal_the_reference_to_the_bit(feedback: bool) -> None:
    module, twin = seeded(Net), seeded(Net)
    callbacks = [half(every=3), *([ErrorFeedback()] if feedback else [])]
    quiet_trainer(callbacks).fit(module, loader())
    reference_fit(
        twin, list(loader()), sparsity_at=lambda step: 0.5 if step in (0, 3, 6, 9, 10) else None, feedback=feedback
    )
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_the_penalty_equals_that_of_autograd(clip: float | None, accumulate: int) -> None:
    total = 10 if accumulate == 1 else 6
    module, twin = seeded(Net), seeded(Net)
    callbacks = [half(every=2), ErrorFeedback(), IncrementalRegularization(StaircaseSchedule(0.3, 2))]
    quiet_trainer(callbacks, accumulate_grad_batches=accumulate, gradient_clip_val=clip).fit(module, loader())
    reference_fit(
        twin,
        list(loader()),
        sparsity_at=lambda step: 0.5 if step % 2 == 0 or step == total else None,
        feedback=True,
        strength_at=lambda step: 0.15 if step >= total / 2 else 0.0,
        accumulate=accumulate,
        clip=clip,
    )
    for name, expected in weights_of(twin).items():
        torch.testing.assert_close(module.get_parameter(name), expected, rtol=0, atol=2e-7)


def test_the_order_of_the_callbacks_does_not_matter() -> None:
    results = []
    for order in itertools.permutations(range(3)):
        made = [half(every=2), ErrorFeedback(), IncrementalRegularization(ConstantSchedule(0.1))]
        module = seeded(Net)
        quiet_trainer([made[index] for index in order]).fit(module, loader())
        results.append(weights_of(module))
    assert len(results) == 6
    for other in results[1:]:
        assert all(torch.equal(other[name], results[0][name]) for name in other)


def test_two_prunings_of_disjoint_weights() -> None:
    module, twin = seeded(Net), seeded(Net)
    first = MagnitudePruning(ConstantSchedule(0.25), every=1, end=1.0, include=["first.*"], exclude=["*.bias"])
    second = MagnitudePruning(ConstantSchedule(0.75), every=1, end=1.0, include=["second.weight"])
    quiet_trainer([first, second, ErrorFeedback()]).fit(module, loader())
    per_layer = MagnitudePruning(ConstantSchedule(0.25), every=1, end=1.0, include=["first.weight"])
    other = MagnitudePruning(ConstantSchedule(0.75), every=1, end=1.0, include=["second.weight"])
    quiet_trainer([other, ErrorFeedback(), per_layer]).fit(twin, loader())
    assert int((module.first.weight == 0).sum()) == 12
    assert int((module.second.weight == 0).sum()) == 18
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), twin.parameters(), strict=True))


def test_tied_weights_are_swapped_once() -> None:
    class Tied(Net):
        def __init__(self) -> None:
            super().__init__()
            self.middle = nn.Linear(8, 8)
            self.again = nn.Linear(8, 8)
            self.again.weight = self.middle.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.again(torch.tanh(self.middle(torch.tanh(self.first(x))))))

    module = seeded(Tied)
    pruning = half()
    quiet_trainer([pruning, ErrorFeedback()]).fit(module, loader())
    assert module.again.weight is module.middle.weight
    assert sorted(pruning.masks) == ["first.weight", "middle.weight", "second.weight"]
    last = module.seen["train"][-1]["middle.weight"]
    assert int((last == 0).sum()) > 0
    assert int((module.middle.weight == 0).sum()) == 0


# -- the engine by itself ----------------------------------------------------------------------------------------------


def engine_with_mask(module: nn.Module) -> EffectiveWeights:
    engine = EffectiveWeights.of(module)
    masks = {name: torch.arange(p.numel()).view_as(p) % 2 == 0 for name, p in module.named_parameters() if p.dim() == 2}
    engine.register(module, MaskTransform(masks), module)
    return engine


def test_swapping_twice_is_swapping_once() -> None:
    module = nn.Linear(2, 1, bias=False)
    stored = module.weight.detach().clone()
    engine = engine_with_mask(module)
    for _ in range(2):
        engine.swap_in()
        assert module.weight.tolist() == [[stored[0, 0].item(), 0.0]]
    for _ in range(2):
        engine.swap_out()
        assert torch.equal(module.weight, stored)


def test_the_stored_weights_never_move() -> None:
    module = nn.Linear(2, 1, bias=False)
    memory = module.weight.detach()
    stored = memory.clone()
    engine = engine_with_mask(module)
    for _ in range(2):
        engine.swap_in()
        assert torch.equal(memory, stored)
        assert module.weight.data_ptr() != memory.data_ptr()
        engine.swap_out()
        assert module.weight.data_ptr() == memory.data_ptr()


def test_a_step_that_raises_has_changed_nothing() -> None:
    class Failing(MaskTransform):
        def apply(self, weights: Weights, out: Weights) -> None:
            super().apply(weights, out)
            raise ArithmeticError

    module = nn.Linear(2, 1, bias=False)
    stored = module.weight.detach().clone()
    engine = EffectiveWeights.of(module)
    engine.register("me", Failing({"weight": torch.zeros(1, 2)}), module)
    with pytest.raises(ArithmeticError):
        engine.swap_in()
    assert torch.equal(module.weight, stored)
    assert not engine._stored


def test_weights_of_another_layout_get_memory_of_their_own() -> None:
    module = nn.Conv2d(2, 1, 2, bias=False)
    engine = EffectiveWeights.of(module)
    engine.register("me", MaskTransform({"weight": torch.zeros(1, 2, 2, 2)}), module)
    for convert in (nn.Module.double, partial(nn.Module.to, memory_format=torch.channels_last)):
        engine.swap_in()
        engine.swap_out()
        convert(module)
        engine.swap_in()
        assert module.weight.stride() == engine._stored["weight"].stride()
        assert module.weight.dtype == torch.float64
        assert not bool(module.weight.any())
        engine.swap_out()


def test_stored_weights_inside_a_swap() -> None:
    module = nn.Linear(2, 1, bias=False)
    stored = module.weight.detach().clone()
    engine = engine_with_mask(module)
    engine.swap_in()
    with engine.stored():
        assert torch.equal(module.weight, stored)
    assert module.weight[0, 1] == 0
    engine.swap_out()
    with engine.stored():
        assert torch.equal(module.weight, stored)
    assert torch.equal(module.weight, stored)


def test_a_graph_used_across_a_swap_raises() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    engine = engine_with_mask(module)
    engine.swap_in()
    loss = module(torch.ones(1, 3)).sum()
    engine.swap_out()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_an_unknown_parameter_is_refused() -> None:
    module = nn.Linear(2, 1)
    with pytest.raises(ValueError, match=r"Linear has no parameter 'gone', which 'me' wants to change"):
        EffectiveWeights.of(module).register("me", MaskTransform({"gone": torch.ones(1, 2)}), module)


def test_masks_of_other_names_are_refused() -> None:
    transform = MaskTransform({"a": torch.ones(1)})
    with pytest.raises(ValueError, match=r"expected masks for \['a'\], got \['b'\]"):
        transform.set({"b": torch.ones(1)})


def test_engines_die_with_their_modules() -> None:
    gc.collect()
    before = len(EffectiveWeights._engines)
    engine_with_mask(nn.Linear(2, 1))
    gc.collect()
    assert len(EffectiveWeights._engines) == before
