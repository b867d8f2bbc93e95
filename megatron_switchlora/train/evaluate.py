"""Evaluate a finished run: `--evaluate_only --output_dir RUN`.

Loads `RUN/final` into plain linears and measures the validation loss on the data that the run's own
configuration names, so the number is that of the run's last record.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_switchlora.config import RunConfig
from megatron_switchlora.data.loader import eval_batches
from megatron_switchlora.model.hf import load_merged
from megatron_switchlora.model.llama import LlamaForCausalLM
from megatron_switchlora.parallel.mesh import build_mesh
from megatron_switchlora.parallel.ranks import Ranks
from megatron_switchlora.train.arguments import parse_arguments
from megatron_switchlora.train.engine import mean_loss
from megatron_switchlora.train.trainer import prepare_data, vocabulary_size


def evaluate_run(config: RunConfig, ranks: Ranks, device: torch.device) -> float:
    """Print and return the validation loss of the run in `config.output_dir`.

    Raises:
        UserError: the folder holds no finished run.
    """
    folder = Path(config.output_dir or "")
    stored = parse_arguments(["--config", str(folder / "config.yaml")]).config
    mesh = build_mesh(stored.parallel)
    data = prepare_data(stored, ranks, device)
    model = LlamaForCausalLM(stored.model, vocabulary_size(stored, data))
    load_merged(model, folder / "final")
    train = stored.train
    batches = eval_batches(
        data.val.samples(train.seq_len), train.micro_batch_size, mesh.rank("dp"), mesh.size("dp"), train.eval_samples
    )
    loss = mean_loss(model.to(device), batches, mesh.group("dp"), device)
    if ranks.rank == 0:
        print(f"{folder}: validation loss {loss:.6f}, perplexity {math.exp(min(loss, 700.0)):.3f}", flush=True)
    dist.barrier()
    return loss
