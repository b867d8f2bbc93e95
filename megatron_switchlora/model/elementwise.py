"""Norm, rotary embedding and gated activation with backward passes of their own: in eager mode, or compiled.

What runs is a pure function of tensors. Of a norm backward keeps x and 1 / rms(x) alone, of a rotation nothing.
Compiled, each function is one kernel, and of the gated activation only gate and up are kept: silu(gate) is formed again
for nothing, while in eager mode on a CPU that would cost a third of its time.

    norm      y = x / rms(x) * weight     dx = (g - n mean(g n)) / rms(x),  n = x / rms(x),  g = dy * weight
    rotary    a rotation by position      the rotation by the opposite angle
    swiglu    y = silu(gate) * up         dgate = dy * up * silu'(gate),  dup = dy * silu(gate)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_switchlora.distributed.precision import at_least_fp32

FusedNorm = Callable[[Tensor, Tensor, tuple[int, ...], float], Tensor]
"""Returns y of x, weight, the weight's shape and eps, as `model/fused_norm.py` may find one."""


def norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return y [..., D] and 1 / rms(x) [..., 1]; the mean square in at least fp32."""
    high = x.to(at_least_fp32(x.dtype))
    scale = torch.rsqrt(high.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (high * scale).to(x.dtype), scale


def norm_backward(dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and of the weight, [D] or one that broadcasts."""
    normal = x.to(scale.dtype) * scale
    dweight = (dy * normal.to(dy.dtype)).sum_to_size(weight.shape)
    inner = (dy * weight).to(scale.dtype)
    mean = (inner * normal).mean(-1, keepdim=True)
    return inner.addcmul(normal, mean, value=-1).mul(scale).to(x.dtype), dweight


def add_norm_forward(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return x + delta, and `norm_forward` of it."""
    total = x + delta
    return total, *norm_forward(total, weight, eps)


def add_norm_backward(
    dtotal: Tensor, dy: Tensor, total: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x, which is that of delta too, and of the weight."""
    dx, dweight = norm_backward(dy, total, weight, scale)
    return dx + dtotal, dweight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [..., S, head_dim] by position; its halves are the coordinates. cos and sin: [S, head_dim / 2]."""
    y = torch.empty_like(x)
    (left, right), (y_left, y_right) = x.chunk(2, dim=-1), y.chunk(2, dim=-1)
    y_left.copy_(left * cos).addcmul_(right, sin, value=-1)
    y_right.copy_(right * cos).addcmul_(left, sin)
    return y


def swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up."""
    return F.silu(gate) * up


def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of gate and up."""
    return torch.ops.aten.silu_backward(dy * up, gate), dy * F.silu(gate)


FUNCTIONS = (
    norm_forward, norm_backward, add_norm_forward, add_norm_backward, rotate, swiglu_forward, swiglu_backward,
)  # fmt: skip


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True)


class Elementwise:
    """The elementwise parts of a model; with `compiled` torch.compile makes a kernel of each at its first call.

    `fused_norm` computes norms with a single weight in its own way.
    """

    def __init__(self, compiled: bool = False, fused_norm: Optional[FusedNorm] = None) -> None:
        self.compiled, self.fused_norm = compiled, fused_norm

    def run(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """Return the result of one of the functions."""
        return (_compiled(function) if self.compiled else function)(*inputs)

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Return x / rms(x) * weight over the last dimension."""
        if self.fused_norm is not None and weight.dim() == 1:
            return self.fused_norm(x, weight, tuple(weight.shape), eps)
        return _Norm.apply(self, x, weight, eps)

    def add_norm(self, x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Return x + delta and its norm."""
        if self.fused_norm is not None:
            total = x + delta
            return total, self.norm(total, weight, eps)
        return _AddNorm.apply(self, x, delta, weight, eps)

    def rotary(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return `rotate` of x."""
        return _Rotary.apply(self, x, cos, sin)

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        """Return silu(gate) * up."""
        return recomputed_swiglu(self, gate, up) if self.compiled else swiglu_forward(gate, up)


def recomputed_swiglu(how: Elementwise, gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up, whose backward pass keeps gate and up alone."""
    return _SwiGlu.apply(how, gate, up)


def failure(device: torch.device) -> Optional[str]:
    """Return why functions cannot be compiled for a device, or None: a compiler is missing, mostly."""
    x = torch.ones(2, 8, device=device)
    try:
        Elementwise(compiled=True).run(swiglu_forward, x, x)
    except Exception as error:  # torch's backends raise what they like
        return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return None


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, how: Elementwise, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, scale = how.run(norm_forward, x, weight, eps)
        ctx.how = how
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Optional[Tensor], ...]:
        return None, *ctx.how.run(norm_backward, dy, *ctx.saved_tensors), None


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, how: Elementwise, x: Tensor, delta: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        total, y, scale = how.run(add_norm_forward, x, delta, weight, eps)
        ctx.how = how
        ctx.save_for_backward(total, weight, scale)
        return total, y

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor, dy: Tensor) -> tuple[Optional[Tensor], ...]:
        dx, dweight = ctx.how.run(add_norm_backward, dtotal, dy, *ctx.saved_tensors)
        return None, dx, dx, dweight, None


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, how: Elementwise, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.how = how
        ctx.save_for_backward(cos, sin)
        return how.run(rotate, x, cos, sin)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Optional[Tensor], ...]:
        cos, sin = ctx.saved_tensors
        return None, ctx.how.run(rotate, dy, cos, -sin), None, None


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, how: Elementwise, gate: Tensor, up: Tensor) -> Tensor:
        ctx.how = how
        ctx.save_for_backward(gate, up)
        return how.run(swiglu_forward, gate, up)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Optional[Tensor], ...]:
        return None, *ctx.how.run(swiglu_backward, dy, *ctx.saved_tensors)
