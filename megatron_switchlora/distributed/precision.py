"""The precisions of compute by name, and that of master weights, sums and norms."""

from __future__ import annotations

import torch

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """Return fp32, or `dtype` if that is finer."""
    return torch.promote_types(dtype, torch.float32)
