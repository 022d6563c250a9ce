"""Gradient pruning: four numbers, a federation by hand, and a run that is cut in two."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedsparse import FederatedLoop
from lightning_fedsparse.callbacks import GradientPruning
from lightning_fedsparse.callbacks.gradient_pruning import _Summing
from lightning_fedsparse.sampling import UniformSampling
from lightning_fedsparse.schedules import ConstantSchedule, CubicSchedule
from lightning_fedsparse.seeding import derive_seed
from tests.effective_reference import quiet_trainer
from tests.test_feddip_reference import global_mask
from tests.test_loop import QUIET, Net, clients, loaders

ROUNDS, PERIOD, PER_ROUND, EPOCHS, SEED = 7, 2, 3, 2, 5
PRUNED = ("first.weight", "last.weight")


class Pulled(pl.LightningModule):
    """Four weights whose gradients are always 0.1, 1, 5 and 0.2."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 1, bias=False)
        with torch.no_grad():
            self.layer.weight.copy_(torch.tensor([[4.0, 3.0, 2.0, 1.0]]))

    def training_step(self, batch):
        return self.layer(torch.tensor([0.1, 1.0, 5.0, 0.2])).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_four_weights():
    pruning = GradientPruning(ConstantSchedule(0.5), every=2)
    module = Pulled()
    quiet_trainer([pruning], max_epochs=1).fit(module, DataLoader([torch.zeros(1)] * 4, batch_size=1))
    # the first mask keeps 4 and 3; from the third step on the weights with gradients 1 and 5, the latter from zero
    expected = torch.tensor([[0.0, 3 - 4 * 0.1, -2 * 0.1 * 5, 0.0]])
    torch.testing.assert_close(module.layer.weight.detach(), expected)


def scheduled(t):
    return 0.7 + (0.3 - 0.7) * (1 - t / ROUNDS) ** 3


def by_hand(model, data):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    masks = global_mask({name: state[name] for name in PRUNED}, scheduled(0))
    for t in range(ROUNDS):
        for name in PRUNED:
            state[name] = state[name] * masks[name]
        gathers = t + 1 < ROUNDS and (t + 1) % PERIOD == 0
        cohort = UniformSampling().sample(list(data), PER_ROUND, seed=SEED, round_index=t)
        mean = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in state.items()}
        for client in cohort:
            torch.manual_seed(derive_seed(SEED, "client", t, client))
            local = copy.deepcopy(model)
            local.load_state_dict(state)
            weights = dict(local.named_parameters())
            optimizer = local.configure_optimizers()
            for _ in range(EPOCHS):
                for x, y in DataLoader(data[client], batch_size=8, shuffle=True):
                    optimizer.zero_grad()
                    dense = {name: weights[name].detach().clone() for name in PRUNED}
                    for name in PRUNED:
                        weights[name].data *= masks[name]
                    F.cross_entropy(local(x), y).backward()
                    for name in PRUNED:
                        weights[name].data.copy_(dense[name])
                        if not gathers:
                            weights[name].grad *= masks[name]
                    optimizer.step()
            for name, tensor in local.state_dict().items():
                mean[name] += len(data[client]) * tensor.double()
        total = sum(len(data[client]) for client in cohort)
        new = {name: (value / total).to(state[name].dtype) for name, value in mean.items()}
        pulls = {name: new[name] - state[name] for name in PRUNED}
        for name in PRUNED:
            new[name] = new[name] * masks[name]
        if gathers:
            masks = global_mask(pulls, scheduled(t + 1))
            for name in PRUNED:
                new[name] = new[name] * masks[name]
        state = new
    return state, masks


def test_the_loop_against_a_federation_by_hand():
    torch.manual_seed(3)
    model = Net().double()
    data = {name: TensorDataset(part.tensors[0].double(), part.tensors[1]) for name, part in clients().items()}
    expected, masks = by_hand(copy.deepcopy(model), data)
    pruning = GradientPruning(CubicSchedule(0.3, 0.7), every=PERIOD, end=1.0)
    loop = FederatedLoop(
        ROUNDS, PER_ROUND, [pruning], {"max_epochs": EPOCHS}, seed=SEED, evaluation=QUIET, console=False
    )
    history = loop.fit(model, loaders(data))
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-12)
    for name in PRUNED:
        assert torch.equal(loop.state.masks[name], masks[name])
    assert not any(record.failures for record in history)
    # rounds 2, 4 and 6 send everything
    kept = [record.traffic_up.values / 3 for record in history[1:]]
    assert all(kept[index] > 1.1 * max(kept[index - 1], kept[index + 1]) for index in (1, 3, 5))
    assert all(record.traffic_up.positions == 0 for record in history)


def test_masks_follow_the_gradient_and_not_the_magnitude():
    torch.manual_seed(3)
    pruning = GradientPruning(ConstantSchedule(0.5), every=1, end=1.0)
    loop = FederatedLoop(2, 3, [pruning], evaluation=QUIET, console=False)
    model = Net()
    before = global_mask({name: dict(model.named_parameters())[name].detach() for name in PRUNED}, 0.5)
    loop.fit(model, loaders(clients()))
    returned = sum(int((loop.state.masks[name] & ~before[name]).sum()) for name in PRUNED)
    assert returned > 0


def test_a_resumed_fit_goes_on_with_its_sums(tmp_path):
    def fit(epochs, ckpt_path=None):
        module = Pulled()
        trainer = quiet_trainer([GradientPruning(ConstantSchedule(0.5), every=3)], max_epochs=epochs)
        trainer.fit(module, DataLoader([torch.zeros(1)] * 4, batch_size=1), ckpt_path=ckpt_path)
        return trainer, module

    trainer, _ = fit(1)
    assert set(trainer.callbacks[0].state_dict()["sums"]) == {"layer.weight"}
    trainer.save_checkpoint(tmp_path / "cut.ckpt")
    saved = torch.load(tmp_path / "cut.ckpt", weights_only=True)["callbacks"]
    sums = next(state["sums"]["layer.weight"] for state in saved.values() if "sums" in state)
    torch.testing.assert_close(sums, torch.tensor([[0.1, 1.0, 5.0, 0.2]]))  # of the step since the masks moved


@pytest.mark.parametrize("every", [0, -1])
def test_a_period_below_one(every):
    with pytest.raises(ValueError, match="expected a period of at least 1"):
        GradientPruning(ConstantSchedule(0.5), every=every)


def test_a_step_that_overflowed_pulls_at_nothing():
    sums = {}
    transform = _Summing({"w": torch.ones(4, dtype=torch.bool)}, sums)
    transform.chain_({"w": torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0])}, {}, {})
    transform.chain_({"w": torch.tensor([2.0, 0.0, 1.0, 1.0])}, {}, {})
    assert sums["w"].tolist() == [2.0, 0.0, 1.0, 2.0]
