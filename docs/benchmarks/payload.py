"""The wire against its bound, against what peers send, and against memory: makes the tables of payload.md.

    python docs/benchmarks/payload.py                   # everything but Flower
    python docs/benchmarks/payload.py sizes trained     # some of: sizes, peers, masks, trained, speed, aggregation
    python docs/benchmarks/payload.py flower            # installs Flower into a temporary environment; takes 10 GB of memory

Tables are printed and put into the page. Everything runs in one thread; times are of this process's own CPU time, the
least of several repetitions, and given as multiples of something done in the same run: only those mean anything on
another machine. ``FEDSPARSE_DATA`` names the folder that holds Fashion-MNIST, without which a model is missing from
``trained``; ``--checkpoints`` names the folder with runs of the Fashion-MNIST benchmark, of which more come.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pages
import torch
from fashion_mnist import ROUNDS
from payload_aggregation import aggregation, flower
from torch import Tensor, nn

from lightning_fedsparse import FederatedDataModule, FederatedLoop
from lightning_fedsparse.accounting import Traffic, entropy_bound, size_in_bytes
from lightning_fedsparse.broadcasting import unpack_masks
from lightning_fedsparse.callbacks import feddip
from lightning_fedsparse.datasets import FashionMNISTDataModule, OptdigitsDataModule
from lightning_fedsparse.evaluation import Evaluation
from lightning_fedsparse.models import DigitsCNN, ImageClassifier, LeNet5
from lightning_fedsparse.partition import IidPartition
from lightning_fedsparse.payload import MaskSet, Schema, decode, encode, payload_sizes
from lightning_fedsparse.update import SparseUpdate, gather

Rows = list[list[str]]  # the first is the heading

PAGE = Path(__file__).with_suffix(".md")
SIZE = 11_170_000  # weights of ResNet-18, in one tensor
DENSITIES = (0.5, 0.1, 0.05, 0.01, 0.001)
ROUNDED = ("bfloat16", "float16", "int8", "int4")
REPEATS = 7


def random_update(density: float) -> SparseUpdate:
    """Gaussian values on an independent random mask."""
    generator = torch.Generator().manual_seed(0)
    masks = MaskSet.of({"w": torch.rand(SIZE, generator=generator) < density})
    return SparseUpdate(gather({"w": torch.randn(SIZE, generator=generator) * 0.02}, masks), masks, num_examples=600)


SCHEMA = Schema.of({"w": torch.empty(SIZE)}, {})  # as in the loop, both ends know what the tensors are


def with_raw_values(traffic: Traffic, values: int) -> int:
    """What a payload would take if float32 values were not coded."""
    return traffic.total - traffic.values + 4 * values


def sizes() -> Rows:
    rows = [["density", "bound, bytes", "raw float32", "float32", *ROUNDED]]
    for density in DENSITIES:
        update = random_update(density)
        traffic = Traffic.of(encode(update, schema=SCHEMA), update, schema=SCHEMA, reference=None, dense=0)
        rounded = [len(encode(update, schema=SCHEMA, values=values, seed=0)) / traffic.bound for values in ROUNDED]
        ratios = [with_raw_values(traffic, update.num_values) / traffic.bound, traffic.total / traffic.bound, *rounded]
        rows.append([str(density), f"{traffic.bound:,}", *(f"{ratio:.4f}" for ratio in ratios)])
    return rows


def peers() -> Rows:
    rows = [
        ["density", "dense arrays", "index and value", "bitmap and values", "here", "least of others", "here, int8"]
    ]
    for density in DENSITIES:
        update = random_update(density)
        count = update.num_values
        others = (4 * SIZE, 8 * count, (SIZE + 7) // 8 + 4 * count)
        ours, int8 = len(encode(update, schema=SCHEMA)), len(encode(update, schema=SCHEMA, values="int8", seed=0))
        megabytes = [f"{number / 1e6:.3f}" for number in (*others, ours)]
        rows.append([str(density), *megabytes, f"{min(others) / ours:.2f}x", f"{int8 / 1e6:.3f}"])
    return rows


def masks() -> Rows:
    rows = [["density of A", "B given A: positions / bound", "B alone", "update on A: total / coded values"]]
    for density in DENSITIES:
        update = random_update(density)
        held = update.masks
        kept = torch.rand(SIZE, generator=torch.Generator().manual_seed(9)) < 0.96
        subset = MaskSet.of({"w": held["w"] & kept})
        moved = SparseUpdate(gather({"w": torch.randn(SIZE)}, subset), subset)
        leaning = {"schema": SCHEMA, "reference": held}
        positions = payload_sizes(encode(moved, **leaning), **leaning).positions
        bound = entropy_bound(moved, reference=held) - 4 * moved.num_values
        alone = payload_sizes(encode(moved, schema=SCHEMA), schema=SCHEMA).positions
        known = payload_sizes(encode(update, **leaning), **leaning)
        ratios = f"{positions / bound:.4f}", f"{alone / positions:.1f}x as much", f"{known.total / known.values:.5f}"
        rows.append([str(density), *ratios])
    return rows


def speed() -> Rows:
    dense = torch.randn(SIZE) * 0.02
    target = torch.empty_like(dense)
    copy = milliseconds(lambda: target.copy_(dense))
    update, whole = random_update(0.05), SparseUpdate({"w": dense}, {"w": None})
    held = update.masks

    def anew() -> SparseUpdate:
        """A mask set that has not found its positions yet."""
        return SparseUpdate(update.values, MaskSet(held.id, {"w": held["w"]}))

    def read(data: bytes) -> SparseUpdate:
        return decode(data, schema=SCHEMA)

    cases: list[tuple[str, Callable[[], bytes], Callable[[bytes], object]]] = [
        ("new mask", lambda: encode(update, schema=SCHEMA), read),
        ("new mask, its positions still to be found", lambda: encode(anew(), schema=SCHEMA), read),
        (
            "known mask",
            lambda: encode(update, schema=SCHEMA, reference=held),
            lambda data: decode(data, schema=SCHEMA, reference=held),
        ),
        *((f"new mask, {v}", lambda v=v: encode(update, schema=SCHEMA, values=v, seed=0), read) for v in ROUNDED),
        ("dense", lambda: encode(whole, schema=SCHEMA), read),
    ]
    rows = [
        ["update", "encode, ms", "copies", "decode, ms", "copies", "MB/s of dense weights, encode / decode"],
        [f"a copy of the dense {4 * SIZE / 1e6:.1f} MB", f"{copy:.1f}", "1", f"{copy:.1f}", "1", ""],
    ]
    for name, write, undo in cases:
        data = write()
        times = milliseconds(write), milliseconds(lambda data=data, undo=undo: undo(data))
        cells = [cell for least in times for cell in (f"{least:.1f}", f"{least / copy:.1f}")]
        rows.append([name, *cells, " / ".join(f"{4e-3 * SIZE / least:.0f}" for least in times)])
    return rows


def milliseconds(function: Callable[[], object]) -> float:
    """The least CPU time of one call."""
    least = math.inf
    for _ in range(REPEATS):
        started = time.process_time()
        function()
        least = min(least, time.process_time() - started)
    return 1e3 * least


def trained(checkpoints: Path) -> Rows:
    heading = "model, masked weights, density, of layers, bound (bytes), raw float32, float32, int8, header (bytes)"
    rows = [[*heading.split(", "), "known mask: total / coded values", "the loop's upload"]]
    for name, weights, held in trained_models(checkpoints):
        schema = Schema.of(weights, {})
        update = SparseUpdate(gather(weights, held), held, num_examples=600)
        data = encode(update, schema=schema)
        traffic = Traffic.of(data, update, schema=schema, reference=None, dense=size_in_bytes(weights))
        leaning = {"schema": schema, "reference": held}
        known = payload_sizes(encode(update, **leaning), **leaning)
        upload = len(encode(replace(update, mask_id=held.id, metrics={"train_loss": 0.5}), **leaning))
        masks = [mask for mask in held.values() if mask is not None]
        layers = [float(mask.float().mean()) for mask in masks]
        masked, kept = (sum(int(count(mask)) for mask in masks) for count in (Tensor.numel, Tensor.sum))
        raw = with_raw_values(traffic, update.num_values)
        int8 = len(encode(update, schema=schema, values="int8", seed=0))
        ratios = [f"{size / traffic.bound:.4f}" for size in (raw, traffic.total, int8)]
        density = f"{kept / masked:.3f}", f"{min(layers):.3f} to {max(layers):.3f}"
        last = f"{traffic.header}", f"{known.total / known.values:.4f}", f"{upload / known.values:.4f}"
        rows.append([name, f"{masked:,}", *density, f"{traffic.bound:,}", *ratios, *last])
    return rows


def trained_models(checkpoints: Path) -> Iterator[tuple[str, Mapping[str, Tensor], MaskSet]]:
    """Name, weights and masks of models that were trained by FedDIP."""
    pl.seed_everything(0, verbose=False)
    wide = nn.Sequential(nn.Flatten(), nn.Linear(64, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU())
    data = FederatedDataModule(OptdigitsDataModule(), IidPartition(num_clients=10))
    for name, network, sparsity in (
        ("digits CNN", DigitsCNN(), 0.9),
        ("digits, 64-1024-1024-10", wide.append(nn.Linear(1024, 10)), 0.95),
    ):
        loop = FederatedLoop(
            12, 5, feddip(sparsity=sparsity), {"max_epochs": 2}, evaluation=Evaluation(split="none"), console=False
        )
        loop.fit(ImageClassifier(network), data)
        yield f"{name}, 12 rounds", loop.state.weights, loop.state.masks
    if "FEDSPARSE_DATA" in os.environ:
        loop = FederatedLoop(
            12, 5, feddip(sparsity=0.95), {"max_epochs": 2}, evaluation=Evaluation(split="none"), console=False
        )
        pl.seed_everything(0, verbose=False)
        fashion = FederatedDataModule(FashionMNISTDataModule(batch_size=128), IidPartition(num_clients=50))
        loop.fit(ImageClassifier(LeNet5(), partial(torch.optim.SGD, lr=0.1, weight_decay=5e-4)), fashion)
        yield "LeNet-5 on Fashion-MNIST, 12 rounds", loop.state.weights, loop.state.masks
    for path in sorted(checkpoints.glob("*feddip*/checkpoints/last.ckpt")):
        saved = torch.load(path, weights_only=True)
        if saved["round"] == ROUNDS:
            held = unpack_masks(saved["masks"])
            weights = {name: saved["state_dict"][name] for name in held}
            yield f"LeNet-5, {path.parts[-3]}, {ROUNDS} rounds", weights, held


def machine() -> str:
    """What everything ran on, in a line."""
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next((line.split(":")[1].strip() for line in cpuinfo if line.startswith("model name")), platform.machine())
    versions = f"torch {torch.__version__}, Python {platform.python_version()}, zlib {zlib.ZLIB_RUNTIME_VERSION}"
    return f"{model}, one thread; {versions}."


def put(name: str, lines: list[str]) -> None:
    """Print lines and put them into the page between its markers."""
    print(f"{name}\n", *lines, "", sep="\n", flush=True)
    pages.put(PAGE, name, lines)


def main() -> None:
    sections = {f.__name__: f for f in (sizes, peers, masks, trained, speed, aggregation, flower)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help="everything but Flower if none is named")
    parser.add_argument("--checkpoints", type=Path, default=PAGE.parent / "fashion_mnist", help="default: %(default)s")
    arguments = parser.parse_args()
    names = arguments.sections or [name for name in sections if name != "flower"]
    if unknown := set(names) - sections.keys():
        parser.error(f"expected some of {', '.join(sections)}, got {min(unknown)!r}")
    torch.set_num_threads(1)
    put("machine", [machine()])
    for name in names:
        rows = trained(arguments.checkpoints) if name == "trained" else sections[name]()
        put(name, pages.table(rows[0], rows[1:]))


if __name__ == "__main__":
    main()
