"""Trains on dp 2 x tp 2 and changes one element on one rank; returns what the trainer says, for several tensors."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from megatron_switchlora.config.command_line import parse_arguments
from megatron_switchlora.config.errors import UserError
from megatron_switchlora.startup.environment import discover_ranks


def act(payload: dict[str, Any]) -> dict[str, str]:
    ranks = discover_ranks(os.environ)
    from megatron_switchlora.train.engine import start_distributed
    from megatron_switchlora.train.trainer import Trainer

    device = torch.device("cpu")
    start_distributed(device)
    said = {}
    for number, target in enumerate(payload["targets"]):
        config = parse_arguments(payload["options"]).config
        config.output_dir = str(Path(str(config.output_dir)) / f"run{number}")
        trainer = Trainer(config, {"zero_optimization": {"stage": 1}}, ranks, device)
        after = trainer.method.after_step

        def corrupt(step: int, trainer: Any = trainer, target: str = target, after: Any = after) -> None:
            after(step)
            replicas = {replica.name: replica for replica in trainer.method.replicas()}
            odd = {"head": 1, "dp": 3}[replicas[target].group]
            if step == 4 and ranks.rank == odd:
                replicas[target].tensor.data.view(-1)[5] += 1e-6

        trainer.method.after_step = corrupt  # type: ignore[method-assign]
        try:
            trainer.fit()
            said[target] = "nothing"
        except UserError as error:
            said[target] = str(error)
    return said
