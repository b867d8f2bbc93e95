"""One layer in the shape of the shipped 1.3B model, trained for two steps as its configuration says."""

from __future__ import annotations

from typing import Any

import torch

from megatron_switchlora.config.command_line import parse_arguments
from megatron_switchlora.config.ds_config import resolve_ds_config
from megatron_switchlora.methods import build_method
from megatron_switchlora.model.llama.model import LlamaForCausalLM
from megatron_switchlora.model.protocol import initialize_weights
from tests.dist.engines import start
from tests.dist.launch import REPOSITORY


def act(payload: dict[str, Any]) -> dict[str, Any]:
    mesh, device = start(payload["tp"]), torch.device("cpu")
    from megatron_switchlora.train.engine import Engine

    files = [f"--config={REPOSITORY}/launch/configs/{name}.yaml" for name in payload["files"]]
    config = parse_arguments([*files, *payload["options"]]).config
    model = LlamaForCausalLM(config.model, 32100, mesh.axis("tp"))
    initialize_weights(model, config.train.seed)
    ds_config = resolve_ds_config({"zero_optimization": {"stage": 1}}, config, mesh.size("dp"))
    engine = Engine(model, build_method(config, model, mesh), config, ds_config, mesh, device)
    tokens = torch.randint(32100, (1, config.train.seq_len + 1), generator=torch.Generator().manual_seed(0))
    results = [engine.train_step(step, [tokens]) for step in range(2)]
    return {
        "healthy": all(result.healthy for result in results),
        "losses": [result.loss for result in results],
        "switched": sum(result.switched for result in results),
        "trainable": sum(param.numel() for param in engine.params),
    }
