"""The ``fedsparse`` command: run, resume, list and show recipes, export what was trained.

Exit codes: 0 done, 1 bad input that only the run could find, 2 a command line or recipe that is wrong, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_fedsparse.launching import environment_rank
from lightning_fedsparse.recipe import (
    RECIPE_NAME,
    Recipe,
    RecipeError,
    describe,
    find_recipe,
    recipe_files,
    shipped_recipes,
)
from lightning_fedsparse.recipe_errors import is_own_sentence

if TYPE_CHECKING:
    from lightning_fedsparse.runs import Run

__all__ = ["main"]

_SAVED = {
    RECIPE_NAME: "every argument of this run",
    "history.jsonl": "one line per round",
    "logs": "metrics per step",
    "checkpoints/last.ckpt": "the last checkpoint",
    "checkpoints/round=*.ckpt": "those of the best rounds",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    options = _parser().parse_args(arguments)
    try:
        code: int = options.command(options)
        sys.stdout.flush()
    except BrokenPipeError:
        # `fedsparse list | head`: the reader has seen enough; Python must not complain again when it flushes at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except RecipeError as error:
        return _fail(error, 2)
    except KeyboardInterrupt:
        return 130
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        if not is_own_sentence(error):
            raise
        return _fail(error, 1)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fedsparse", description="Sparse federated training for PyTorch Lightning.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    run = commands.add_parser("run", help="train a recipe", description="Train a recipe in a new run folder.")
    run.set_defaults(command=_run)
    run.add_argument("recipe", metavar="RECIPE", help="a shipped recipe's name (see list) or a YAML file")
    _add_overrides(run)

    resume = commands.add_parser("resume", help="go on with a run", description="Go on from a run's last checkpoint.")
    resume.set_defaults(command=_resume)
    resume.add_argument("folder", metavar="RUN", type=Path, help="the run folder")
    _add_overrides(resume)

    export = commands.add_parser(
        "export",
        help="write a run's model for serving",
        description="Write the effective global weights of a run into a file that needs nothing of this package.",
    )
    export.set_defaults(command=_export)
    export.add_argument("run", metavar="RUN", type=Path, help="the run folder, or one of its checkpoints")
    export.add_argument(
        "--format", default="safetensors", metavar="FORMAT", help="safetensors (default), checkpoint or onnx-ready"
    )
    export.add_argument("--output", metavar="PATH", type=Path, help="the file; model.* in the run folder by default")
    export.add_argument("--sparse", action="store_true", help="masks and values instead of dense tensors (safetensors)")
    export.add_argument(
        "--capacity", metavar="C", type=float, help="the submodel of a capacity in (0, 1] instead of the whole model"
    )
    export.add_argument("--module", metavar="NAME", default="", help="only this submodule, such as network")
    export.add_argument("--overwrite", action="store_true", help="replace a file that is there")

    lister = commands.add_parser("list", help="list the shipped recipes", description="List the shipped recipes.")
    lister.set_defaults(command=_list)

    show = commands.add_parser(
        "show", help="print a recipe", description="Print a recipe as it is written, and the one it is based on."
    )
    show.set_defaults(command=_show)
    show.add_argument("recipe", metavar="RECIPE", help="a shipped recipe's name or a YAML file")
    return parser


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "overrides",
        metavar="--KEY=VALUE",
        nargs=argparse.REMAINDER,
        help="any key of the recipe, such as --loop.rounds=50 or --loop.callbacks.sparsity=0.9; --help lists them",
    )


def _run(options: argparse.Namespace) -> int:
    recipe = _read(find_recipe(options.recipe), options.overrides)

    from lightning_fedsparse.runs import fresh_folder, make_run

    folder = fresh_folder(recipe)
    run = make_run(recipe, folder)
    _fit(run, resume=False)
    return 0


def _resume(options: argparse.Namespace) -> int:
    path = options.folder / RECIPE_NAME
    if not path.is_file():
        raise RecipeError(f"expected a run folder with a {RECIPE_NAME}, found none in {options.folder}")
    recipe = _read(path, options.overrides)

    from lightning_fedsparse.runs import make_run

    _fit(make_run(recipe, options.folder), resume=True)
    return 0


def _export(options: argparse.Namespace) -> int:
    _find_own_classes()

    from lightning_fedsparse.export import export_run

    path = export_run(
        options.run,
        options.output,
        format=options.format,
        sparse=options.sparse,
        capacity=options.capacity,
        module=options.module,
        overwrite=options.overwrite,
    )
    print(f"saved in {path}, {path.stat().st_size:,} bytes")
    return 0


def _list(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("recipe", no_wrap=True)
    table.add_column("what it is")
    for name, path in shipped_recipes().items():
        table.add_row(name, describe(path))
    Console(highlight=False).print(table)
    return 0


def _show(options: argparse.Namespace) -> int:
    # what differs comes first, the base that it differs from below
    files = reversed(recipe_files(find_recipe(options.recipe)))
    sys.stdout.write("\n".join(file.read_text(encoding="utf-8") for file in files))
    return 0


def _read(path: Path, overrides: Sequence[str]) -> Recipe:
    _find_own_classes()
    return Recipe.read(path, overrides)


def _find_own_classes() -> None:
    # a recipe names the user's own classes; at the end, so that no file here hides an installed module
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def _fit(run: Run, *, resume: bool) -> None:
    try:
        metrics = run.fit(resume=resume)
    except KeyboardInterrupt:
        if environment_rank() == 0 and run.checkpoint.is_file():
            print(f"go on with: fedsparse resume {run.folder}")
        raise
    if environment_rank():
        return  # the first rank says it for all
    for name, value in metrics.items():
        print(f"{name}  {value:.4f}")
    print(f"\nsaved in {run.folder}")
    width = max(map(len, _SAVED))
    for name, what in _SAVED.items():
        if any(run.folder.glob(name)):
            print(f"  {name:<{width}}  {what}")
    print("\nnext")
    print(f"  fedsparse export {run.folder}")
    print(f"  fedsparse resume {run.folder} {_more(run)}  # longer: every schedule stretches")
    print("  fedsparse list")


def _more(run: Run) -> str:
    """The override that makes a finished run longer."""
    if run.recipe.section == "loop":
        return f"--loop.rounds={2 * run.recipe.config['loop.rounds']}"
    return f"--trainer.max_epochs={2 * (run.recipe.config['trainer.max_epochs'] or 1)}"


def _fail(error: Exception, code: int) -> int:
    rank = environment_rank()
    print(f"error on rank {rank}: {error}" if rank else f"error: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
