"""Runs that are killed, runs that are long, and what saving them costs.

    python docs/benchmarks/soak.py kill                           # 200 kills at random moments; about half an hour
    python docs/benchmarks/soak.py kill --kills 6 --only feddip   # fewer, of one recipe
    python docs/benchmarks/soak.py rounds                         # 10,000 rounds
    python docs/benchmarks/soak.py cost                           # needs Fashion-MNIST, see docs/recipes.md

Each puts its table into soak.md, unless ``--print`` is given; the exit code is 1 if an aim is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pages
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedsparse import FederatedDataModule, FederatedLoop
from lightning_fedsparse.callbacks import SparsityCallback, feddip
from lightning_fedsparse.checkpoint import load_checkpoint
from lightning_fedsparse.cli import main as fedsparse
from lightning_fedsparse.evaluation import Evaluation
from lightning_fedsparse.recipe import Recipe, find_recipe
from lightning_fedsparse.runs import FederatedRun

PAGE = Path(__file__).with_name("soak.md")
SHARED = Path("/dev/shm")

# The quickstart's data and model under each method (and the drifting data under one), with whatever keeps state between rounds: on clients, on the server, on
# the wire. The best two rounds are kept, and not every round is saved.
LOOP = """base: {base}
loop:
  rounds: {rounds}
  evaluation: {{split: test, every: 2}}
  checkpointing: {{every_n_rounds: {every}, monitor: train_loss, mode: min, save_top_k: 2}}
"""
FEDDIP = """  callbacks:
    class_path: lightning_fedsparse.callbacks.feddip
    init_args: {sparsity: 0.9, reconfigure_every: 2, residual: keep}
"""
RECIPES = {
    "fedavg, momentum on the server": (
        1,
        "quickstart",
        """  callbacks: []
  server_optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.9, momentum: 0.5}}
""",
    ),
    "feddip, residuals kept": (2, "quickstart", FEDDIP),
    "feddip, residuals kept, int8 uploads": (
        1,
        "quickstart",
        FEDDIP
        + """  wire: {class_path: lightning_fedsparse.wire.Wire, init_args: {uploads: int8}}
""",
    ),
    "feddip, two workers": (
        1,
        "quickstart",
        FEDDIP
        + """  executor: {class_path: lightning_fedsparse.executors.ProcessExecutor, init_args: {workers: 2}}
""",
    ),
    "sparsyfed": (
        3,
        "quickstart",
        """  callbacks: {class_path: lightning_fedsparse.callbacks.sparsyfed, init_args: {sparsity: 0.9}}
""",
    ),
    "fiarse, four sizes": (
        2,
        "quickstart",
        """  callbacks: {class_path: lightning_fedsparse.callbacks.fiarse}
  aggregator: {class_path: lightning_fedsparse.aggregation.MaskedMean}
data:
  init_args:
    capacities:
      class_path: lightning_fedsparse.capacities.CapacityShares
      init_args: {shares: {1.0: 0.25, 0.25: 0.25, 0.0625: 0.25, 0.015625: 0.25}}
""",
    ),
    "feddst": (
        1,
        "quickstart",
        """  callbacks:
    - {class_path: lightning_fedsparse.callbacks.DynamicSparseTraining, init_args: {sparsity: 0.8, every: 1}}
""",
    ),
    "heterofl, random units": (
        1,
        "quickstart",
        """  callbacks:
    - {class_path: lightning_fedsparse.callbacks.WidthMasking, init_args: {selection: random}}
model:
  init_args: {image_shape: [1, 8, 8]}
data:
  init_args:
    capacities:
      class_path: lightning_fedsparse.capacities.CapacityShares
      init_args: {shares: {1.0: 0.5, 0.25: 0.5}}
