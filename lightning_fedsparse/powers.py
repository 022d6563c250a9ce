r"""Powers of weights that keep their sign: the arithmetic of Powerpropagation.

.. math:: \theta = \mathrm{sign}(w)\,|w|^\beta, \qquad
   \frac{\partial L}{\partial w} = \beta\,|w|^{\beta-1}\,\frac{\partial L}{\partial \theta}, \qquad
   w = \mathrm{sign}(u)\,|u|^{1/\beta} \;\Rightarrow\; \theta(w) = u

The gradient is exactly 0 where ``w`` is 0 and ``beta`` above 1, so a zero stays zero.

References: J. Schwarz, S. M. Jayakumar, R. Pascanu, P. E. Latham, Y. W. Teh, "Powerpropagation: A sparsity inducing
weight reparameterisation", NeurIPS 2021, https://arxiv.org/abs/2110.00296; the spectral exponents are those of the code
released with "SparsyFed", ICLR 2025, https://arxiv.org/abs/2504.05153, with a spectral norm that has converged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

__all__ = ["power", "power_gradient_", "root_", "spectral_exponents", "truncated_normal_"]

# the standard deviation of a standard normal cut at two deviations
_CUT_DEVIATION = 0.87962566103423978
_LEAST_NORM = 1e-12


@torch.no_grad()
def power(
    weights: Mapping[str, Tensor],
    exponents: Mapping[str, float],
    out: Mapping[str, Tensor],
    slopes: dict[str, Tensor] | None = None,
) -> None:
    """Write ``sign(w) * |w|**beta``.

    Args:
        weights: Floating-point tensors by name.
        exponents: For each of these names a ``beta`` of at least 1.
        out: Where to, by the same names; may be the weights themselves.
        slopes: Gets ``|w|**(beta - 1)`` by name, for :func:`power_gradient_`; tensors that it holds are written over.

    Example:
        >>> weights = {"w": torch.tensor([0.5, -0.5, 0.0])}
        >>> power(weights, {"w": 2.0}, weights)
        >>> weights["w"]
        tensor([ 0.2500, -0.2500,  0.0000])
    """
    slopes = {} if slopes is None else slopes
    for name, weight in weights.items():
        slopes[name] = slope = torch.abs(weight, out=slopes.get(name))
        if exponents[name] == 1.25:
            # for the exponent that nearly everybody takes: a third of the time of a power, and a fifteenth of that of two
            # square roots, which are slow at zeros; 0 stays 0 by way of infinity
            slope.rsqrt_().rsqrt_()
        else:
            slope.pow_(exponents[name] - 1)
        torch.mul(weight, slope, out=out[name])


@torch.no_grad()
def power_gradient_(
    gradients: Mapping[str, Tensor], slopes: Mapping[str, Tensor], exponents: Mapping[str, float]
) -> None:
    """Turn gradients at ``sign(w) * |w|**beta`` into gradients at ``w``, in place.

    Args:
        gradients: Gradients by name.
        slopes: What :func:`power` gave for the ``w`` of these names.
        exponents: For each of these names a ``beta`` of at least 1.
    """
    if gradients:
        torch._foreach_mul_(list(gradients.values()), [slopes[name] for name in gradients])
        torch._foreach_mul_(list(gradients.values()), [exponents[name] for name in gradients])


@torch.no_grad()
def root_(weights: Mapping[str, Tensor], exponents: Mapping[str, float]) -> None:
    """Undo :func:`power` in place: afterwards ``power`` gives what the weights were, to rounding.

    Args:
        weights: Floating-point tensors by name.
        exponents: For each of these names a ``beta`` of at least 1.
    """
    for name, weight in weights.items():
        if exponents[name] != 1:
            weight.copy_(weight.abs().pow_(1 / exponents[name]).copysign_(weight))


@torch.no_grad()
def spectral_exponents(weights: Mapping[str, Tensor], scope: Literal["layer", "global"]) -> dict[str, float]:
    r"""Exponents that follow from the weights: ``1 + mean(|W| / sigma)`` with ``sigma`` the spectral norm of ``|W|``.

    Args:
        weights: Weights by name, each read as a matrix of its first dimension by all others.
        scope: ``"layer"``: one exponent per weight, the mean over all entries, rounded to 8 decimals; ``"global"``: the
            plain average of one value per weight, the mean over non-zero entries, rounded to 4 decimals.

    Returns:
        An exponent in [1, 2] for every name; 1 for a weight of zeros only, or with a NaN.
    """
    own = {}
    for name, weight in weights.items():
        matrix = weight.detach().double().abs().reshape(weight.shape[0], -1)
        nonzero = int(matrix.count_nonzero())
        count = matrix.numel() if scope == "layer" else nonzero
        share = float(matrix.sum()) / (max(_spectral_norm(matrix), _LEAST_NORM) * count) if nonzero else 0.0
        own[name] = 1.0 if math.isnan(share) else round(1 + share, 8 if scope == "layer" else 4)
    if scope == "layer":
        return own
    return dict.fromkeys(own, sum(own.values()) / len(own))


@torch.no_grad()
def truncated_normal_(weight: Tensor, generator: torch.Generator) -> None:
    """Draw a weight from a normal of variance ``1 / fan_in`` that is cut at two standard deviations, in place.

    Args:
        weight: Weight of a layer, of shape (out, in, ...), on the generator's device.
        generator: Source of the values.
    """
    deviation = math.sqrt(1 / weight[0].numel()) / _CUT_DEVIATION
    torch.nn.init.trunc_normal_(weight, std=deviation, a=-2 * deviation, b=2 * deviation, generator=generator)


def _spectral_norm(matrix: Tensor) -> float:
    # from the smaller Gram matrix, a tenth of the time of a singular value decomposition; the largest singular value
    # loses no precision by it
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    return math.sqrt(float(torch.linalg.eigvalsh(gram)[-1]))
