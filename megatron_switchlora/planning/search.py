"""The mesh search: every way to run a configuration on a machine, those that fit, fastest first."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Optional

from megatron_switchlora.config.ds_config import Zero, resolve_ds_config, zero_settings
from megatron_switchlora.config.errors import UserError
from megatron_switchlora.config.method import MethodConfig
from megatron_switchlora.config.rules import validate
from megatron_switchlora.config.run import RunConfig, full_rank_config, method_config
from megatron_switchlora.distributed.mesh import mesh_sizes, ranks_of_host
from megatron_switchlora.planning.memory import Item, memory_items, peak_bytes
from megatron_switchlora.planning.step_time import Machine, StepTime, step_time

WORKSPACE = 2.5e9  # CUDA's context, cuBLAS, NCCL's buffers and the allocator's gaps: assumed


@dataclass(frozen=True)
class Plan:
    """One way to run it; `before` are the full-rank steps that it may begin with, on the same ranks."""

    config: RunConfig
    mesh: dict[str, int]
    zero: Zero
    micro_batches: int
    items: list[Item]
    time: StepTime
    before: Optional[Plan] = None

    @property
    def peak(self) -> float:
        return max(peak_bytes(self.items) + WORKSPACE, self.before.peak if self.before else 0.0)

    @property
    def seconds(self) -> float:
        """Return the seconds of all steps."""
        return self.config.train.steps * self.time.seconds + (self.before.seconds if self.before else 0.0)

    def describe(self) -> str:
        train, method, mesh = self.config.train, self.config.method, self.mesh
        heads = f"lte {mesh['lte']} x " if mesh["lte"] > 1 else ""
        again = ", activations computed again" if train.activation_checkpointing else ""
        again += ", bank spread over dp" if method.facts.switches and method.switch.bank_spread == "dp" else ""
        again += f", W spread over {method.base_spread}" if method.base_spread != "none" else ""
        micro_batches = f"{self.micro_batches} micro-batch{'es' if self.micro_batches > 1 else ''}"
        return (
            f"{heads}dp {mesh['dp']} x tp {mesh['tp']}, ZeRO {self.zero.stage}, {micro_batches} of "
            f"{train.micro_batch_size}{again}"
        )


def make_plan(config: RunConfig, ds_config: dict[str, Any], machine: Machine, vocab_size: int) -> Plan:
    """Plan a run, with the full-rank steps before it.

    Raises:
        UserError: what the run would refuse.
    """
    validate(config)
    return _plan_valid(config, ds_config, machine, vocab_size)


def _plan_valid(config: RunConfig, ds_config: dict[str, Any], machine: Machine, vocab_size: int) -> Plan:
    border = config.method.full_rank_steps
    plan = _plan_phase(method_config(config), ds_config, machine, vocab_size)
    if not border:
        return plan
    first = full_rank_config(config)
    first = replace(first, train=replace(first.train, steps=border))
    return replace(plan, before=_plan_phase(first, ds_config, machine, vocab_size))


def _plan_phase(config: RunConfig, ds_config: dict[str, Any], machine: Machine, vocab_size: int) -> Plan:
    mesh = mesh_sizes(config.parallel, machine.world)
    resolved = resolve_ds_config(ds_config, config, mesh["dp"])
    zero = zero_settings(resolved)
    overlap = zero.stage > 0 and bool(resolved["zero_optimization"].get("overlap_comm"))
    node = ranks_of_host(mesh["dp"], mesh["tp"], machine.gpus)
    return Plan(
        config, mesh, zero, resolved["gradient_accumulation_steps"],
        memory_items(config, vocab_size, mesh["tp"], mesh["dp"], zero, node),
        step_time(config, vocab_size, mesh, zero, machine, overlap),
    )  # fmt: skip


def spreads(method: MethodConfig) -> list[tuple[Any, Any]]:
    """Return the values of `bank_spread` and `base_spread` to try together; "node" is tried if it is configured."""
    facts, base = method.facts, "node" if method.base_spread == "node" else "dp"
    tried = [("tp", "none"), ("dp", "none")] if facts.switches else [("tp", "none")]
    return [*tried, (tried[-1][0], base)] if "base_spread" in facts.reads and not facts.merges else tried


def variants(config: RunConfig, ds_config: dict[str, Any], max_tp: int, kept: Sequence[str]) -> Iterator[tuple]:
    """Yield each configuration to try with its DeepSpeed JSONs; options that are `kept` stay as they are."""
    sizes = [2**power for power in range(20) if 2**power <= max_tp]
    if "parallel.tp" in kept:
        sizes = [config.parallel.tp]
    largest = config.train.global_batch_size // config.parallel.lte_heads
    batches = [size for size in range(1, min(largest, 256) + 1) if largest % size == 0]
    if "train.micro_batch_size" in kept:
        batches = [config.train.micro_batch_size]
    for tp in sizes:
        for micro in batches:
            for again, (bank, base) in product((False, True), spreads(config.method)):
                train = replace(config.train, micro_batch_size=micro, activation_checkpointing=again)
                method = copy.deepcopy(config.method)
                method.switch.bank_spread, method.base_spread = bank, base
                tried = replace(config, method=method, train=train, parallel=replace(config.parallel, tp=tp))
                sections = [{**ds_config.get("zero_optimization", {}), "stage": stage} for stage in (0, 1, 2)]
                yield tried, [{**ds_config, "zero_optimization": section} for section in sections]


def search(
    config: RunConfig,
    ds_config: dict[str, Any],
    machine: Machine,
    max_tp: int,
    vocab_size: int,
    kept: Sequence[str],
) -> list[Plan]:
    """Return the plans that fit, fastest first.

    Plans within a per cent of time are sorted by fewest micro-batches, whose larger products run best, then by memory.

    Raises:
        UserError: nothing runs on these ranks, or nothing fits, with what comes nearest.
    """
    plans, refusals = [], []
    for tried, jsons in variants(config, ds_config, max_tp, kept):
        try:
            validate(tried)
        except UserError as error:
            refusals.append(error)
            continue
        for json_ in jsons:
            try:
                plans.append(_plan_valid(tried, json_, machine, vocab_size))
            except UserError as error:
                refusals.append(error)
    if not plans:
        raise refusals[0]
    fitting = [plan for plan in plans if plan.peak <= machine.gpu.memory]
    if not fitting:
        best = min(plans, key=lambda plan: plan.peak)
        raise UserError(
            f"Nothing fits {machine.gpu.memory / 1e9:.0f} GB: {best.describe()} comes nearest and needs "
            f"{best.peak / 1e9:.1f} GB, most of it {max(best.items, key=lambda item: item.bytes).kind}. Give more GPUs "
            "a node with a larger --max_tp, or another GPU."
        )
    return sorted(fitting, key=lambda plan: (round(100 * math.log(plan.seconds)), plan.micro_batches, plan.peak))