""",
    ),
    "feddip, data that change": (1, "drift-feddip", ""),
    "prunefl": (
        2,
        "quickstart",
        """  callbacks:
    - class_path: lightning_fedsparse.callbacks.GradientPruning
      init_args:
        schedule: {class_path: lightning_fedsparse.schedules.ConstantSchedule, init_args: {value: 0.8}}
        every: 1
        end: 1.0
""",
    ),
}


# -- kill ----------------------------------------------------------------------------------------------------------------


def kill(arguments: argparse.Namespace) -> bool:
    """Kill runs at random moments, resume them, compare how they end with a run that was left alone."""
    recipes = {name: recipe for name, recipe in RECIPES.items() if arguments.only in name}
    counts = {name: [0, 0, 0] for name in recipes}  # kills, endings, identical endings
    generator = random.Random(arguments.seed)
    segments = set(SHARED.glob("torch_*"))
    with tempfile.TemporaryDirectory() as scratch:
        wholes = {}
        for number, (name, (every, base, text)) in enumerate(recipes.items()):
            path = Path(scratch, f"{number}.yaml")
            path.write_text(LOOP.format(base=base, rounds=arguments.rounds, every=every) + text, encoding="utf-8")
            folder = Path(scratch, f"{number}-whole")
            wholes[name] = path, folder, life(path, folder, None)
        while sum(kills for kills, _, _ in counts.values()) < arguments.kills:
            name = min(counts, key=lambda name: counts[name][0])
            path, whole, seconds = wholes[name]
            folder = Path(scratch, f"{path.stem}-{counts[name][1]}")
            longest = seconds
            while life(path, folder, generator.uniform(0, longest)) is None:
                counts[name][0] += 1
                longest += seconds / 4  # it ends also where the machine has become slower
            different = differences(whole, folder)
            counts[name][1] += 1
            counts[name][2] += not different
            print(f"{name}: {counts[name][0]} kills, {counts[name][1]} endings", *different, sep="\n  ", flush=True)
    # named by the process that made them; those of living ones are somebody's
    left = [
        path for path in {*SHARED.glob("torch_*")} - segments if not Path("/proc", path.name.split("_")[1]).exists()
    ]
    rows = [(name, *map(str, counts[name])) if counts.get(name, [0])[0] else (name, "not run") for name in RECIPES]
    totals = [sum(column) for column in zip(*counts.values(), strict=True)]
    lines = pages.table(("recipe", "kills", "runs", "identical"), [*rows, ("together", *map(str, totals))])
    put(
        arguments,
        "kill",
        [*lines, "", f"Runs of {arguments.rounds} rounds. Segments of shared memory left behind: {len(left)}."],
    )
    return totals[1] == totals[2] and not left


def life(recipe: Path, folder: Path, limit: float | None) -> float | None:
    """Run or resume in a child, which is killed after so many seconds.

    Returns:
        The seconds that it took to the end; None if it was killed.
    """
    known = (folder / "recipe.yaml").is_file()
    command = ["resume", str(folder)] if known else ["run", str(recipe), f"--loop.default_root_dir={folder}"]
    started = time.monotonic()
    # this process imports everything and trains nothing, so that its children can train and a life has no start to wait for
    child = os.fork()
    if child == 0:
        os.setsid()
        live(command, folder.with_suffix(".log"))
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        if limit is not None and time.monotonic() - started > limit:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            require_no_workers(child)
            return None
        time.sleep(0.002)
    if os.waitstatus_to_exitcode(status) != 0:
        raise RuntimeError(f"expected {' '.join(command)} to end well, got:\n{folder.with_suffix('.log').read_text()}")
    return time.monotonic() - started


def live(command: list[str], log: Path) -> None:
    """Run a command line and end the process."""
    code = 1
    with log.open("a", encoding="utf-8") as file, redirect_stdout(file):
        os.dup2(file.fileno(), 2)
        try:
            code = fedsparse(command)
        except BaseException:  # noqa: BLE001  # whatever it is, the log says it
            traceback.print_exc(file=file)
        file.flush()
        os._exit(code)


def require_no_workers(group: int) -> None:
    """Wait until the killed process's workers are gone too: at once, or as soon as they are done starting."""
    for _ in range(6000):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.01)
    os.killpg(group, signal.SIGKILL)
    raise RuntimeError("expected the workers of a killed run to end within a minute, they did not")


