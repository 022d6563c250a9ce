"""From a run folder to a model that serves: in Python, or as a file that needs nothing of this package.

What leaves is the effective global model: the weights that forward uses, cut and raised to their powers for good (see
:mod:`lightning_fedsparse.folding`), in a plain module without any callback. For methods that know submodels, a ``capacity``
gives the one that a client of that capacity holds.

==============  ==========  =============================================================================================
format          file        read by
==============  ==========  =============================================================================================
safetensors     dense       ``load_state_dict(safetensors.torch.load_file(path))``
safetensors     sparse      ``load_state_dict(read_weights(path))`` (see :mod:`lightning_fedsparse.weight_files`)
checkpoint      dense       ``load_state_dict(torch.load(path)["state_dict"])``, Lightning's ``load_from_checkpoint``
onnx-ready      program     ``torch.export.load(path).module()``, without the model's code; ``torch.onnx.export`` takes it
==============  ==========  =============================================================================================
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, overload

import lightning
import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.export import Dim

from lightning_fedsparse.callbacks.base import SparsityCallback
from lightning_fedsparse.capacities import require_capacity
from lightning_fedsparse.checkpoint import load_checkpoint
from lightning_fedsparse.data import FederatedDataModule
from lightning_fedsparse.durable import replace_file
from lightning_fedsparse.federation import Federation
from lightning_fedsparse.folding import load_folded
from lightning_fedsparse.loop import FederatedLoop
from lightning_fedsparse.recipe import RECIPE_NAME, Recipe
from lightning_fedsparse.run_folder import RunFolder
from lightning_fedsparse.server import ServerOptimizer, ServerState
from lightning_fedsparse.weight_files import encode_weights

__all__ = ["Format", "export_run", "load_global"]

Format = Literal["safetensors", "checkpoint", "onnx-ready"]
Module = TypeVar("Module", bound=nn.Module)

_SUFFIXES = {"safetensors": ".safetensors", "checkpoint": ".ckpt", "onnx-ready": ".pt2"}


@overload
def load_global(run: str | Path, *, capacity: float | None = None) -> pl.LightningModule: ...
@overload
def load_global(run: str | Path, module: Module, *, capacity: float | None = None) -> Module: ...
def load_global(run: str | Path, module: nn.Module | None = None, *, capacity: float | None = None) -> nn.Module:
    """Load the effective global model of a run.

    Args:
        run: A run folder, whose last checkpoint is taken, or one of its checkpoints.
        module: Where to write the weights; None builds the model of the run's recipe.
        capacity: Load the submodel that a client of this capacity holds, with the global model's buffers; needs the recipe.

    Returns:
        The module, in evaluation mode.

    Raises:
        ValueError: If there is no such run, checkpoint or recipe, or the checkpoint can't be read or is of another model.
    """
    if capacity is not None:
        require_capacity(capacity, "of the submodel")
    folder = _RunFiles.of(Path(run))
    recipe = folder.build() if module is None or capacity is not None else {}
    target = recipe["model"] if module is None else module
    return _load(folder, recipe, target, capacity)


def export_run(
    run: str | Path,
    output: str | Path | None = None,
    *,
    format: Format = "safetensors",
    sparse: bool = False,
    capacity: float | None = None,
    module: str = "",
    overwrite: bool = False,
) -> Path:
    """Write the effective global model of a run with a recipe into a file.

    Args:
        run: A run folder, whose last checkpoint is taken, or one of its checkpoints.
        output: The file; ``model`` with the format's suffix in the run folder if None.
        format: One of those above. An ``"onnx-ready"`` program takes batches of any size; it is traced with the module's
            ``example_input_array`` or, without one, the first training batch.
        sparse: Masks and values instead of dense tensors, in safetensors only.
        capacity: The submodel that a client of this capacity holds, instead of the whole model.
        module: Name of the submodule to export, such as ``"network"``; the whole LightningModule if empty.
        overwrite: Whether a file that is there may be replaced.

    Returns:
        The file, written beside its place and renamed.

    Raises:
        ValueError: Besides what :func:`load_global` raises, for an unknown format or submodule, a file that is there, a sparse
            file in another format, state that is no tensor, or a model that can't be traced.
        OSError: If the file can't be written; one that was there is as it was.
    """
    if format not in get_args(Format):
        raise ValueError(f"expected a format of {', '.join(get_args(Format))}, got {format!r}")
    if sparse and format != "safetensors":
        raise ValueError(f"expected sparse files in format safetensors only, got {format}")
    if capacity is not None:
        require_capacity(capacity, "of the submodel")
    folder = _RunFiles.of(Path(run))
    name = "-".join(["model", *([f"{capacity:g}"] if capacity else []), *(["sparse"] if sparse else [])])
    path = folder.path / f"{name}{_SUFFIXES[format]}" if output is None else Path(output)
    if path.is_dir():
        raise ValueError(f"expected a file to write, got the folder {path}")
    if path.exists() and not overwrite:
        raise ValueError(f"expected a new file, found {path}: overwrite it with --overwrite (in Python overwrite=True)")
    built = folder.build()
    whole = _load(folder, built, built["model"], capacity)
    part = _submodule(whole, module)
    if format == "onnx-ready":
        content = _program(whole, part, built["data"])
    else:
        tensors = _tensors(part)
        content = encode_weights(tensors, sparse=sparse) if format == "safetensors" else _checkpoint(tensors)
    replace_file(path, lambda file: file.write(content))
    return path


@dataclass(frozen=True)
class _RunFiles:
    """A run's folder and the checkpoint to take."""

    path: Path
    checkpoint: Path

    @classmethod
    def of(cls, run: Path) -> _RunFiles:
        if run.is_file():
            return cls(run.parent.parent, run)
        if not run.is_dir():
            raise ValueError(f"expected a run folder or one of its checkpoints, found nothing at {run}")
        folder = RunFolder(run)
        if folder.saved is None:
            raise ValueError(f"expected a run with a checkpoint, found none at {folder.checkpoint}")
        return cls(run, folder.saved)

    @property
    def is_federation(self) -> bool:
        """Whether it is a run of ``FederatedLoop``, and not of a plain Trainer."""
        return (self.path / "history.jsonl").is_file()

    def build(self) -> dict[str, Any]:
        """What the recipe builds; the generators of the process stay as they are."""
        recipe = self.path / RECIPE_NAME
        if not recipe.is_file():
            raise ValueError(
                f"expected a {RECIPE_NAME} to build the model from, found none in {self.path}: a run that Python started "
                "has none, there load_global(run, module) fills a module"
            )
        with isolate_rng():
            return Recipe.read(recipe).build()


