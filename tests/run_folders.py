"""Short runs in a folder, and what is in it."""

import json
from enum import Enum

import torch

from lightning_fedsparse import FederatedLoop
from lightning_fedsparse.evaluation import Evaluation
from tests.test_loop import Net, clients, loaders


class Mode(str, Enum):
    FAST = "fast"


def fit(folder, rounds=2, callbacks=None, *, model=Net, population=6, per_round=3, ckpt_path=None, **arguments):
    torch.manual_seed(0)
    module = model()
    arguments = {"evaluation": Evaluation(split="none"), **arguments}
    loop = FederatedLoop(rounds, per_round, callbacks, console=False, default_root_dir=folder, **arguments)
    loop.fit(module, loaders(clients(population)), ckpt_path=ckpt_path)
    return loop, module


def rows(folder):
    lines = (folder / "history.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if "seconds" not in name} for line in lines]


def snapshot(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names(folder):
    return sorted(path.name for path in folder.iterdir())