def differences(one: Path, other: Path) -> list[str]:
    """What differs between two run folders, but for times."""
    found = []
    rows = [[without_times(json.loads(line)) for line in (run / "history.jsonl").open()] for run in (one, other)]
    if rows[0] != rows[1]:
        found.append("history")
    names = [sorted(path.name for path in (run / "checkpoints").iterdir()) for run in (one, other)]
    if names[0] != names[1]:
        return [*found, f"checkpoints: {names[0]} and {names[1]}"]
    for name in names[0]:
        pair = [load_checkpoint(run / "checkpoints" / name) for run in (one, other)]
        for content in pair:
            content["record"] = without_times(json.loads(content["record"]))
        found += [f"{name}: {key}" for key in pair[0] if not identical(pair[0][key], pair[1].get(key))]
    return found


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_times(inner) for name, inner in value.items() if "seconds" not in name}
    return value


def identical(one: Any, other: Any) -> bool:
    """Whether two nests of containers, tensors and primitives are the same to the bit."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(identical(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(identical, one, other))
    return type(one) is type(other) and one == other


# -- rounds --------------------------------------------------------------------------------------------------------------


class Tiny(pl.LightningModule):
    """A model whose rounds cost little but what every round costs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.last = nn.Linear(16, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.last(F.relu(self.first(batch[0]))), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Gauge(SparsityCallback):
    """Reads what the process holds at the end of some rounds."""

    def __init__(self, folder: Path, rounds: list[int]) -> None:
        self._folder = folder
        self._rounds = rounds
        self.rows: list[dict[str, int]] = []

    def on_server_round_end(self, state: Any, server_round: Any) -> Any:
        if server_round.index + 1 in self._rounds:
            pages_held = int(Path("/proc/self/statm").read_text().split()[1])
            checkpoints = (self._folder / "checkpoints").iterdir()
            self.rows.append(
                {
                    "round": server_round.index + 1,
                    "memory": pages_held * os.sysconf("SC_PAGE_SIZE"),
                    "files": len(list(Path("/proc/self/fd").iterdir())),
                    "checkpoints": sum(path.stat().st_size for path in checkpoints),
                    "history": (self._folder / "history.jsonl").stat().st_size,
                }
            )
        return state


def rounds(arguments: argparse.Namespace) -> bool:
    """Run many tiny rounds and see what grows."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(10, 16, 8, generator=generator)
    y = torch.randint(0, 3, (10, 16), generator=generator)
    loaders = {f"c{i}": DataLoader(TensorDataset(x[i], y[i]), batch_size=8) for i in range(10)}
    total = arguments.rounds
    with tempfile.TemporaryDirectory() as folder:
        gauge = Gauge(Path(folder), [total // 20, total // 4, total // 2, 3 * total // 4, total])
        methods = [*feddip(sparsity=0.8, reconfigure_every=10, residual="keep"), gauge]
        loop = FederatedLoop(
            total, 2, methods, evaluation=Evaluation(split="none"), default_root_dir=folder, console=False
        )
        started = time.perf_counter()
        loop.fit(Tiny(), FederatedDataModule(loaders))
        seconds = time.perf_counter() - started
    head = (
        "round",
        "memory, MiB",
        "of it history, MiB",
        "open files",
        "checkpoints, bytes",
        "history, bytes per round",
    )
    kept = held_bytes(loop.history) / len(loop.history)
    table = [
        (
            f"{row['round']:,}",
            f"{row['memory'] / 2**20:.1f}",
            f"{kept * row['round'] / 2**20:.1f}",
            str(row["files"]),
            f"{row['checkpoints']:,}",
            f"{row['history'] / row['round']:.0f}",
        )
        for row in gauge.rows
    ]
    put(arguments, "rounds", [*pages.table(head, table), "", f"{1000 * seconds / total:.1f} ms per round."])
    first, last = gauge.rows[1], gauge.rows[-1]  # by then every client has a residual
    growth = last["memory"] - first["memory"] - kept * (last["round"] - first["round"])
    return growth < 16 * 2**20 and last["files"] == first["files"] and last["checkpoints"] < 1.05 * first["checkpoints"]


def held_bytes(value: Any) -> int:
    """Memory of records, which stay by design: ``fit`` returns them."""
    inner: Iterator[Any] = iter(())
    if isinstance(value, dict):
        inner = (part for pair in value.items() for part in pair)
    elif isinstance(value, list):
        inner = iter(value)
    elif hasattr(value, "__dict__"):
        inner = iter([vars(value)])
    return sys.getsizeof(value) + sum(map(held_bytes, inner))


# -- cost ----------------------------------------------------------------------------------------------------------------


def cost(arguments: argparse.Namespace) -> bool:
    """Measure what a round of the Fashion-MNIST recipe spends on its history and checkpoint."""
    spent: list[float] = []

    def timed(function: Callable[..., None]) -> Callable[..., None]:
        def call(*given: Any) -> None:
            started = time.perf_counter()
            function(*given)
            spent.append(time.perf_counter() - started)

        return call

    overrides = [f"--loop.rounds={arguments.rounds}", "--loop.console=false"]
    with tempfile.TemporaryDirectory() as folder, quiet_output():
        run = FederatedRun(Recipe.read(find_recipe("feddip-fashion-mnist"), overrides), Path(folder))
        run.loop.folder.append = timed(run.loop.folder.append)  # type: ignore[method-assign]
        run.loop.folder.save = timed(run.loop.folder.save)  # type: ignore[method-assign]
        run.fit(resume=False)
        size = run.checkpoint.stat().st_size
    writing = [append + save for append, save in zip(spent[2::2], spent[3::2], strict=True)]  # without round 0
    training = [record.seconds for record in run.loop.history[1:]]
    share = sum(writing) / (sum(training) + sum(writing))
    head = ("rounds", "round, seconds", "history and checkpoint, ms", "share", "checkpoint, bytes")
    row = (
        str(len(training)),
        f"{statistics.median(training):.2f}",
        f"{1000 * statistics.median(writing):.1f}",
        f"{100 * share:.2f} %",
        f"{size:,}",
    )
    put(arguments, "cost", pages.table(head, [row]))
    return share <= 0.05


@contextmanager
def quiet_output() -> Iterator[None]:
    with Path(os.devnull).open("w") as file, redirect_stdout(file):
        yield


def put(arguments: argparse.Namespace, name: str, lines: list[str]) -> None:
    print(*lines, sep="\n", flush=True)
    if not arguments.print:
        pages.put(PAGE, name, lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    defaults = {kill: 6, rounds: 10_000, cost: 5}
    parsers = {}
    for command, default in defaults.items():
        parsers[command] = commands.add_parser(command.__name__, help=command.__doc__)
        parsers[command].set_defaults(command=command)
        parsers[command].add_argument("--rounds", type=int, default=default, help="default: %(default)s")
        parsers[command].add_argument("--print", action="store_true", help="leave the page as it is")
    parsers[kill].add_argument("--kills", type=int, default=200, help="at least so many; default: %(default)s")
    parsers[kill].add_argument("--only", default="", metavar="TEXT", help="recipes with this in their name")
    parsers[kill].add_argument("--seed", type=int, default=0, help="of the moments; default: %(default)s")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    return 0 if arguments.command(arguments) else 1


if __name__ == "__main__":
    sys.exit(main())
