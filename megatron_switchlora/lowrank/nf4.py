"""A matrix in 4 bits: NormalFloat4 with one fp32 scale per block of 64 (QLoRA, arXiv 2305.14314).

A row is padded with zeros to a multiple of 64. The values of a block are divided by its largest magnitude and replaced
by the nearest of 16 levels. The levels are quantiles of a normal distribution and include 0 and +-1:

    codes   uint8 [out, padded / 2]   two levels per byte, the first in the high half
    scales  fp32  [out, padded / 64]

Quantising a dequantised matrix returns the same codes. The kernels of bitsandbytes dequantise where it is installed and
right on this device, which one comparison on a small matrix decides; else plain torch does. A product keeps no
dequantised matrix for its backward pass, since that would cost the memory that 4 bits save. It is formed again there.
On a GPU neither pass waits: a matrix keeps the levels, and what bitsandbytes must know, on its device.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_switchlora.distributed.shard import Split

BLOCK = 64
KERNEL_DTYPES = (torch.float32, torch.bfloat16)  # of what the kernels of bitsandbytes return
# The levels of QLoRA, appendix E.
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def levels_on(device: torch.device) -> Tensor:
    """Return the levels, fp32 [16]; on a GPU a copy that the host waits for."""
    return torch.tensor(LEVELS, dtype=torch.float32, device=device)


def quantise(matrix: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Return (codes, scales) of a matrix [out, in]; `levels` are those on its device."""
    padded = F.pad(matrix.float(), (0, -matrix.size(1) % BLOCK)).unflatten(1, (-1, BLOCK))
    scales = padded.abs().amax(-1)
    unit = padded / scales.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)
    bounds = (levels[1:] + levels[:-1]) / 2
    numbers = torch.bucketize(unit, bounds).flatten(1).to(torch.uint8)
    return numbers[:, 0::2] << 4 | numbers[:, 1::2], scales


def dequantise(codes: Tensor, scales: Tensor, columns: int, levels: Tensor) -> Tensor:
    """Return the fp32 matrix [out, columns] that codes and scales stand for."""
    numbers = torch.stack([codes >> 4, codes & 15], -1).flatten(1)
    values = levels[numbers.int()].unflatten(1, (-1, BLOCK)) * scales.unsqueeze(-1)
    return values.flatten(1)[:, :columns]


class Nf4Matrix:
    """A quantised matrix; `codes` and `scales` may be filled in place.

    With `kernels` bitsandbytes dequantises it.
    """

    def __init__(self, matrix: Tensor, kernels: bool) -> None:
        self.columns = matrix.size(1)
        rows, blocks = matrix.size(0), -(-self.columns // BLOCK)
        self.codes = matrix.new_empty(rows, blocks * BLOCK // 2, dtype=torch.uint8)
        self.scales = matrix.new_empty(rows, blocks, dtype=torch.float32)
        self.levels = levels_on(matrix.device)
        self._states = {dtype: self._state(dtype) for dtype in KERNEL_DTYPES if kernels}
        if not matrix.is_meta:
            self.store(matrix)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that hold the matrix, by their names in checkpoints; they are filled in place."""
        return {"nf4_codes": self.codes, "nf4_scales": self.scales}

    def split_of(self, tensor: Tensor, split: Split) -> Split:
        """Return how one of the tensors is cut over tensor-parallel ranks where `split` cuts the matrix.

        A column of codes or scales stands for several columns of the matrix; the result counts the tensor's own. Blocks
        of padding alone are left out.
        """
        if split.dim == 0:
            return split
        width, blocks = self.scales.size(1), -(-split.share // BLOCK)
        return Split(1, blocks * tensor.size(1) // width * split.axis.size, split.axis, tensor.size(1))

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    @torch.no_grad()
    def store(self, matrix: Tensor) -> None:
        """Quantise another matrix of the same shape."""
        codes, scales = quantise(matrix, self.levels)
        self.codes.copy_(codes)
        self.scales.copy_(scales)

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix [out, in] in this precision."""
        if dtype in self._states:
            from bitsandbytes.functional import dequantize_4bit

            return dequantize_4bit(self.codes.view(-1, 1), self._states[dtype])[:, : self.columns]
        return dequantise(self.codes, self.scales, self.columns, self.levels).to(dtype)

    def _state(self, dtype: torch.dtype) -> Any:
        """Return what bitsandbytes must know of the matrix, for results of this dtype: views of what is filled."""
        from bitsandbytes.functional import QuantState

        shape = torch.Size([self.codes.size(0), 2 * self.codes.size(1)])
        return QuantState(self.scales.view(-1), shape, self.levels, BLOCK, "nf4", dtype)

    def linear(self, x: Tensor) -> Tensor:
        """Return x W^T in x's precision."""
        return _Linear.apply(x, self)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Nf4Matrix) -> Tensor:
        ctx.matrix = matrix
        return F.linear(x, matrix.dequantised(x.dtype))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy @ ctx.matrix.dequantised(dy.dtype), None


def bitsandbytes_works(device: torch.device) -> bool:
    """Return whether bitsandbytes is installed and computes on this device what plain torch computes."""
    try:
        trial = Nf4Matrix(torch.linspace(-2, 3, 8 * 128, device=device).view(8, 128), kernels=True)
        results = [trial.dequantised(dtype).float() for dtype in KERNEL_DTYPES]
    except Exception:  # not installed, or built without this device: it is optional, and plain torch does the same
        return False
    expected = dequantise(trial.codes, trial.scales, 128, trial.levels)
    return all(
        torch.allclose(each, expected, rtol=rtol, atol=1e-7) for each, rtol in zip(results, (1e-6, 2**-8), strict=True)
    )
