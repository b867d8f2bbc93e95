"""Initial values of the factors (SwitchLoRA, eq. 14-18; eq. 3 and 18 as printed are wrong).

With W (m = out, n = in), rank r, gain = sqrt(1/3) and s = 1/r:

    std[A] = (r sqrt(m) / (n sqrt(n)))^(1/4) gain^(1/2)
    std[B] = (r / sqrt(m n))^(1/4) gain^(1/2)

Entries are uniform on +-sqrt(3) std, so that unit-variance x gives std(s B A x) = gain. m and n are the full sizes,
unsharded and unpadded.

    classic          A kaiming uniform (a = sqrt 5), B zero
    semi_orthogonal  A semi-orthogonal, B zero: LTE's (arXiv 2402.16828, section 4)
    pissa            both factors from W = U S V^T itself (PiSSA, arXiv 2404.02948, eq. 2-4): s B A is the best
                     approximation of rank r of W, and the rest stays frozen
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

GAIN = math.sqrt(1 / 3)
Side = Literal["A", "B"]


def factor_std(side: Side, kind: str, out_features: int, in_features: int, rank: int) -> float:
    """Return the standard deviation of the entries of A or B where they are drawn uniformly.

    B is zero except with "switchlora", and with "lora_ga" for the candidates beside its live vectors. With "pissa"
    neither factor is drawn; see `principal_factors`.
    """
    m, n, r = out_features, in_features, rank
    if kind == "pissa":
        return 0.0
    if kind not in ("switchlora", "lora_ga"):
        return 1 / math.sqrt(3 * n) if side == "A" else 0.0
    if side == "A":
        return (r * math.sqrt(m) / (n * math.sqrt(n))) ** 0.25 * math.sqrt(GAIN)
    return (r / math.sqrt(m * n)) ** 0.25 * math.sqrt(GAIN)


def draw_vectors(count: int, length: int, std: float, generator: torch.Generator) -> Tensor:
    """Draw `count` vectors [count, length], uniform with deviation `std`, in fp32 on the CPU."""
    bound, rows = math.sqrt(3) * std, torch.empty(count, length)
    return rows if rows.is_meta else rows.uniform_(-bound, bound, generator=generator)


def draw_orthogonal(rank: int, length: int, scale: str, generator: torch.Generator) -> Tensor:
    """Draw orthogonal rows [rank, length], in fp32 on the CPU.

    Their norm is sqrt(length / rank) with scale "sqrt_n_r", as in LTE's code, and sqrt(rank / length) with "sqrt_r_n",
    as in its paper.
    """
    ratio = length / rank if scale == "sqrt_n_r" else rank / length
    rows = torch.empty(rank, length)
    return rows if rows.is_meta else torch.nn.init.orthogonal_(rows, gain=math.sqrt(ratio), generator=generator)


def principal_factors(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Return PiSSA's A = sqrt(S / s) V^T [rank, in] and B^T = sqrt(S / s) U^T [rank, out].

    They belong to the `rank` largest singular values of the whole W [out, in], computed exactly. The entry of largest
    magnitude of each v is positive.
    """
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    U, S, Vh = U[:, :rank], S[:rank], Vh[:rank]
    signs = Vh.gather(1, Vh.abs().argmax(1, keepdim=True)).sign()
    roots = (S / scaling).sqrt()[:, None] * signs
    return roots * Vh, roots * U.t()
