"""A method attached to transformers' LLaMA under torch's DistributedDataParallel, on this rank's half of each batch."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from megatron_switchlora import attach
from megatron_switchlora.config.errors import UserError
from tests.dist.engines import start
from tests.library.test_attach import OPTIONS, SWITCH, llama
from tests.plain import make_batches, small_config


def act(payload: dict[str, Any]) -> dict[str, Any]:
    start()
    rank, world = dist.get_rank(), dist.get_world_size()
    refused = ""
    torch.manual_seed(rank)
    try:
        attach(torch.nn.Sequential(torch.nn.Linear(8, 8)), "lora", rank=2, steps=5)
    except UserError as error:
        refused = str(error)
    model = llama()
    run = attach(model, "switchlora", **OPTIONS, switch=SWITCH)
    wrapped = DistributedDataParallel(model)
    schedule, losses = run.scheduler(), []
    for batch in make_batches(small_config(), payload["steps"]):
        mine = batch.chunk(world)[rank]
        logits = wrapped(input_ids=mine[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), mine[:, 1:].flatten())
        loss.backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        schedule.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(float(total) / world)
    state = torch.cat([tensor.double().flatten() for tensor in model.state_dict().values()])
    return {"refused": refused, "losses": losses, "state": hashlib.sha256(state.numpy().tobytes()).hexdigest()}
