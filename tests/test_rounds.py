"""Rounds end to end: records and bytes, evaluation, buffers, refused uploads, resuming, and bad input."""

import json
import math
from dataclasses import replace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedsparse import FederatedDataModule, FederatedLoop, load_folded
from lightning_fedsparse.callbacks import SparsityCallback, feddip
from lightning_fedsparse.checkpointing import Checkpointing
from lightning_fedsparse.client import ClientWorker
from lightning_fedsparse.evaluation import Evaluation
from lightning_fedsparse.failures import ClientFailure, FailureReason
from lightning_fedsparse.partition import IidPartition
from lightning_fedsparse.payload import decode, encode
from lightning_fedsparse.records import read_history
from lightning_fedsparse.sampling import UniformSampling
from lightning_fedsparse.server import ServerState
from tests.test_loop import QUIET, Net, clients, loaders


class Evaluated(pl.LightningDataModule):
    """Global validation and test data for a mapping of clients."""

    def val_dataloader(self):
        return DataLoader(clients()["c0"], batch_size=8)

    def test_dataloader(self):
        return DataLoader(clients()["c1"], batch_size=8)


def evaluated():
    data = {name: DataLoader(part, batch_size=8, shuffle=True) for name, part in clients().items()}
    return FederatedDataModule(data, evaluation=Evaluated())


def run(rounds=3, callbacks=None, *, data=None, model=None, trainer=None, **arguments):
    torch.manual_seed(0)
    model = model or Net()
    arguments.setdefault("evaluation", QUIET)
    loop = FederatedLoop(rounds, 4, callbacks, trainer, console=False, **arguments)
    loop.fit(model, data or loaders(clients()))
    return loop, model


@pytest.fixture
def uploads(monkeypatch):
    """Length of every upload, in order; and a way to change what arrives."""
    lengths, change = [], {}
    original = ClientWorker.run

    def spy(self, job):
        result = original(self, job)
        if job.client_id in change:
            result = change[job.client_id](result)
        lengths.append(len(result.payload))
        return result

    monkeypatch.setattr(ClientWorker, "run", spy)
    return lengths, change


def test_bytes_are_those_of_the_encoded_payloads(uploads):
    lengths, _ = uploads
    loop, _ = run(3, feddip(sparsity=0.5, initial_sparsity=0.2, reconfigure_every=1))
    first, *rounds = loop.history
    assert (first.round, first.bytes_up, first.bytes_down, first.clients_sampled) == (0, 0, 0, 0)
    assert [record.bytes_up for record in rounds] == [sum(lengths[4 * i : 4 * i + 4]) for i in range(3)]
    assert rounds[-1].total_bytes_up == sum(lengths)
    assert rounds[-1].total_bytes_down == sum(record.bytes_down for record in rounds)
    # Net has 243 parameters of 4 bytes, 32 statistics of 4 bytes and a counter of 8
    assert rounds[0].dense_bytes_up == 4 * (4 * (8 * 16 + 16 + 2 * 16 + 16 * 3 + 3) + 4 * 32 + 8)


def test_sparse_rounds_send_less_and_positions_only_where_masks_are_new():
    callbacks = feddip(sparsity=0.9, initial_sparsity=0.9, reconfigure_every=10)
    model = nn.Sequential(nn.Linear(8, 400), nn.ReLU(), nn.Linear(400, 3))

    class Wide(Net):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.last = model[0], nn.Identity(), model[2]

    loop, _ = run(2, callbacks, model=Wide(), data=loaders(clients(4)))
    first, second = loop.history[1:]
    assert first.bytes_up < 0.45 * first.dense_bytes_up  # 403 of the 4803 values are biases, which stay dense
    assert second.bytes_down < first.bytes_down  # all four clients hold the mask by now


def test_evaluation_runs_the_users_own_steps_from_round_0(tmp_path):
    logger = CSVLogger(tmp_path / "logs", name="", version="")
    loop, _ = run(3, data=evaluated(), evaluation=Evaluation(every=2), logger=logger, default_root_dir=tmp_path)
    assert [sorted(record.metrics) for record in loop.history] == [["val_loss"], [], ["val_loss"], ["val_loss"]]
    rows = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows] == [0, 1, 2, 3]
    assert rows[3]["metrics"]["val_loss"] == loop.history[3].metrics["val_loss"]
    assert read_history(tmp_path / "history.jsonl") == loop.history
    logger.save()
    assert "val_loss" in (tmp_path / "logs" / "metrics.csv").read_text()


