"""From a run folder to files that a plain module loads: what they hold is what was evaluated, bit for bit."""

import errno
import json
import os
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

import lightning_fedsparse
from lightning_fedsparse import FederatedLoop, load_folded, load_global
from lightning_fedsparse.cli import main
from lightning_fedsparse.export import export_run
from lightning_fedsparse.models import DigitsCNN
from lightning_fedsparse.recipe import Recipe
from lightning_fedsparse.runs import make_run
from lightning_fedsparse.weight_files import encode_weights, read_weights
from tests.test_loop import QUIET, Net, clients, loaders


class Network(nn.Module):
    """Statistics of a BatchNorm layer, and one weight under two names."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, stride=2)
        self.norm = nn.BatchNorm2d(4)
        self.first = nn.Linear(36, 36)
        self.again = nn.Linear(36, 36)
        self.again.weight = self.first.weight
        self.last = nn.Linear(36, 10)

    def forward(self, x):
        x = self.norm(self.conv(x)).relu().flatten(1)
        return self.last(self.again(self.first(x).relu()).relu())


class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = Network()

    def forward(self, x):
        return self.network(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Pairs(Model):
    """Takes two tensors, which no batch of images is an example of."""

    example_input_array = (torch.zeros(1, 1, 8, 8), torch.zeros(1, 10))

    def forward(self, x, offset=0.0):
        return self.network(x) + offset


class Untied(Model):
    """What submodels by width can follow."""

    example_input_array = torch.zeros(1, 1, 8, 8)

    def __init__(self):
        super().__init__()
        self.network.again.weight = nn.Parameter(self.network.first.weight.detach().clone())


class Stubborn(Model):
    def forward(self, x):
        return self.network(x) if x.sum().item() > 0 else self.network(-x)


RECIPE = """
seed_everything: 3
model: tests.test_export.Model
data:
  class_path: lightning_fedsparse.data.FederatedDataModule
  init_args:
    data:
      class_path: lightning_fedsparse.datasets.OptdigitsDataModule
      init_args: {batch_size: 16}
    partition: {class_path: lightning_fedsparse.partition.IidPartition, init_args: {num_clients: 20}}
    capacities: {class_path: lightning_fedsparse.capacities.CapacityShares, init_args: {shares: {1.0: 0.5, 0.25: 0.5}}}
loop:
  rounds: 2
  clients_per_round: 3
  console: false
  evaluation: {split: none}
  trainer: {max_steps: 4}
