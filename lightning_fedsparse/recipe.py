"""Recipes: experiments as YAML, read, checked and resolved through jsonargparse.

A recipe has the form that LightningCLI users know::

    seed_everything: 0                # seeds the model's weights, and the federation
    model: {class_path: ..., init_args: ...}
    data: {class_path: ..., init_args: ...}
    loop: {rounds: ..., clients_per_round: ..., callbacks: ..., trainer: {...}}

``loop`` takes the arguments of :class:`~lightning_fedsparse.FederatedLoop` (its seed is ``seed_everything``), ``trainer``
inside it those of the clients' ``Trainer``. A recipe without federation has ``trainer`` at the top level instead.

A recipe that differs little from another names that one as its ``base`` and says what is different: its keys override
those of the base, one by one.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_fedsparse.recipe_errors import explain, is_own_sentence, near_matches, raised_in

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

__all__ = ["Recipe", "RecipeError", "describe", "find_recipe", "recipe_files", "shipped_recipes"]

RECIPE_NAME = "recipe.yaml"


class RecipeError(ValueError):
    """A recipe that does not exist or does not say what it must: one sentence that names the key."""


def shipped_recipes() -> dict[str, Path]:
    """Name and file of every recipe in the package, by name."""
    files = Path(str(importlib.resources.files("lightning_fedsparse.recipes"))).glob("*.yaml")
    return {file.stem: file for file in sorted(files, key=lambda file: file.stem)}


def find_recipe(name: str) -> Path:
    """Return the file of a recipe: a shipped one by its name, or a file by its path.

    Raises:
        RecipeError: If it is neither; names the shipped recipes that are near.
    """
    shipped = shipped_recipes()
    if name in shipped:
        return shipped[name]
    path = Path(name)
    if path.is_file():
        return path
    what = "recipe file" if path.suffix in (".yaml", ".yml") else "recipe"
    hint = near_matches(path.stem, shipped) or "fedsparse list shows the shipped recipes"
    raise RecipeError(f"unknown {what} {name!r}: {hint}")


def recipe_files(path: Path) -> list[Path]:
    """The files that a recipe consists of: its base, if it has one, and then its own.

    Raises:
        RecipeError: If the base does not exist, or has a base itself: a reader should look in two places at most.
    """
    name = _content(path).get("base")
    if name is None:
        return [path]
    beside = path.parent / str(name)
    try:
        base = beside if beside.is_file() else find_recipe(str(name))
    except RecipeError as error:
        raise RecipeError(f"expected the base of {path} to be a recipe: {error}") from error
    if "base" in _content(base):
        raise RecipeError(f"expected a base without a base of its own in {path}, got {name!r}")
    return [base, path]


def describe(path: Path) -> str:
    """The first line of a recipe, if that is a comment: what the recipe is, in one line."""
    with path.open(encoding="utf-8") as file:
        first = file.readline()
    return first.lstrip("# ").strip() if first.startswith("#") else ""


@dataclass(frozen=True)
class Recipe:
    """A recipe whose keys, types and class paths are checked; nothing is built yet.

    Args:
        name: What run folders are called after.
        config: All arguments, defaults included.
        parser: The parser that made ``config``.
        section: ``"loop"`` (a federation) or ``"trainer"`` (a plain Trainer).
    """

    name: str
    config: Namespace
    parser: ArgumentParser
    section: str

    @classmethod
    def read(cls, path: Path, overrides: Sequence[str] = ()) -> Recipe:
        """Read a recipe and the overrides of a command line, such as ``--loop.rounds=50``.

        Raises:
            RecipeError: If something in them is unknown, missing or of the wrong type.
        """
        from jsonargparse import ArgumentError

        files = recipe_files(path)
        section = _section(files)
        parser = _loop_parser() if section == "loop" else _trainer_parser()
        try:
            config = parser.parse_args([*(f"--config={file}" for file in files), *overrides])
        except ArgumentError as error:
            known = [key for key in vars(parser.get_defaults().as_flat()) if key != "config"]
            raise RecipeError(explain(str(error), known)) from error
        if config["base"] != _content(path).get("base"):
            raise RecipeError(f"expected the base of a recipe in its file, got {config['base']!r} on the command line")
        del config["config"], config["base"]
        name = path.stem if path.name != RECIPE_NAME else path.resolve().parent.name
        return cls(name, config, parser, section)

    @property
    def folder(self) -> Path | None:
        """The run folder that the recipe asks for, if it does."""
        folder = self.config[self.section]["default_root_dir"]
        return None if folder is None else Path(folder)

    @property
    def resolved(self) -> str:
        """The recipe with every argument spelled out, as YAML that runs again.

        The run folder is left out, for the next run has another. So are the Trainer's arguments at their defaults:
        those belong to the installed Lightning.
        """
        config = self.config.clone()
        config[self.section]["default_root_dir"] = None
        trainer = "loop.trainer" if self.section == "loop" else "trainer"
        given = _given_trainer_arguments(self.parser, config, trainer)
        for name in list(config[trainer].keys()):
            if name.split(".")[0] not in given and name in config[trainer]:
                del config[trainer][name]
        text = self.parser.dump(config, skip_unset=False, skip_validation=True)
        return f"# {self.name}, as it ran: every argument spelled out\n{text}"

    def build(self) -> dict[str, Any]:
        """Build the model, the data and the arguments of the loop or the Trainer, after seeding the global generators.

        Returns:
            ``model``, ``data``, and under the section's name its keyword arguments with all objects built; those of a
            Trainer without the ones that are at their defaults.

        Raises:
            RecipeError: If a value is out of range.
        """
        import lightning.pytorch as pl

        pl.seed_everything(self.config["seed_everything"], verbose=False)
        try:
            built = self.parser.instantiate(self.config)
        except ValueError as error:
            raise _of_constructor(error) from error
        trainer = "loop.trainer" if self.section == "loop" else "trainer"
        arguments = {name: built[trainer][name] for name in _given_trainer_arguments(self.parser, self.config, trainer)}
        section = arguments
        if self.section == "loop":
            section = {name: built["loop"][name] for name in vars(built["loop"]) if name != "trainer"}
            section |= {"trainer": arguments, "seed": self.config["seed_everything"]}
        return {"model": built["model"], "data": built["data"], self.section: section}


def _of_constructor(error: ValueError) -> BaseException:
    """What a constructor raised, which jsonargparse wraps in the union of its argument's types."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    if raised_in(cause, "jsonargparse"):
        # the first branch of the union failed otherwise, and the text alone is left of what the constructor said
        return RecipeError(explain(str(error), []))
    return RecipeError(str(cause)) if is_own_sentence(cause) else cause


