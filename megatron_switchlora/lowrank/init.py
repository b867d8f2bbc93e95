"""Initial values of the factors (SwitchLoRA, eq. 14-18; eq. 3 and 18 as printed are wrong).

With W (m = out, n = in), rank r, gain = sqrt(1/3) and s = 1/r:
    std[A] = (r sqrt(m) / (n sqrt(n)))^(1/4) gain^(1/2)
    std[B] = (r / sqrt(m n))^(1/4) gain^(1/2)
drawn uniform on +-sqrt(3) std, so that unit-variance x gives std(s B A x) = gain. m and n are the
full sizes, unsharded and unpadded. The classic initialisation is A kaiming uniform (a = sqrt 5) and B zero;
LTE's is A semi-orthogonal and B zero (arXiv 2402.16828, section 4). PiSSA (arXiv 2404.02948, eq. 2-4) takes
the factors from W = U S V^T itself, so that s B A is its best approximation of rank r and what stays frozen
is the rest.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

GAIN = math.sqrt(1 / 3)
Side = Literal["A", "B"]


def factor_std(side: Side, kind: str, out_features: int, in_features: int, rank: int) -> float:
    """Standard deviation of the entries of A or B where they are drawn uniform: B is zero but with "switchlora", or
    with "lora_ga" for the candidates beside its live vectors; with "pissa" neither is drawn (`principal_factors`)."""
    m, n, r = out_features, in_features, rank
    if kind == "pissa":
        return 0.0
    if kind not in ("switchlora", "lora_ga"):
        return 1 / math.sqrt(3 * n) if side == "A" else 0.0
    if side == "A":
        return (r * math.sqrt(m) / (n * math.sqrt(n))) ** 0.25 * math.sqrt(GAIN)
    return (r / math.sqrt(m * n)) ** 0.25 * math.sqrt(GAIN)


def draw_vectors(count: int, length: int, std: float, generator: torch.Generator) -> Tensor:
    """`count` vectors of `length` [count, length], uniform with deviation `std`, fp32 on the CPU."""
    bound = math.sqrt(3) * std
    return torch.empty(count, length).uniform_(-bound, bound, generator=generator)


def draw_orthogonal(rank: int, length: int, scale: str, generator: torch.Generator) -> Tensor:
    """Orthogonal rows [rank, length] of norm sqrt(length / rank), as LTE's code has it ("sqrt_n_r"), or of norm
    sqrt(rank / length), as its paper has it ("sqrt_r_n"); fp32 on the CPU."""
    ratio = length / rank if scale == "sqrt_n_r" else rank / length
    rows = torch.empty(rank, length)
    return torch.nn.init.orthogonal_(rows, gain=math.sqrt(ratio), generator=generator)


def principal_factors(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """PiSSA's A = sqrt(S / s) V^T [rank, in] and B^T = sqrt(S / s) U^T [rank, out] of the `rank` largest singular
    values of the whole W [out, in], exact. Signs: the entry of largest magnitude of each v is positive."""
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    U, S, Vh = U[:, :rank], S[:rank], Vh[:rank]
    signs = Vh.gather(1, Vh.abs().argmax(1, keepdim=True)).sign()
    roots = (S / scaling).sqrt()[:, None] * signs
    return roots * Vh, roots * U.t()
