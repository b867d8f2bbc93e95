"""Initial factors from the gradient (LoRA-GA, arXiv 2407.05000, section 3; its released code where they differ).

With G = dL/dW = U S V^T of a matrix W [m, n] at the initial weights, and by default

    A = V^T[0:r] c     B = U[:, r:2r] c     c = m^(1/4) / sqrt(gamma)     (then W <- W - s B A)

the first step of plain SGD changes W by -lr s^2 c^2 times the best rank-2r approximation of G, to first order in lr.
(The paper's text has 1 / gamma, its code and runs 1 / sqrt(gamma).) S is not used.

Under tensor parallelism G is split like W and never gathered. Its split side is called `tall`: rows of G in a
column-parallel layer, of G^T in a row-parallel one. The randomised decomposition (Halko et al., arXiv 0909.4061,
algorithms 4.4 and 5.1) sums [across, Q] and gathers [Q, Q] over the ranks, with Q = 2r + oversample. Its test matrix
multiplies the side that every rank holds whole, so it is the same at every degree. What all ranks decompose alike they
take from the first, since cuSOLVER's bits may differ between devices.

Some directions of G may consist of rounding alone, as in a first layer that saw fewer words than 2r. Their vectors are
orthonormal, but arbitrary.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Optional

import torch
from torch import Tensor

from megatron_switchlora.config.method import LoraGaConfig, MethodConfig
from megatron_switchlora.distributed.collectives import from_first, leave
from megatron_switchlora.distributed.linear import ParallelLinear
from megatron_switchlora.distributed.shard import Axis, Split, named_generator


@torch.no_grad()
def initial_factors(
    linear: ParallelLinear,
    gradient: Optional[Tensor],
    method: MethodConfig,
    name: str,
    seed: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Return this rank's shards of A [r, in] and B transposed [r, out] of a layer; padding is zero.

    `name` is the layer's. `gradient` is this rank's shard of G [out, in], cut like the weight, on the device; Gaussian
    vectors need none. Collective over the tensor-parallel ranks, through the device.
    """
    m, n, split = linear.out_features, linear.in_features, linear.split
    if gradient is None:
        A, B = _gaussian(m, n, split, method.rank, name, seed)
    else:
        generator = named_generator(seed, f"{name}.lora_ga")
        for_A, for_B = pair_indices(method.ga.direction, method.rank, generator)
        left, _, right = singular_pairs(gradient, split, 2 * method.rank, method.ga, generator)
        A, B = right.t()[for_A.to(right.device)], left.t()[for_B.to(left.device)]
    c = vector_length(method, linear, named_generator(seed, f"{name}.lora_ga_weight"), device)
    return A * c, B * c


def _gaussian(m: int, n: int, split: Split, rank: int, name: str, seed: int) -> tuple[Tensor, Tensor]:
    """Draw normal vectors of expected length 1 for the full tensors, then cut them."""
    A = torch.randn(rank, n, generator=named_generator(seed, f"{name}.lora_ga_A")) / math.sqrt(n)
    B = torch.randn(rank, m, generator=named_generator(seed, f"{name}.lora_ga_B")) / math.sqrt(m)
    along = replace(split, dim=1)
    return (A, along.take(B)) if split.dim == 0 else (along.take(A), B)