def _content(path: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark is not None else ""
        raise RecipeError(
            f"expected YAML in {path}, got a syntax error{line}: {getattr(error, 'problem', error)}"
        ) from error
    return content if isinstance(content, dict) else {}


def _section(files: Sequence[Path]) -> str:
    keys = set().union(*map(_content, files))
    sections = keys & {"loop", "trainer"}
    if len(sections) != 1:
        found = ", ".join(sorted(map(str, keys))) or "no keys"
        raise RecipeError(
            f"expected either a loop (a federation) or a trainer (none) at the top level of {files[-1]}, found {found}"
        )
    return "loop" if "loop" in sections else "trainer"


def _loop_parser() -> ArgumentParser:
    from lightning_fedsparse.data import FederatedDataModule
    from lightning_fedsparse.loop import FederatedLoop

    parser = _parser(FederatedDataModule)
    parser.add_class_arguments(FederatedLoop, "loop", instantiate=False, skip={"trainer", "seed"})
    _add_trainer(parser, "loop.trainer")
    return parser


def _trainer_parser() -> ArgumentParser:
    from lightning.pytorch import LightningDataModule

    parser = _parser(LightningDataModule)
    _add_trainer(parser, "trainer")
    return parser


def _parser(data: type) -> ArgumentParser:
    from jsonargparse import ArgumentParser
    from lightning.pytorch import LightningModule

    parser = ArgumentParser(prog="fedsparse run RECIPE", exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file whose keys override those before it")
    parser.add_argument("--base", type=str | None, help="recipe whose keys those of this file override; in files only")
    parser.add_argument("--seed_everything", type=int, default=0, help="seed of the model's weights and the federation")
    parser.add_subclass_arguments(LightningModule, "model", required=True)
    parser.add_subclass_arguments(data, "data", required=True)
    return parser


def _add_trainer(parser: ArgumentParser, key: str) -> None:
    from lightning.pytorch import Callback, Trainer

    from lightning_fedsparse.callbacks.base import CallbackList

    parser.add_class_arguments(Trainer, key, instantiate=False, skip={"callbacks"})
    # so that trainer.callbacks takes a composition such as feddip() by one path, as loop.callbacks does
    parser.add_argument(f"--{key}.callbacks", type=CallbackList | list[Callback] | None, help="Lightning callbacks")


def _given_trainer_arguments(parser: ArgumentParser, config: Namespace, key: str) -> list[str]:
    """Names of the Trainer's arguments that differ from their defaults."""
    defaults = parser.get_defaults()[key]
    return [name for name, value in vars(config[key]).items() if value != defaults.get(name)]