def test_global_metrics_are_those_of_the_returned_model():
    data = evaluated()
    loop, model = run(2, feddip(sparsity=0.5), data=data, evaluation=Evaluation())
    assert loop.validate(model, data) == {"val_loss": loop.history[-1].metrics["val_loss"]}


def test_evaluation_on_every_clients_own_validation_data():
    class Whole(pl.LightningDataModule):
        def train_dataloader(self):
            x = torch.randn(80, 8, generator=torch.Generator().manual_seed(0))
            return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=8, shuffle=True)

        def val_dataloader(self):
            return DataLoader(self.train_dataloader().dataset, batch_size=8)

    data = FederatedDataModule(Whole(), IidPartition(5), validation_fraction=0.25)
    loop, _ = run(1, data=data, evaluation=Evaluation(clients=True))
    metrics = loop.history[-1].metrics
    assert metrics["clients/val_loss/min"] <= metrics["clients/val_loss/mean"]
    wanted = (
        "client 'c0' has none: set validation_fraction, or give each client a LightningDataModule with a val_dataloader"
    )
    with pytest.raises(ValueError, match=wanted):
        run(1, data=evaluated(), evaluation=Evaluation(clients=True))


@pytest.mark.parametrize("split", ["validation", "none"])
def test_clients_are_evaluated_without_data_of_all(split):
    class Whole(pl.LightningDataModule):
        def train_dataloader(self):
            x = torch.randn(80, 8, generator=torch.Generator().manual_seed(0))
            return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=8, shuffle=True)

    data = FederatedDataModule(Whole(), IidPartition(5), validation_fraction=0.25)
    loop, _ = run(1, data=data, evaluation=Evaluation(split, clients=True))
    assert [sorted(record.metrics) for record in loop.history] == [
        ["clients/val_loss/mean", "clients/val_loss/min"]
    ] * 2


def test_averaged_local_and_recalibrated_statistics():
    _, averaged = run(2)
    assert averaged.norm.num_batches_tracked > 0
    loop, local = run(2, buffers="local")
    assert torch.equal(local.norm.running_mean, torch.zeros(16))
    kept = loop._run.federation.memories[next(iter(loop._run.federation.memories))]["buffers"]
    assert kept["norm.num_batches_tracked"] >= 3
    loop, recalibrated = run(2, buffers="recalibrate")
    # cumulative statistics over the last cohort's data with the final weights, batch by batch
    cohort = UniformSampling().sample(list(clients()), 4, seed=0, round_index=1)
    assert int(recalibrated.norm.num_batches_tracked) == sum(math.ceil(len(clients()[name]) / 8) for name in cohort)
    assert recalibrated.norm.momentum == 0.1
    assert not torch.equal(recalibrated.norm.running_mean, averaged.norm.running_mean)