"""
METHODS = {
    "fedavg": (),
    "feddip": ("--loop.callbacks=feddip", "--loop.callbacks.sparsity=0.8", "--loop.callbacks.reconfigure_every=1"),
    "sparsyfed": ("--loop.callbacks=sparsyfed", "--loop.callbacks.sparsity=0.6"),
    "fiarse": ("--loop.callbacks=fiarse",),
    "fiarse, small": ("--loop.callbacks=fiarse", "--loop.callbacks.capacity=0.3"),
    "width": ("--loop.callbacks=[lightning_fedsparse.callbacks.WidthMasking]", "--model=tests.test_export.Untied"),
}


def trained(folder, *overrides):
    """A run in its folder, and its objects with the global model that was evaluated."""
    file = folder / "mine.yaml"
    file.write_text(RECIPE)
    overrides = [o.replace("callbacks=f", "callbacks=lightning_fedsparse.callbacks.f") for o in overrides]
    overrides = [o.replace("callbacks=s", "callbacks=lightning_fedsparse.callbacks.s") for o in overrides]
    run = make_run(Recipe.read(file, overrides), folder / "run")
    run.fit(resume=False)
    return run


@pytest.fixture(scope="module")
def feddip_run(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("feddip"), *METHODS["feddip"])


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)


# -- round trips -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_format_gives_the_model_that_was_evaluated(method, tmp_path):
    run = trained(tmp_path, *METHODS[method])
    model, folder = run._model.eval(), run.folder
    expected = model.state_dict()
    zeros = sum(int((parameter == 0).sum()) for parameter in model.parameters())

    loaded = load_global(folder)
    assert type(loaded) is type(model)
    assert not loaded.training
    assert_same(loaded.state_dict(), expected)

    dense, sparse = export_run(folder), export_run(folder, sparse=True)
    assert (dense.name, sparse.name) == ("model.safetensors", "model-sparse.safetensors")
    plain = type(model)()
    plain.load_state_dict(load_file(dense), strict=True)
    assert_same(plain.state_dict(), expected)
    plain = type(model)()
    plain.load_state_dict(read_weights(sparse), strict=True)
    assert_same(plain.state_dict(), expected)
    assert_same(read_weights(dense), load_file(dense))
    if zeros > 1000:
        assert sparse.stat().st_size < 0.7 * dense.stat().st_size

    checkpoint = export_run(folder, format="checkpoint")
    assert_same(type(model).load_from_checkpoint(checkpoint).state_dict(), expected)
    assert_same(torch.load(checkpoint, weights_only=True)["state_dict"], expected)
    assert_same(load_folded(checkpoint, type(model)()).state_dict(), expected)


@pytest.mark.parametrize("method", ["fiarse", "feddip", "sparsyfed", "width"])
def test_a_submodel_is_the_one_that_the_loop_gives(method, tmp_path):
    run = trained(tmp_path, *METHODS[method])
    small = type(run._model)()
    run.loop.load_submodel(small, 0.25)
    assert_same(load_global(run.folder, capacity=0.25).state_dict(), small.state_dict())
    path = export_run(run.folder, capacity=0.25, sparse=True)
    assert path.name == "model-0.25-sparse.safetensors"
    assert_same(read_weights(path), small.state_dict())
    zeros = [sum(int((p == 0).sum()) for p in load_global(run.folder, capacity=c).parameters()) for c in (0.1, 0.25, 1)]
    assert zeros[0] > zeros[1] >= zeros[2]


def test_a_program_needs_no_code_and_takes_any_batch(feddip_run, tmp_path):
    path = export_run(feddip_run.folder, tmp_path / "new" / "program.pt2", format="onnx-ready")
    program = torch.export.load(path).module()
    for size in (1, 7):
        images = torch.randn(size, 1, 8, 8)
        torch.testing.assert_close(program(images), feddip_run._model.eval()(images))


def test_a_submodule_is_exported_under_its_own_names(feddip_run, tmp_path):
    network = Network()
    path = export_run(feddip_run.folder, tmp_path / "network.safetensors", module="network")
    network.load_state_dict(load_file(path), strict=True)
    assert_same(network.state_dict(), feddip_run._model.network.state_dict())
    path = export_run(feddip_run.folder, tmp_path / "norm.pt2", module="network.norm", format="onnx-ready")
    inside = torch.randn(3, 4, 3, 3)
    torch.testing.assert_close(torch.export.load(path).module()(inside), feddip_run._model.eval().network.norm(inside))


def test_a_module_says_itself_what_it_takes(tmp_path):
    run = trained(tmp_path, "--model=tests.test_export.Pairs", "--loop.rounds=1")
    path = export_run(run.folder, format="onnx-ready")
    images, offset = torch.randn(3, 1, 8, 8), torch.randn(3, 10)
    torch.testing.assert_close(torch.export.load(path).module()(images, offset), run._model.eval()(images, offset))


def test_a_plain_trainers_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["run", "pruning-only", "--trainer.max_epochs=1", "--trainer.limit_train_batches=4"]) == 0
    path = export_run("runs/pruning-only")
    loaded = load_global("runs/pruning-only")
    assert_same(load_file(path), dict(loaded.state_dict()))
    assert sum(int((parameter == 0).sum()) for parameter in loaded.parameters()) > 1000
    images = torch.randn(4, 1, 8, 8)
    program = torch.export.load(export_run("runs/pruning-only", format="onnx-ready")).module()
    torch.testing.assert_close(program(images), loaded(images))
    with pytest.raises(
        ValueError, match="expected a federation for a submodel of capacity 0.5, got a plain Trainer's run"
    ):
        load_global("runs/pruning-only", capacity=0.5)


def test_state_that_is_no_tensor(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(DigitsCNN, "get_extra_state", lambda self: "words", raising=False)
    monkeypatch.setattr(DigitsCNN, "set_extra_state", lambda self, state: None, raising=False)
    assert main(["run", "pruning-only", "--trainer.max_epochs=1", "--trainer.limit_train_batches=1"]) == 0
    with pytest.raises(
        ValueError, match="expected tensors in the state of ImageClassifier, got 'network._extra_state'"
    ):
        export_run("runs/pruning-only")


def test_a_run_of_python_fills_a_module(tmp_path):
    model = Net()
    loop = FederatedLoop(1, 3, default_root_dir=tmp_path, evaluation=QUIET, console=False)
    loop.fit(model, loaders(clients()))
    assert lightning_fedsparse.load_global is load_global
    assert_same(load_global(tmp_path, Net()).state_dict(), model.state_dict())
    with pytest.raises(
        ValueError, match="expected a recipe.yaml to build the model from, found none in .*: a run that Python"
    ):
        load_global(tmp_path)


def test_one_of_its_checkpoints(feddip_run, tmp_path):
    last = feddip_run.folder / "checkpoints" / "last.ckpt"
    best = last.with_name("best.ckpt")
    best.write_bytes(last.read_bytes())
    assert_same(load_global(best).state_dict(), feddip_run._model.state_dict())
    best.unlink()


def test_generators_stay_as_they_are(feddip_run):
    before = torch.get_rng_state()
    load_global(feddip_run.folder)
    assert torch.equal(torch.get_rng_state(), before)


# -- the sparse file ---------------------------------------------------------------------------------------------------


def test_a_sparse_file_by_hand(tmp_path):
    weight = torch.tensor([[0.0, 1.5, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, -2.0]])
    steps = torch.tensor(7)
    path = tmp_path / "a.safetensors"
    path.write_bytes(encode_weights({"weight": weight, "steps": steps, "bias": torch.ones(3)}, sparse=True))
    with safe_open(path, framework="numpy") as file:
        assert sorted(file.keys()) == ["bias", "steps", "weight:mask", "weight:values"]
        assert file.metadata() == {"format": "lightning-fedsparse sparse 1", "shapes": '{"weight": [3, 3]}'}
        mask, values = file.get_tensor("weight:mask"), file.get_tensor("weight:values")
        shape = json.loads(file.metadata()["shapes"])["weight"]
    assert mask.tolist() == [0b01000000, 0b10000000]
    assert values.tolist() == [1.5, -2.0]
    # as the module says it
    dense = np.zeros(shape, values.dtype)
    dense[np.unpackbits(mask, count=dense.size).reshape(shape).astype(bool)] = values
    assert dense.tolist() == weight.tolist()
    assert_same(read_weights(path), {"bias": torch.ones(3), "steps": steps, "weight": weight})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kept", [0.0, 0.02, 0.5, 1.0])
def test_any_density_and_dtype_comes_back(dtype, kept, tmp_path):
    weight = torch.randn(33, 7, dtype=dtype) * (torch.rand(33, 7) < kept)
    (tmp_path / "a").write_bytes(encode_weights({"w": weight}, sparse=True))
    assert_same(read_weights(tmp_path / "a"), {"w": weight})


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"w:values": torch.ones(2)}, "w:mask"),
        ({"w:mask": torch.tensor([192], dtype=torch.uint8)}, "w:values"),
        ({"w:mask": torch.tensor([128], dtype=torch.uint8), "w:values": torch.ones(2)}, "expected 1 values for a mask"),
        (
            {"w:mask": torch.tensor([192, 0], dtype=torch.uint8), "w:values": torch.ones(2)},
            "expected a packed mask of 1 ",
        ),
    ],
)
def test_parts_that_do_not_fit(tensors, message, tmp_path):
    save_file(tensors, tmp_path / "a", {"format": "lightning-fedsparse sparse 1", "shapes": '{"w": [4]}'})
    with pytest.raises(
        ValueError, match=f"expected the masks and values of a sparse file, got others in .*a: .*{message}"
    ):
        read_weights(tmp_path / "a")


@pytest.mark.parametrize("shapes", ["[4]", '{"w": 4}', '{"w": null}', '{"w": ["4"]}', '{"w": [2.0, 2]}', "{"])
def test_shapes_that_are_none(shapes, tmp_path):
    tensors = {"w:mask": torch.tensor([192], dtype=torch.uint8), "w:values": torch.ones(2)}
    save_file(tensors, tmp_path / "a", {"format": "lightning-fedsparse sparse 1", "shapes": shapes})
    with pytest.raises(ValueError, match="expected the masks and values of a sparse file, got others in .*a: "):
        read_weights(tmp_path / "a")


def test_a_file_that_is_none(tmp_path):
    (tmp_path / "a").write_text("no weights")
    with pytest.raises(ValueError, match="expected a safetensors file, got something else in .*a: "):
        read_weights(tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="gone"):
        read_weights(tmp_path / "gone")


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "expected a run folder or one of its checkpoints, found nothing at nowhere"),
        (["empty"], "expected a run with a checkpoint, found none at empty/checkpoints/last.ckpt"),
        (["RUN", "--format=onnx"], "expected a format of safetensors, checkpoint, onnx-ready, got 'onnx'"),
        (
            ["RUN", "--format=checkpoint", "--sparse"],
            "expected sparse files in format safetensors only, got checkpoint",
        ),
        (["RUN", "--capacity=1.5"], "expected a capacity in (0, 1], got 1.5 of the submodel"),
        (["RUN", "--module=net"], "expected a submodule of Model, which has network, got 'net'"),
        (["RUN", "--output=empty"], "expected a file to write, got the folder empty"),
        (["RUN", "--output=taken/model"], "expected to write taken/model, got: File exists"),
        (["RUN", "--output=taken"], "expected a new file, found taken: overwrite it with --overwrite"),
        (
            ["cut/checkpoints/last.ckpt"],
            "expected a federation's checkpoint, got a file that can't be read: cut/checkpoints/last.ckpt",
        ),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(arguments, message, feddip_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("taken").write_text("mine")
    Path("cut/checkpoints").mkdir(parents=True)
    for name in ("recipe.yaml", "history.jsonl"):
        Path("cut", name).write_bytes((feddip_run.folder / name).read_bytes())
    last = (feddip_run.folder / "checkpoints" / "last.ckpt").read_bytes()
    Path("cut/checkpoints/last.ckpt").write_bytes(last[: len(last) // 2])
    before = sorted(Path().rglob("*")), sorted(feddip_run.folder.rglob("*"))
    assert main(["export", *(a.replace("RUN", str(feddip_run.folder)) for a in arguments)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1
    assert (sorted(Path().rglob("*")), sorted(feddip_run.folder.rglob("*"))) == before
    assert Path("taken").read_text() == "mine"


def test_the_command_writes_and_overwrites(feddip_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("model.safetensors").write_text("an older one")
    command = ["export", str(feddip_run.folder), "--sparse", "--output=model.safetensors"]
    assert main([*command, "--overwrite"]) == 0
    size = Path("model.safetensors").stat().st_size
    assert capsys.readouterr().out == f"saved in model.safetensors, {size:,} bytes\n"
    assert_same(read_weights("model.safetensors"), dict(feddip_run._model.state_dict()))
    assert [path.name for path in Path().iterdir()] == ["model.safetensors"]


def test_a_disk_that_is_full(feddip_run, tmp_path, monkeypatch):
    (tmp_path / "a").write_text("an older one")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="expected to write .*a, got: No space left on device"):
        export_run(feddip_run.folder, tmp_path / "a", overwrite=True)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["an older one"]


def test_a_model_that_cannot_be_traced(tmp_path):
    run = trained(tmp_path, "--model=tests.test_export.Stubborn", "--loop.rounds=1")
    with pytest.raises(
        ValueError, match="expected a model that torch.export can trace with batches of any size, Stubborn"
    ):
        export_run(run.folder, format="onnx-ready")
    assert not list(run.folder.glob("*.pt2*"))


def test_a_submodule_that_is_not_used(feddip_run, monkeypatch):
    monkeypatch.setattr(Network, "forward", lambda self, x: self.last(self.first(x.flatten(1)[:, :36])))
    with pytest.raises(ValueError, match="expected a submodule that forward uses, BatchNorm2d is not used in it"):
        export_run(feddip_run.folder, format="onnx-ready", module="network.norm")


def test_an_example_that_is_no_tensor(feddip_run, monkeypatch):
    monkeypatch.setattr(Model, "example_input_array", {"x": torch.zeros(1)}, raising=False)
    with pytest.raises(
        ValueError, match="expected tensors as an example of what Model takes, got dict: give it an example"
    ):
        export_run(feddip_run.folder, format="onnx-ready")
