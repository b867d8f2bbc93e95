"""Pure functions of a matrix's spectrum and of the adapters of several heads.

Spectra of weights and of their updates since the start are Figures 10 and 11 of SwitchLoRA (arXiv 2406.06564): a
low-rank method whose updates reach many directions trains like full rank. The effective rank puts a spectrum into one
number, as in Figure 14 of LTE (arXiv 2402.16828); its Figures 5 and 11 ask whether heads explore different directions,
by the cosine of their updates and by the Grassmann distance of the subspaces they read.
Everything is computed in float64. A is [r, in]; B is stored transposed, [r, out]; a head's update is B^T A, and is
never formed here: with r rows per side, inner products of updates are those of r x r Gram matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Optional

import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor]  # A [r, in], B [r, out]


def spectrum(matrix: Tensor) -> Tensor:
    """Return the singular values of [m, n], largest first: [min(m, n)], float64."""
    return torch.linalg.svdvals(matrix.double())


def effective_rank(values: Tensor) -> float:
    """Return exp of the entropy of the normalised singular values.

    It is 1 for one direction, k for k equal ones, 0 for none. Roy and Vetterli, 2007; LTE's Figure 14.
    """
    total = float(values.sum())
    if total == 0:
        return 0.0
    shares = values.double() / total
    shares = shares[shares > 0]
    return float(torch.exp(-(shares * shares.log()).sum()))


def numerical_rank(values: Tensor, share: float = 1e-3) -> int:
    """Count singular values above a share of the largest."""
    return int((values > share * values.max()).sum())


def update_cosine(first: Factors, second: Factors) -> Optional[float]:
    """Return the cosine between vec(B^T A) of two heads; None where either update is zero."""
    norms = _inner(first, first) * _inner(second, second)
    return _inner(first, second) / norms**0.5 if norms > 0 else None


def _inner(first: Factors, second: Factors) -> float:
    """Return <B1^T A1, B2^T A2> = sum of (A1 A2^T) * (B1 B2^T)."""
    (A1, B1), (A2, B2) = first, second
    return float(((A1.double() @ A2.double().t()) * (B1.double() @ B2.double().t())).sum())


def grassmann_distance(first: Tensor, second: Tensor) -> float:
    """Return the distance of the row spaces of [r, n] and [r, n], both of rank r.

    It is the root of the sum of the squared principal angles, between 0 and sqrt(r) pi / 2.
    The angles come from the sines below 45 degrees and from the cosines above: arccos alone loses half of the digits
    of a small angle.
    """
    p, q = (torch.linalg.qr(matrix.double().t()).Q for matrix in (first, second))
    cosines = torch.linalg.svdvals(p.t() @ q).clamp(0, 1)  # descending
    sines = torch.linalg.svdvals(q - p @ (p.t() @ q)).clamp(0, 1).flip(0)  # ascending, so of the same angles
    angles = torch.where(sines < cosines, sines.arcsin(), cosines.arccos())
    return float(angles.norm())


def head_alignment(heads: Sequence[Factors]) -> dict[str, Optional[float]]:
    """Return means over all pairs of heads.

    They are the `cosine` of the updates (None if all but one are zero) and the `grassmann` distance of the row spaces
    of A (None for a single head).
    """
    pairs = list(combinations(heads, 2))
    cosines = [value for first, second in pairs if (value := update_cosine(first, second)) is not None]
    distances = [grassmann_distance(first[0], second[0]) for first, second in pairs]
    return {
        "cosine": sum(cosines) / len(cosines) if cosines else None,
        "grassmann": sum(distances) / len(distances) if distances else None,
    }