def _load(folder: _RunFiles, built: Mapping[str, Any], module: Module, capacity: float | None) -> Module:
    if not folder.is_federation:
        if capacity is not None:
            raise ValueError(f"expected a federation for a submodel of capacity {capacity}, got a plain Trainer's run")
        load_folded(folder.checkpoint, module)
    elif capacity is None:
        load_folded(load_checkpoint(folder.checkpoint), module)
    else:
        _load_submodel(load_checkpoint(folder.checkpoint), built["loop"], module, capacity)
    return module.eval()


def _load_submodel(saved: dict[str, Any], arguments: Mapping[str, Any], module: nn.Module, capacity: float) -> None:
    """What ``FederatedLoop.load_submodel`` writes, but for statistics that it would measure: the clients' data are not here."""
    loop = FederatedLoop(**{**arguments, "default_root_dir": None})
    methods = [callback for callback in loop.callbacks if isinstance(callback, SparsityCallback)]
    federation = Federation(ServerState.of(module), ServerOptimizer(), methods=methods)
    federation.start(module, loop.seed)  # type: ignore[arg-type]
    federation.load_state_dict({**saved, "memories": {}, "memory_files": {}})  # what clients remember is no part of it
    federation.state.load_into(module)
    for method in methods:
        method.to_effective_(dict(module.named_parameters()), capacity)


def _submodule(module: nn.Module, name: str) -> nn.Module:
    try:
        return module.get_submodule(name)
    except AttributeError as error:
        known = ", ".join(child for child, _ in module.named_children())
        raise ValueError(f"expected a submodule of {type(module).__name__}, which has {known}, got {name!r}") from error


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    state = module.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"expected tensors in the state of {type(module).__name__}, got {name!r}, which is none")
    return state


def _checkpoint(tensors: Mapping[str, Tensor]) -> bytes:
    # the version is what Lightning's load_from_checkpoint asks for
    content = {"state_dict": dict(tensors), "pytorch-lightning_version": lightning.__version__}
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


# -- the program -------------------------------------------------------------------------------------------------------


def _program(module: nn.Module, part: nn.Module, data: pl.LightningDataModule) -> bytes:
    """A submodule as torch.export's program, its weights included, with a batch of any size."""
    inputs = _inputs_of(part, module, _example(module, data))
    buffer = io.BytesIO()
    try:
        with torch.no_grad():
            program = torch.export.export(part, inputs, dynamic_shapes=tuple({0: Dim("batch")} for _ in inputs))
        torch.export.save(program, buffer)
    except Exception as error:
        # whatever torch.export raises: its own text says which operation it was
        raise ValueError(
            f"expected a model that torch.export can trace with batches of any size, {type(part).__name__} is none: {error}"
        ) from error
    return buffer.getvalue()


def _example(module: nn.Module, data: pl.LightningDataModule) -> tuple[Tensor, ...]:
    """What forward takes: at least two examples, because torch.export takes a batch of one for a constant."""
    example = getattr(module, "example_input_array", None)
    if example is None:
        if isinstance(data, FederatedDataModule):
            loader: Any = data.client(data.client_ids[0]).train_loader()
        else:
            data.prepare_data()
            data.setup("fit")
            loader = data.train_dataloader()
        batch = next(iter(loader))
        example = batch[0] if isinstance(batch, tuple | list) else batch
    inputs = example if isinstance(example, tuple) else (example,)
    if not all(isinstance(value, Tensor) for value in inputs):
        raise ValueError(
            f"expected tensors as an example of what {type(module).__name__} takes, got {type(example).__name__}: give it "
            "an example_input_array"
        )
    return tuple(torch.cat([value, value]) if len(value) == 1 else value for value in inputs)


def _inputs_of(part: nn.Module, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """What a submodule gets when the whole module gets ``inputs``."""
    seen: list[tuple[Any, ...]] = []
    handle = part.register_forward_pre_hook(lambda _, arguments: seen.append(arguments))
    with handle, torch.no_grad():
        module(*inputs)
    if not seen:
        raise ValueError(f"expected a submodule that forward uses, {type(part).__name__} is not used in it")
    return seen[0]
