"""Learning rate over a run: linear warm-up, then a cosine to zero (SwitchLoRA, section 4.1), or ReLoRA's restarts."""

from __future__ import annotations

import math


def lr_factor(step: int, warmup_steps: int, total_steps: int) -> float:
    """Return the multiple of the peak rate at `step`, counted from 0.

    It is (step + 1) / warmup, then half a cosine.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def jagged_factor(step: int, warmup_steps: int, total_steps: int, restart_interval: int, restart_warmup: int) -> float:
    """Return `lr_factor` with a new warm-up after each multiple of `restart_interval`.

    For `restart_warmup` steps the rate climbs linearly from zero to the cosine's value at their end (ReLoRA's jagged
    cosine, arXiv 2307.05695, section 3).
    """
    since = step % restart_interval
    if step < max(warmup_steps, restart_interval) or since >= restart_warmup:
        return lr_factor(step, warmup_steps, total_steps)
    return (since + 1) / restart_warmup * lr_factor(step - since + restart_warmup, warmup_steps, total_steps)
