"""The log section of the run configuration, and its rules.

It owns logging: monitor sections in DeepSpeed's JSON are refused. The records of metrics.jsonl need no option.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, Optional

from megatron_switchlora.config.errors import require
from megatron_switchlora.config.facts import option


@dataclass
class LogConfig:
    """Where rank 0 writes the records of metrics.jsonl as well."""

    tensorboard: bool = option(False, resume="free", results=False)
    """Write TensorBoard's event files to the run folder's tensorboard/."""
    wandb: Literal["none", "offline", "online"] = option("none", resume="free", results=False)
    """offline: write a Weights & Biases run to the run folder's wandb/, for a later wandb sync; online: send it as
    well, with the key of WANDB_API_KEY or of wandb login. It needs the extra wandb."""
    wandb_project: str = option("megatron_switchlora", resume="free", results=False)
    """Project of the W&B run. The run's name is that of its folder."""
    wandb_entity: Optional[str] = option(None, resume="free", results=False)
    """User or team that owns the project; by default the key's own."""
    wandb_group: Optional[str] = option(None, resume="free", results=False)
    """Group in which W&B shows the run, such as a sweep or several seeds."""


def check_log(log: LogConfig) -> None:
    """Check the rules of this section alone.

    Raises:
        UserError: with the rule, the values and what to change.
    """
    for name in ("wandb_project", "wandb_entity", "wandb_group"):
        text = getattr(log, name)
        require(
            text is None or 0 < len(text) <= 128,
            f"log.{name} must have between 1 and 128 letters, not {len(text or '')}: change it, or leave it out.",
        )
    require(
        not re.search(r"[/\\#?%:]", log.wandb_project),
        f"log.wandb_project must have none of / \\ # ? % :, but it is {log.wandb_project!r}: rename it.",
    )
    given = [name for name in ("wandb_entity", "wandb_group") if getattr(log, name) is not None]
    require(
        log.wandb != "none" or not given,
        f"log.{', log.'.join(given)} belong to Weights & Biases, but log.wandb is none: set log.wandb to offline or "
        "online, or leave them out.",
    )
