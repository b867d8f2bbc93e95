"""Learning rate over a run: linear warm-up, then a cosine to zero (SwitchLoRA, section 4.1)."""

from __future__ import annotations

import math


def lr_factor(step: int, warmup_steps: int, total_steps: int) -> float:
    """Multiple of the peak rate at `step` (counted from 0): (step + 1) / warmup, then half a cosine."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
