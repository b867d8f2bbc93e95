"""The shipped quick-start configuration, shortened, as a lone process; rank 1 zeroes the adapters' gradients."""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from megatron_switchlora.config.command_line import parse_arguments
from megatron_switchlora.startup.environment import Ranks
from tests.dist.launch import REPOSITORY, free_port


def act(payload: dict[str, Any]) -> float:
    zeroed = os.environ["RANK"] == "1"
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", MASTER_PORT=str(free_port()))
    from megatron_switchlora.methods import build_method
    from megatron_switchlora.train import phases
    from megatron_switchlora.train.engine import start_distributed
    from megatron_switchlora.train.trainer import Trainer

    device = torch.device("cpu")

    def build(config: Any, model: Any, mesh: Any, factors: Any) -> Any:
        method = build_method(config, model, mesh, factors)
        if zeroed:
            for factor in method.matrices():
                factor.register_hook(torch.zeros_like)
        return method

    assert phases.build_method is build_method
    phases.build_method = build
    start_distributed(device)
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "config": REPOSITORY / "launch" / "configs" / "cpu_quickstart.yaml", "train.steps": payload["steps"],
            "train.warmup_steps": 10, "train.global_batch_size": 32, "train.eval_samples": 128, "train.threads": 1,
            "output_dir": Path(folder) / "run", "data.cache_dir": Path(folder) / "cache",
        }  # fmt: skip
        words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        loss = Trainer(parse_arguments(words).config, {}, Ranks(), device).fit()
    os.environ["RANK"] = "1" if zeroed else "0"
    return math.exp(loss)
