"""The optimizer section of the run configuration, and its rules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from megatron_switchlora.config.errors import require
from megatron_switchlora.config.facts import option


@dataclass
class OptimConfig:
    """AdamW with one step counter per LoRA vector."""

    lr: Optional[float] = option(None, resume="ask", swept=True, basic=True)
    """Peak learning rate of the adapters (with full and galore: of the decoder's matrices); by default the method's,
    from its paper or from a paper that compares it. With lte and mhlora it is 0.00005 if B starts at zero, else 0.01,
    or 0.02 with method.lte.inner switchlora."""
    dense_lr: Optional[float] = option(None, resume="ask", swept=True, basic=True)
    """Peak learning rate of embedding, lm_head and norms; by default optim.lr, as published for SwitchLoRA, and 0.001
    with lte and mhlora; 0 freezes them. Sweep it for every method."""
    lora_plus_ratio: float = option(1.0, resume="ask")
    """Learning rate of B as a multiple of A's, which is optim.lr (LoRA+, arXiv 2402.12354, advises 16)."""
    beta1: float = option(0.9, resume="ask")
    """Decay of the first moment."""
    beta2: float = option(0.999, resume="ask")
    """Decay of the second moment."""
    eps: float = option(1e-8, resume="ask")
    """Added to the root of the second moment."""
    weight_decay: float = option(0.0, resume="ask")
    """Decoupled weight decay of matrices (not of norms, not of frozen vectors)."""
    clip: float = option(1.0, resume="ask")
    """Limit of the global gradient norm; 0 switches clipping off."""


def check_optim(o: OptimConfig) -> None:
    """Check the rules of this section alone.

    Raises:
        UserError: with the rule, the values and what to change.
    """
    require(o.eps > 0, f"optim.eps must be positive, not {o.eps}.")
    require(o.dense_lr is None or o.dense_lr >= 0, f"optim.dense_lr must not be negative, it is {o.dense_lr}.")
    require(o.lora_plus_ratio > 0, f"optim.lora_plus_ratio must be positive, not {o.lora_plus_ratio}.")
    for name in ("beta1", "beta2"):
        value = getattr(o, name)
        require(0 <= value < 1, f"optim.{name} must lie in [0, 1), it is {value}.")
    require(o.clip >= 0, f"optim.clip must not be negative (0 switches it off), it is {o.clip}.")
    require(o.weight_decay >= 0, f"optim.weight_decay must not be negative, it is {o.weight_decay}.")
