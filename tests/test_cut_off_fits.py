"""A fit that is cut off, and what of it must not reach the next client."""

from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from torchmetrics import MeanMetric, MetricCollection, SumMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassPrecision

from lightning_fedsparse.callbacks import fiarse, sparsyfed
from lightning_fedsparse.resident import restored
from lightning_fedsparse.testing import Fault
from tests.failing_clients import Trap, always, assert_same, moving, reasons, run, weights
from tests.test_loop import Net


class FullDisk(pl.Callback):
    """Wants to save something when a fit ends badly, as ``OnExceptionCheckpoint`` does, and can't."""

    def on_exception(self, trainer, pl_module, exception):
        raise OSError("no space left")


@pytest.mark.parametrize("method", [moving, partial(sparsyfed, sparsity=0.5), fiarse])
def test_a_callback_that_raises_on_an_exception_keeps_no_method_from_tidying_up(method):
    lost = run(always("c3", Fault.DROPPED), method(), per_round=6)
    raised = run(None, [FullDisk(), *method(), Trap("backward")], per_round=6)
    assert [list(failed) for failed in reasons(raised)] == [["c3"]] * 3
    assert_same(weights(raised), weights(lost))


def assert_cut_off(module, fit):
    with pytest.raises(ValueError, match="cut off"), restored(module):
        fit()


def test_metrics_that_were_half_full_are_empty():
    class Measured(Net):
        def __init__(self):
            super().__init__()
            self.mean = MeanMetric()
            self.both = MetricCollection({"sum": SumMetric(), "mean": MeanMetric()})

    module = Measured()

    def fit():
        module.mean.update(3.0)
        module.both.update(3.0)
        raise ValueError("cut off")

    assert_cut_off(module, fit)
    module.mean.update(1.0)
    module.both.update(torch.tensor(1.0))
    assert float(module.mean.compute()) == 1.0
    assert {name: float(value) for name, value in module.both.compute().items()} == {"sum": 1.0, "mean": 1.0}


def test_collections_that_share_states_still_do():
    class Measured(Net):
        def __init__(self):
            super().__init__()
            self.both = MetricCollection([MulticlassAccuracy(3), MulticlassPrecision(3)])

    module, fresh = Measured(), Measured()
    wrong, right = torch.tensor([1, 2, 0, 0]), torch.tensor([0, 1, 2, 2])
    module.both.update(wrong, right)  # the first update finds out what is shared
    module.both.reset()

    def fit():
        module.both.update(wrong, right)
        raise ValueError("cut off")

    assert_cut_off(module, fit)
    for collection in (module.both, fresh.both):
        collection.update(right, right)
        collection.update(wrong, right)
    assert {k: float(v) for k, v in module.both.compute().items()} == {
        k: float(v) for k, v in fresh.both.compute().items()
    }
