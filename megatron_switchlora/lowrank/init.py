"""Initial values of the factors (SwitchLoRA, eq. 14-18; eq. 3 and 18 as printed are wrong).

With W (m = out, n = in), rank r, gain = sqrt(1/3) and s = 1/r:
    std[A] = (r sqrt(m) / (n sqrt(n)))^(1/4) gain^(1/2)
    std[B] = (r / sqrt(m n))^(1/4) gain^(1/2)
drawn uniform on +-sqrt(3) std, so that unit-variance x gives std(s B A x) = gain. m and n are the
full sizes, unsharded and unpadded. The classic initialisation is A kaiming uniform (a = sqrt 5) and B zero.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

GAIN = math.sqrt(1 / 3)
Side = Literal["A", "B"]


def factor_std(side: Side, kind: str, out_features: int, in_features: int, rank: int) -> float:
    """Standard deviation of the entries of A or B; kind is "classic", or anything else for SwitchLoRA's (whose
    candidates are drawn so beside LoRA-GA's live vectors too)."""
    m, n, r = out_features, in_features, rank
    if kind == "classic":
        return 1 / math.sqrt(3 * n) if side == "A" else 0.0
    if side == "A":
        return (r * math.sqrt(m) / (n * math.sqrt(n))) ** 0.25 * math.sqrt(GAIN)
    return (r / math.sqrt(m * n)) ** 0.25 * math.sqrt(GAIN)


def draw_vectors(count: int, length: int, std: float, generator: torch.Generator) -> Tensor:
    """`count` vectors of `length` [count, length], uniform with deviation `std`, fp32 on the CPU."""
    bound = math.sqrt(3) * std
    return torch.empty(count, length).uniform_(-bound, bound, generator=generator)
