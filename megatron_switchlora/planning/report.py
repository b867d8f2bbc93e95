"""The numbers of a plan, in full and as a row of a table."""

from __future__ import annotations

from typing import Any

from megatron_switchlora.planning.counts import model_flops_per_token
from megatron_switchlora.planning.dry_run import memory_lines
from megatron_switchlora.planning.memory import checkpoint_bytes
from megatron_switchlora.planning.search import WORKSPACE, Plan
from megatron_switchlora.planning.step_time import Machine, flops_per_token


def facts(plan: Plan, vocab_size: int, machine: Machine, disk: float) -> dict[str, Any]:
    """The numbers of a plan."""
    train, time = plan.config.train, plan.time
    tokens = train.global_batch_size * train.seq_len
    useful = model_flops_per_token(plan.config.model, vocab_size, train.seq_len) * tokens
    stored = checkpoint_bytes(plan.config, vocab_size)
    return {
        "plan": plan.describe(),
        "memory": plan.peak,
        "seconds": time.seconds,
        "compute": time.compute,
        "exposed": time.exposed,
        "hidden": time.hidden,
        "by_link": time.by_link,
        "flops_per_token": flops_per_token(plan.config, vocab_size, plan.mesh["tp"], plan.micro_batches),
        "tokens_per_second": tokens / time.seconds,
        "mfu": useful / time.seconds / machine.world / machine.gpu.peak(train.precision),
        "days": plan.seconds / 86400,
        "checkpoint": stored,
        "checkpoint_seconds": stored / disk,
        "full_rank": facts(plan.before, vocab_size, machine, disk) if plan.before else None,
    }


def links(by_link: dict[str, float]) -> str:
    found = [f"{count / 1e6:,.1f} MB {'of a GPU' if link == 'within nodes' else 'of a node'} {link}"
             for link, count in by_link.items() if count]  # fmt: skip
    return ", ".join(found) or "nothing"


def show(plan: Plan, found: dict[str, Any]) -> str:
    exposed = ", ".join(f"{kind} {seconds:.3f} s" for kind, seconds in found["exposed"].items()) or "none"
    steps, first = plan.config.train.steps, []
    if plan.before:
        before, count = found["full_rank"], plan.before.config.train.steps
        first = [f"before it            {count:,} full-rank steps of {before['seconds']:.3f} s in "
                 f"{before['memory'] / 1e9:.1f} GB, sending {links(before['by_link'])}"]  # fmt: skip
        steps += count
    return "\n".join([
        f"{found['plan']}.", "",
        *memory_lines(plan.items),
        f"  {'workspace: CUDA, NCCL (assumed)':<50}{WORKSPACE / 1e9:>9.3f}", "",
        *first,
        f"FLOPs a token        {found['flops_per_token'] / 1e9:,.3f} G",
        f"sent a step          {links(found['by_link'])}",
        f"step                 {found['seconds']:.3f} s: compute {found['compute']:.3f} s; not hidden: {exposed}",
        f"throughput           {found['tokens_per_second']:,.0f} tokens/s, MFU {found['mfu']:.1%}; {steps:,} steps "
        f"take {found['days']:,.2f} days",
        f"checkpoint           {found['checkpoint'] / 1e9:,.2f} GB, written in {found['checkpoint_seconds']:,.1f} s",
    ])  # fmt: skip


def brief(name: str, found: dict[str, Any]) -> str:
    """A row of Markdown."""
    communication = sum(found["exposed"].values())
    cells = [name, found["plan"], f"{found['memory'] / 1e9:.1f} GB", f"{found['compute']:.3f} s",
             f"{communication:.3f} s", f"{found['seconds']:.3f} s", f"{found['tokens_per_second']:,.0f}",
             f"{found['by_link']['between nodes'] / 1e9:,.2f} GB", f"{found['checkpoint'] / 1e9:,.0f} GB"]  # fmt: skip
    return f"| {' | '.join(cells)} |"
