"""RMSNorm by the kernels of NVIDIA's apex, where the user has built them.

PyPI's `apex` is another project. It is recognised without being imported: NVIDIA's build installs its kernels as a
module of their own, `fused_layer_norm_cuda`. One comparison on a small input decides whether they are right.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Optional

import torch

from megatron_switchlora.model.elementwise import FusedNorm, norm_backward, norm_forward
from megatron_switchlora.startup.device import is_gpu

KERNELS = "fused_layer_norm_cuda"
EPS = 1e-6


def apex_norm(device: torch.device) -> Optional[FusedNorm]:
    """Return the RMSNorm of NVIDIA's apex if it is installed and right on this device, which must be a GPU."""
    if not is_gpu(device) or find_spec(KERNELS) is None:
        return None
    try:
        from apex.normalization.fused_layer_norm import fused_rms_norm_affine

        right = _is_right(fused_rms_norm_affine, device)
    except Exception:  # of another version, or built without this device: it is optional
        return None
    return fused_rms_norm_affine if right else None


def _is_right(norm: FusedNorm, device: torch.device) -> bool:
    """Return whether y and both gradients are the eager ones on a small input, but for rounding."""
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        x = torch.linspace(-2, 3, 4 * 64, device=device).view(4, 64).to(dtype)
        weight, dy = torch.linspace(0.5, 1.5, 64, device=device).to(dtype), x.sin()
        wanted, scale = norm_forward(x, weight, EPS)
        gradients = norm_backward(dy, x, weight, scale)
        y = norm(x.requires_grad_(), weight.requires_grad_(), (64,), EPS)
        found = [y.detach(), *torch.autograd.grad(y, [x, weight], dy)]
        pairs = zip(found, (wanted, *gradients), strict=True)
        if not all(torch.allclose(mine, theirs, rtol=bound, atol=bound) for mine, theirs in pairs):
            return False
    return True
