"""The checkpoint section of the run configuration, and its rules."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_switchlora.config.errors import require
from megatron_switchlora.config.facts import option


@dataclass
class CheckpointConfig:
    """When to save the run, in the run folder's checkpoints/, and what a resumed run may change."""

    interval: int = option(200, resume="free", results=False)
    """Steps between checkpoints; 0 writes none at intervals. One is always written at the end and when the run is asked
    to stop."""
    keep_last: int = option(2, resume="free", results=False)
    """Number of newest checkpoints to keep."""
    keep_every: int = option(0, resume="free", results=False)
    """Keep checkpoints at multiples of this many steps for good, for "switchlora analyze" to follow a run; 0: none."""
    background: bool = option(True, resume="free", results=False)
    """Write checkpoints while training continues, from a copy in host memory; false waits for the disk."""
    allow_changes: list[str] = option(factory=list, resume="free", results=False)
    """Options that may differ from the checkpoint's: optim.*, train.steps, train.warmup_steps, train.epochs,
    train.precision, the numbers of the switching schedule, or data (another text, same tokenizer)."""


def check_checkpoint(c: CheckpointConfig) -> None:
    """Check the rules of this section alone; `config.rules` checks the names in `allow_changes`.

    Raises:
        UserError: with the rule, the values and what to change.
    """
    for name in ("interval", "keep_every"):
        value = getattr(c, name)
        require(value >= 0, f"checkpoint.{name} must not be negative, it is {value}.")
    require(c.keep_last >= 1, f"checkpoint.keep_last must be at least 1, not {c.keep_last}.")
