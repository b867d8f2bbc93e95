"""Runs of several methods, one after the other in one process group, in folders run0, run1, ..."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from megatron_switchlora.config.command_line import parse_arguments
from megatron_switchlora.startup.environment import discover_ranks


def act(payload: dict[str, Any]) -> None:
    ranks = discover_ranks(os.environ)
    from megatron_switchlora.train.engine import start_distributed
    from megatron_switchlora.train.trainer import Trainer

    device = torch.device("cpu")
    start_distributed(device)
    for number, options in enumerate(payload["runs"]):
        config = parse_arguments([*payload["options"], *options]).config
        config.output_dir = str(Path(str(config.output_dir)) / f"run{number}")
        Trainer(config, {"zero_optimization": {"stage": payload["stage"]}}, ranks, device).fit()
