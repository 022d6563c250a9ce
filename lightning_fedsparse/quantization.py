r"""Rounding values to fewer bits without bias: stochastic rounding to short floats and to small integers.

A value between two representable neighbours :math:`a < x < b` becomes :math:`b` with probability
:math:`(x - a) / (b - a)`, so that its mean is :math:`x`: changes much smaller than the spacing of the numbers survive in
the mean over clients and rounds, where rounding to the nearest would lose every one of them. Integers
:math:`q \in [-L, L]` stand for :math:`q s`, with a scale :math:`s` per block of values that takes the block's largest
magnitude to :math:`L`: 127 for int8, 7 for int4.

D. Alistarh, D. Grubic, J. Li, R. Tomioka, M. Vojnovic, "QSGD: Communication-Efficient SGD via Gradient Quantization and
Encoding", NeurIPS 2017, https://arxiv.org/abs/1610.02132, with the largest magnitude of a block as its norm (section 4
there, "bucketing").
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["LEVELS", "dequantize", "quantize", "round_to_dtype"]

LEVELS = {4: 7, 8: 127}  # bits -> largest integer; symmetric, so that the lowest code is unused


def quantize(values: Tensor, *, bits: int, block: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Round to integers, each block of values by a scale of its own.

    Args:
        values: 1-D float32.
        bits: 4 or 8.
        block: Values that share a scale, at least 1; the last block may be shorter.
        generator: Source of the rounding.

    Returns:
        Codes, int8, as many as values; scales, float32, one per block. A value that is not finite makes the scale of
        its block so.

    Example:
        >>> codes, scales = quantize(torch.tensor([0.0, 127.0, -2.0]), bits=8, block=3, generator=torch.Generator())
        >>> codes.tolist(), scales.tolist()
        ([0, 127, -2], [1.0])
    """
    levels = LEVELS[bits]
    blocks = F.pad(values, (0, -len(values) % block)).view(-1, block)
    largest = blocks.abs().amax(1) if blocks.numel() else blocks.new_empty(0)
    scales = largest / levels
    # never too small for the largest value, which subnormal scales would be by much, nor beyond what can be undone
    scales = torch.where(scales * levels < largest, scales.nextafter(scales.new_tensor(torch.inf)), scales)
    scales = torch.where((scales * levels).isinf() & largest.isfinite(), scales.nextafter(scales.new_zeros(())), scales)
    exact = (blocks / torch.where(scales == 0, 1, scales).unsqueeze(1)).view(-1)[: len(values)]
    codes = exact.floor()
    codes += torch.rand(len(values), generator=generator) < exact - codes
    return codes.clamp_(-levels, levels).to(torch.int8), scales


def dequantize(codes: Tensor, scales: Tensor, *, block: int) -> Tensor:
    """The float32 values that codes and scales stand for."""
    padded = F.pad(codes.to(torch.float32), (0, -len(codes) % block)).view(-1, block)
    return (padded * scales.unsqueeze(1)).view(-1)[: len(codes)]


def round_to_dtype(values: Tensor, dtype: torch.dtype, *, generator: torch.Generator) -> Tensor:
    """Round to one of the two neighbours in a 16-bit float type; beyond its range, to its largest number.

    Args:
        values: 1-D float32.
        dtype: ``torch.bfloat16`` or ``torch.float16``.
        generator: Source of the rounding.

    Returns:
        A tensor of ``dtype``; what is not finite stays so.
    """
    magnitude = values.abs()
    nearest = magnitude.to(dtype)
    # the bits of a float without sign, as an integer, count its representable numbers
    below = nearest.view(torch.int16) - (nearest.to(torch.float32) > magnitude).to(torch.int16)
    low = below.view(dtype).to(torch.float32)
    high = (below + 1).view(dtype).to(torch.float32)
    up = torch.rand(len(values), generator=generator) < (magnitude - low) / (high - low)
    rounded = (below + up).view(dtype)
    return torch.where(values.signbit(), -rounded, rounded)
