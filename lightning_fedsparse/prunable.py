"""Which parameters of a module can be sparse.

By default the ``weight`` of every convolution, transposed convolution and linear layer; never biases, normalisation
layers or embeddings. Name globs select other parameters (the weights of an LSTM) or exempt some (the first layer).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.parameter import is_lazy

__all__ = ["PRUNABLE_LAYERS", "prunable_parameters"]

PRUNABLE_LAYERS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
)
"""Layers whose ``weight`` can be sparse by default."""


def prunable_parameters(
    module: nn.Module, include: Sequence[str] = (), *, exclude: Sequence[str] = (), first_layer: bool = True
) -> dict[str, nn.Parameter]:
    """Select the parameters that a sparsity applies to.

    Args:
        module: Any module, such as a ``LightningModule``.
        include: Name globs (case-sensitive, ``*`` also crosses dots), each matched against full parameter names. If
            given, they replace the default selection, and any floating-point parameter can be selected.
        exclude: Name globs of parameters to leave out of the selection.
        first_layer: Whether the first of the selected stays, as the module orders them.

    Returns:
        Parameters by the name that ``named_parameters()`` gives them, in its order; a tied parameter once.

    Raises:
        ValueError: A glob that matches no parameter, nothing selected, or a lazy parameter without a shape yet.
        TypeError: Globs given as one string.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 6, 5), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(6, 10))
        >>> list(prunable_parameters(net)), list(prunable_parameters(net, exclude=["0.*"]))
        (['0.weight', '3.weight'], ['3.weight'])
    """
    floating = {name: p for name, p in module.named_parameters() if is_lazy(p) or p.is_floating_point()}
    exempt = _matching("exclude", exclude, floating)
    if include:
        chosen = _matching("include", include, floating)
    else:
        layers = (child for child in module.modules() if isinstance(child, PRUNABLE_LAYERS))
        # by identity, because a tied weight has one name here and several owners; a parametrized one has none
        weights = {id(p) for layer in layers for name, p in layer.named_parameters(recurse=False) if name == "weight"}
        chosen = {name for name, p in floating.items() if id(p) in weights}
    selected = {name: p for name, p in floating.items() if name in chosen and name not in exempt}
    if not first_layer:
        selected = dict(list(selected.items())[1:])
    if not selected:
        raise ValueError(
            f"expected a model with something to prune, got {type(module).__name__} without a prunable parameter: "
            "select parameters with include, or exclude fewer"
        )
    for name, parameter in selected.items():
        if is_lazy(parameter):
            raise ValueError(
                f"expected initialized parameters to prune, got the lazy {name!r} in {type(module).__name__}: "
                "run one batch through the model first"
            )
    return selected


def _matching(argument: str, globs: Sequence[str], names: Iterable[str]) -> set[str]:
    """Names that at least one of the globs matches; each glob must match one."""
    if isinstance(globs, str):
        raise TypeError(f"expected {argument} to be a list of name globs, got the string {globs!r}")
    names = list(names)
    matched: set[str] = set()
    for glob in globs:
        hits = [name for name in names if fnmatchcase(name, glob)]
        if not hits:
            near = difflib.get_close_matches(glob, names, n=3, cutoff=0)
            raise ValueError(f"expected {argument} globs that match parameters, got {glob!r}: the nearest are {near}")
        matched.update(hits)
    return matched