def test_a_refused_upload_costs_the_round_one_client(uploads):
    _, change = uploads

    def broken(result):
        data = bytearray(result.payload)
        data[len(data) // 2] ^= 1
        return replace(result, payload=bytes(data))

    change["c3"] = broken
    loop, _ = run(4)
    failed = [record for record in loop.history if record.clients_failed]
    assert failed
    for record in failed:
        assert (record.clients_sampled, record.clients_returned, record.clients_failed) == (4, 3, 1)
        assert record.failures["c3"].reason == FailureReason.INVALID_UPLOAD
        assert "checksum" in record.failures["c3"].sentence


def test_an_upload_beyond_the_support_is_refused(uploads):
    _, change = uploads

    def dense(result):
        update = decode(result.payload, schema=loop.state.schema, reference=loop.state.masks)
        values = dict(update.values)
        values["first.weight"] = torch.ones(16, 8)
        masks = {**update.masks, "first.weight": None}
        wide = type(update)(values, masks, update.num_examples, buffers=update.buffers)
        return replace(result, payload=encode(wide))

    change["c0"] = dense
    loop = FederatedLoop(3, 4, feddip(sparsity=0.5, regrow="nested"), evaluation=QUIET, console=False)
    loop.fit(Net(), loaders(clients()))
    reasons = [record.failures["c0"].sentence for record in loop.history if "c0" in record.failures]
    assert reasons
    assert all("outside the support" in reason for reason in reasons)


def test_an_upload_of_another_kind_is_refused_and_a_nan_metric_does_no_harm(uploads):
    _, change = uploads

    def own(result):
        start = ServerState.of(Net())
        return decode(result.payload, schema=start.schema, reference=start.masks)

    def delta(result):
        update = replace(own(result), kind="delta")
        return replace(result, payload=encode(update))

    def boastful(result):
        update = replace(own(result), metrics={"train_loss": math.nan})
        return replace(result, payload=encode(update))

    change["c1"], change["c0"] = delta, boastful
    loop, _ = run(1)
    record = loop.history[1]
    sentence = "expected 'weights' with what is absent 'unchanged', got 'delta' with 'unchanged'"
    assert record.failures == {"c1": ClientFailure(FailureReason.INVALID_UPLOAD, sentence)}
    assert record.train_loss is not None


class Stop(SparsityCallback):
    def __init__(self, at):
        self._at = at  # not compared: another moment is no other recipe

    def on_server_round_end(self, state, server_round):
        if server_round.index == self._at:
            raise RuntimeError("power cut")
        return state


@pytest.mark.parametrize("residual", ["drop", "keep"])
def test_resumed_run_ends_like_an_uninterrupted_one(tmp_path, residual):
    def method():
        return feddip(sparsity=0.8, initial_sparsity=0.3, reconfigure_every=2, residual=residual)

    momentum = {"server_optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.9, momentum=0.5)}
    whole, expected = run(6, method(), default_root_dir=tmp_path / "whole", **momentum)

    twos = Checkpointing(every_n_rounds=2)
    with pytest.raises(RuntimeError, match="power cut"):
        run(6, [*method(), Stop(4)], default_root_dir=tmp_path / "cut", checkpointing=twos, **momentum)
    torch.manual_seed(0)
    model = Net()
    after = [*method(), Stop(None)]
    loop = FederatedLoop(6, 4, after, evaluation=QUIET, console=False, default_root_dir=tmp_path / "cut", **momentum)
    loop.fit(model, loaders(clients()), ckpt_path="last")
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name

    def rows(folder):
        lines = (folder / "history.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if "seconds" not in k} for line in lines]

    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    assert loop.state.masks.id == whole.state.masks.id


def test_resuming_says_what_does_not_fit(tmp_path):
    run(1, default_root_dir=tmp_path)
    with pytest.raises(ValueError, match="expected an empty run folder, found a run in"):
        run(1, default_root_dir=tmp_path)
    checkpoint = tmp_path / "checkpoints" / "last.ckpt"
    other = FederatedLoop(2, 4, evaluation=QUIET, console=False)

    class Wider(Net):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(16, 4)

    with pytest.raises(
        ValueError, match=r"'last.bias' is float32\[4\] in the model and float32\[3\] in the checkpoint"
    ):
        other.fit(Wider(), loaders(clients()), ckpt_path=checkpoint)
    checkpoint.write_bytes(checkpoint.read_bytes()[:100])
    with pytest.raises(ValueError, match="a file that can't be read"):
        other.fit(Net(), loaders(clients()), ckpt_path=checkpoint)
    with pytest.raises(ValueError, match="found no file at"):
        other.fit(Net(), loaders(clients()), ckpt_path=tmp_path / "absent.ckpt")
    with pytest.raises(ValueError, match="expected default_root_dir with ckpt_path='last'"):
        other.fit(Net(), loaders(clients()), ckpt_path="last")


def test_plain_callbacks_are_pristine_copies_in_every_client_round():
    class Counter(pl.Callback):
        seen = []

        def __init__(self):
            self.count = 0

        def on_train_batch_end(self, *args):
            self.count += 1

        def on_fit_end(self, *args):
            self.seen.append(self.count)

    counter = Counter()
    run(2, trainer={"callbacks": [counter], "max_epochs": 1})
    assert counter.count == 0
    assert max(Counter.seen) <= math.ceil(30 / 8)


def test_a_federations_checkpoint_loads_as_a_plain_model(tmp_path):
    _, model = run(3, feddip(sparsity=0.8, initial_sparsity=0.4, reconfigure_every=1), default_root_dir=tmp_path)
    plain = load_folded(tmp_path / "checkpoints" / "last.ckpt", Net())
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in plain.state_dict().items())


def test_threads_are_as_asked_for_during_the_run_and_as_before_after_it():
    seen = []

    class Count(SparsityCallback):
        def on_server_round_end(self, state, server_round):
            seen.append(torch.get_num_threads())
            return state

    before = torch.get_num_threads()
    run(1, [Count()], threads=2)
    assert (seen, torch.get_num_threads()) == ([2], before)


def test_dense_uploads_of_nested_masks_change_bytes_and_nothing_else():
    options = {"sparsity": 0.8, "initial_sparsity": 0.3, "reconfigure_every": 2, "regrow": "nested"}
    masked, first = run(5, feddip(**options, upload="masked"))
    dense, second = run(5, feddip(**options, upload="dense"))
    assert all(torch.equal(tensor, second.state_dict()[name]) for name, tensor in first.state_dict().items())
    assert masked.history[-1].total_bytes_up < dense.history[-1].total_bytes_up
