r"""One sparsity for the whole model -> one sparsity per layer.

*Uniform* gives every layer the model's sparsity. *ERK* (Erdos-Renyi-Kernel) gives small layers a higher density: with
:math:`D = 1 - s` and layers of shape :math:`(a_1, ..., a_d)` and size :math:`N_l = \prod a_i`,

.. math:: density_l = \epsilon \left(\frac{\sum_i a_i}{\prod_i a_i}\right)^{power},
          \qquad \sum_l density_l N_l = D \sum_l N_l,

where layers that would come out above 1 are kept dense and :math:`\epsilon` is solved again over the others.

References: D. C. Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity
inspired by network science", Nature Communications 9, 2018, https://doi.org/10.1038/s41467-018-04316-3 (Erdos-Renyi);
U. Evci, T. Gale, J. Menick, P. S. Castro, E. Elsen, "Rigging the Lottery: Making All Tickets Winners", ICML 2020,
https://arxiv.org/abs/1911.11134 (kernel dimensions in the sum).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

__all__ = ["erk_sparsities", "uniform_sparsities"]


def erk_sparsities(shapes: Mapping[str, Sequence[int]], sparsity: float, power: float = 1.0) -> dict[str, float]:
    """Erdos-Renyi-Kernel sparsities: the weights kept over all layers add up to the model's density.

    Args:
        shapes: Shape of each layer by name, kernel dimensions included.
        sparsity: Fraction of zeros over all layers together, in [0, 1).
        power: Exponent, at least 0: 0 is uniform, 1 is the usual ERK.

    Returns:
        For every name a fraction of zeros in [0, 1]; 0.0 for a layer that is kept dense.

    Raises:
        ValueError: A sparsity outside [0, 1), a power that is negative or not finite, or a shape without entries.

    Example:
        >>> erk_sparsities({"small": (2, 2), "large": (10, 10)}, 0.5)  # small: dense; large: (52 - 4) / 100
        {'small': 0.0, 'large': 0.52}
    """
    _require(shapes, sparsity)
    if not 0 <= power < math.inf:
        raise ValueError(f"expected a finite ERK power of at least 0, got {power}")
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    ratios = {name: sum(shape) / sizes[name] for name, shape in shapes.items()}
    total = (1 - sparsity) * sum(sizes.values())

    dense: set[str] = set()
    # ends at the latest when every layer is dense, which is what a sparsity of 0 asks for
    while rest := [name for name in shapes if name not in dense]:
        densest = max(ratios[name] for name in rest)
        # relative to the densest layer, so that a large power cannot underflow to a division by 0
        raw = {name: (ratios[name] / densest) ** power for name in rest}
        budget = total - sum(sizes[name] for name in dense)
        density = budget / sum(raw[name] * sizes[name] for name in rest)  # of the densest layer
        if density <= 1:
            return {name: 0.0 if name in dense else 1 - density * raw[name] for name in shapes}
        dense.update(name for name in rest if ratios[name] == densest)
    return dict.fromkeys(shapes, 0.0)


def uniform_sparsities(shapes: Mapping[str, Sequence[int]], sparsity: float) -> dict[str, float]:
    """The same sparsity for every layer.

    Args:
        shapes: Shape of each layer by name.
        sparsity: Fraction of zeros in [0, 1).

    Raises:
        ValueError: A sparsity outside [0, 1), or a shape without entries.

    Example:
        >>> uniform_sparsities({"conv": (6, 1, 5, 5), "fc": (10, 84)}, 0.9)
        {'conv': 0.9, 'fc': 0.9}
    """
    _require(shapes, sparsity)
    return dict.fromkeys(shapes, float(sparsity))


def _require(shapes: Mapping[str, Sequence[int]], sparsity: float) -> None:
    if not 0 <= sparsity < 1:
        raise ValueError(f"expected a sparsity in [0, 1) to distribute over the layers, got {sparsity}")
    for name, shape in shapes.items():
        if not shape or min(shape) < 1:
            raise ValueError(f"expected a shape of one or more positive dimensions, got {tuple(shape)} for {name!r}")