def pair_indices(direction: str, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return which of the first 2r singular pairs give A its right vectors and B its left ones.

    [r] each, disjoint.
    """
    first = torch.arange(2 * rank)
    if direction == "ArBr":
        return first[1::2], first[::2]
    if direction == "random":
        first = first[torch.randperm(2 * rank, generator=generator)]
    low, high = first[:rank], first[rank:]
    return (high, low) if direction == "A2rBr" else (low, high)


def vector_length(
    method: MethodConfig, linear: ParallelLinear, generator: torch.Generator, device: torch.device
) -> float:
    """Return c, the length of every vector. Collective over the tensor-parallel ranks for scale "weight"."""
    ga, s = method.ga, method.scaling
    if ga.scale == "weight":
        _, values, _ = singular_pairs(linear.weight.detach().to(device), linear.split, method.rank, ga, generator)
        return float((values / s).sqrt().mean())
    size = {"stable": linear.out_features, "backward": linear.in_features}
    return size[ga.scale] ** 0.25 / math.sqrt(ga.gamma) if ga.scale in size else {"gd": 1 / s, "unit": 1.0}[ga.scale]


def singular_pairs(
    matrix: Tensor, split: Split, count: int, ga: LoraGaConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the first `count` singular values [count] of a matrix, with this rank's shards of their vectors.

    This rank holds `matrix`, cut by `split`. The left vectors are [out, count], the right ones [in, count], zero in the
    padding. The largest entry of every right vector is positive. Collective over the split's axis.
    """
    tall = (matrix if split.dim == 0 else matrix.t())[: split.real]
    if ga.svd == "exact":
        assert split.axis.size == 1, "an exact decomposition needs the whole matrix"
        along, values, across = torch.linalg.svd(tall, full_matrices=False)
        across = across.t()
    else:
        extra = count if ga.oversample is None else ga.oversample
        width = min(count + extra, split.size, tall.size(1))
        along, values, across = randomised_svd(tall, split, width, ga.power_iterations, generator)
    along, across = along[:, :count], across[:, :count]
    sign = _signs(across, Axis()) if split.dim == 0 else _signs(along, split.axis)
    padded = along.new_zeros(split.local, count)
    padded[: split.real] = along * sign
    left, right = (padded, across * sign) if split.dim == 0 else (across * sign, padded)
    return left, values[:count], right


def _signs(right: Tensor, axis: Axis) -> Tensor:
    """Return the sign of the largest entry of each column of right vectors [here, count], spread over an axis."""
    largest = right.gather(0, right.abs().argmax(0, keepdim=True))
    everywhere = Split(0, axis.size, axis).gather(largest)
    winner = everywhere.gather(0, everywhere.abs().argmax(0, keepdim=True))
    return torch.where(winner < 0, -1.0, 1.0).to(right.dtype)


def randomised_svd(
    tall: Tensor, split: Split, width: int, power_iterations: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Return U [real, Q], S [Q] and V [across, Q] of a matrix whose rows are spread over an axis.

    `tall` [real, across] are this rank's rows, without padding, and Q is `width`. Exact to rounding where Q = min(m,
    n).
    """
    test = torch.randn(tall.size(1), width, generator=generator).to(tall.device, tall.dtype)
    basis = orthonormal(tall @ test, split)
    for _ in range(power_iterations):
        (across,) = from_first(split.axis, torch.linalg.qr(leave(split.axis, tall.t() @ basis)).Q)
        basis = orthonormal(tall @ across, split)
    core = leave(split.axis, basis.t() @ tall)
    left, values, right = from_first(split.axis, *torch.linalg.svd(core, full_matrices=False))
    return basis @ left, values, right.t()


def orthonormal(columns: Tensor, split: Split) -> Tensor:
    """Return this rank's rows of an orthonormal basis of columns [real, Q] whose rows are spread over an axis.

    Each rank factors its rows, then all factor the stacked triangles (TSQR, arXiv 0808.2664). This is as exact as QR of
    the whole, whatever the columns' rank. No rank may be given more vectors than it has rows.
    """
    basis, triangle = torch.linalg.qr(columns)
    if split.axis.size == 1:
        return basis
    width, size = columns.size(1), split.axis.size
    square = triangle.new_zeros(width, width)
    square[: len(triangle)] = triangle
    squares = Split(0, size * width, split.axis).gather(square).split(width)
    heights = [min(width, replace(split, axis=replace(split.axis, rank=rank)).real) for rank in range(size)]
    stacked = torch.cat([other[:height] for other, height in zip(squares, heights, strict=True)])
    (joined,) = from_first(split.axis, torch.linalg.qr(stacked).Q)
    return basis @ joined.split(heights)[split.axis.rank]
