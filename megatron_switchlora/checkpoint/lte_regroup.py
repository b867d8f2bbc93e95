"""Resume with another number of LTE heads, or with another placement of heads on ranks and in processes.

Right after a merge every head computes the mean model M. So heads can be added or removed without changing M:
    heads that stay      keep factors, dense tensors and their optimizer state
    new heads            draw factors (and bank) as in a fresh run, LoRA-GA's from gradients of M, with zero moments;
                         new head n copies dense tensors and their moments from head n mod N of the checkpoint's N
    every W and origin   is computed from M and the present factors
Between merges the heads' functions differ, and removing a head would lose its function. That is an error.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_switchlora.checkpoint.engine_state import Engine, fill_slices
from megatron_switchlora.checkpoint.files import Checkpoint
from megatron_switchlora.checkpoint.weights import Weights
from megatron_switchlora.config.errors import require
from megatron_switchlora.config.facts import value_of
from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.distributed.head_names import of_head, split_head
from megatron_switchlora.distributed.slices import TensorSlice, shard_slice
from megatron_switchlora.methods.lte.heads import Merging


def regroups(config: RunConfig, state: dict[str, Any]) -> bool:
    """Return whether the checkpoint's heads differ in number or placement from this run's.

    Raises:
        UserError: they differ, but the checkpoint was not written right after a merge.
    """
    method, facts, stored = config.method, config.method.facts, state["config"]
    if not facts.merges or value_of(stored, "method.name") != method.name:
        return False
    local, groups = value_of(stored, "method.lte.local_heads", 1), value_of(stored, "parallel.lte_heads", 1)
    shared = local > 1 or value_of(stored, "method.lte.base") == "nf4"
    if (local * groups, shared) == (config.heads, facts.shares_base):
        return False
    interval = facts.merge_interval
    require(
        interval is not None and (state["step"] - method.full_rank_steps) % interval == 0,
        f"The checkpoint at step {state['step']} has {groups} x {local} LTE heads (parallel.lte_heads x "
        f"method.lte.local_heads) and this run has {config.parallel.lte_heads} x {facts.heads_here}: heads can change "
        f"only right after a merge, and method.lte.merge_interval is {method.lte.merge_interval}. Give the same heads, "
        "or a checkpoint at such a step.",
    )
    return True


@torch.no_grad()
def load_regrouped(engine: Engine, checkpoint: Checkpoint) -> None:
    """Fill a fresh engine by these rules; call `method.regrouped()` and `method.loaded()` afterwards.

    Raises:
        UserError: tensors are missing or have other shapes.
    """
    method = engine.method
    assert isinstance(method, Merging)
    weights, archive = Weights(checkpoint), checkpoint.archive()
    dense, heads = {*method.dense(), *method.frozen_dense()}, len(weights.heads)

    def fill(held: TensorSlice) -> None:
        head, inner = split_head(held.name)
        name = held.name if head is None else inner.split(":")[0]
        if head is not None and name in dense and head >= heads:
            source = of_head(head % heads, inner)
            held = TensorSlice(source, held.shape, held.offset, held.tensor, held.group)
        of_base = name.endswith((".weight", ".merged_A", ".merged_B", ".origin", ".nf4_codes", ".nf4_scales"))
        if name in dense or (held.name in archive and not of_base):
            archive.fill(held)

    fill_slices(engine, fill, checkpoint.step)
    for name, linear in method.linears.items():
        A, B = linear.factors()
        mean = torch.zeros(B.size(1), A.size(1), device=A.device)
        box = shard_slice(f"{name}.weight", mean, [linear.split], None)
        if box.tensor.numel():
            box.tensor.copy_(weights.read(box.name, box.offset, box.tensor.shape))
        method.set_mean(name, mean)
