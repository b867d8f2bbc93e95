"""Define the options of switching and their rules (SwitchLoRA, arXiv 2406.06564)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Optional

from megatron_switchlora.config.errors import require
from megatron_switchlora.config.facts import option
from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.methods.adapter_options import smaller_sides


@dataclass
class SwitchOptions:
    """Adapter vectors that are switched against candidates (SwitchLoRA, arXiv 2406.06564)."""

    interval0: float = option(40.0, resume="ask")
    """Switching interval at the start: each adapted matrix, of which LLaMA has seven per decoder layer, switches
    r / interval0 vectors per side and step. At least twice freeze_steps."""
    ratio: float = option(0.1, resume="ask")
    """The switching rate falls to 0.3 of its start after this share of total_steps."""
    total_steps: Optional[int] = option(None, resume="ask")
    """Length T of the switching schedule in steps; by default train.steps."""
    freeze_steps: int = option(5, resume="ask")
    """Steps N for which the counterpart of a switched vector is frozen (0 and 1 both mask the stale gradient once)."""
    selection: Literal["ring", "random", "independent"] = option("ring")
    """ring: positions and candidates in order; random: candidates drawn at random; independent: positions too,
    with separate counts for A and B (Algorithm 2 of the paper)."""
    bank_device: Literal["device", "host"] = option("device", resume="free", results=False)
    """Where the candidate vectors live; host memory is pinned when there is a GPU."""
    bank_spread: Literal["tp", "dp"] = option("tp", resume="free", results=False)
    """tp: tensor-parallel ranks share the candidates, and data-parallel ranks hold copies; dp: data-parallel ranks
    share them too."""


def check_switching(config: RunConfig) -> None:
    """Check the options of switching.

    Raises:
        UserError: an option breaks a rule.
    """
    method, switch = config.method, config.method.switch
    require(
        method.rank >= 2, "method.rank 1 cannot switch, since A and B switch different positions: use rank 2 or more."
    )
    largest = max(smaller_sides(config))
    require(
        method.rank < largest,
        f"A bank has min(m, n) candidates per matrix, so method.rank {method.rank} leaves nothing to switch in any "
        f"matrix (min(m, n) is {largest} at most): lower the rank, or use method.name lora.",
    )
    require(switch.freeze_steps >= 0, f"method.switch.freeze_steps must be at least 0, not {switch.freeze_steps}.")
    require(switch.interval0 > 0, f"method.switch.interval0 must be positive, not {switch.interval0}.")
    require(
        switch.interval0 >= 2 * switch.freeze_steps,
        f"method.switch.interval0 must be at least 2 * method.switch.freeze_steps, or frozen vectors would fill the "
        f"ring; they are {switch.interval0:g} and {switch.freeze_steps}: raise the interval or freeze for fewer steps.",
    )
    require(switch.ratio > 0, f"method.switch.ratio must be positive, not {switch.ratio}.")
    total = switch.total_steps
    require(total is None or total >= 1, f"method.switch.total_steps must be at least 1, not {total}.")
