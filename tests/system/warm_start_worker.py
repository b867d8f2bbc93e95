"""Runs of several methods, one after the other in one process group: what each has recorded."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from megatron_switchlora.parallel.ranks import discover_ranks
from megatron_switchlora.train.arguments import parse_arguments


def act(payload: dict[str, Any]) -> list[list[dict[str, Any]]]:
    ranks = discover_ranks(os.environ)
    from megatron_switchlora.train.engine import start_distributed
    from megatron_switchlora.train.trainer import Trainer

    device = torch.device("cpu")
    start_distributed(device)
    found = []
    for number, options in enumerate(payload["runs"]):
        config = parse_arguments([*payload["options"], *options]).config
        config.output_dir = str(Path(str(config.output_dir)) / f"run{number}")
        Trainer(config, {"zero_optimization": {"stage": payload["stage"]}}, ranks, device).fit()
        records = (Path(config.output_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        found.append([json.loads(line) for line in records])
    return found
