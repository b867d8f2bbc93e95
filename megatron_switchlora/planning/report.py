"""The numbers of a plan, in full and as a row of a table."""

from __future__ import annotations

from typing import Any

from megatron_switchlora.planning.counts import model_flops_per_token
from megatron_switchlora.planning.dry_run import memory_lines
from megatron_switchlora.planning.memory import checkpoint_bytes
from megatron_switchlora.planning.search import WORKSPACE, Plan
from megatron_switchlora.planning.step_time import Machine, flops_per_token


def facts(plan: Plan, vocab_size: int, machine: Machine, disk: float) -> dict[str, Any]:
    """Return the numbers of a plan."""
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
    texts = [f"{count / 1e6:,.1f} MB {'of a GPU' if link == 'within nodes' else 'of a node'} {link}"
             for link, count in by_link.items() if count]  # fmt: skip
    return ", ".join(texts) or "nothing"


def show(plan: Plan, numbers: dict[str, Any]) -> str:
    exposed = ", ".join(f"{kind} {seconds:.3f} s" for kind, seconds in numbers["exposed"].items()) or "none"
    steps, first = plan.config.train.steps, []
    if plan.before:
        before, count = numbers["full_rank"], plan.before.config.train.steps
        first = [f"before it            {count:,} full-rank steps of {before['seconds']:.3f} s in "
                 f"{before['memory'] / 1e9:.1f} GB, sending {links(before['by_link'])}"]  # fmt: skip
        steps += count
    return "\n".join([
        f"{numbers['plan']}.", "",
        *memory_lines(plan.items),
        f"  {'workspace: CUDA, NCCL (assumed)':<50}{WORKSPACE / 1e9:>9.3f}", "",
        *first,
        f"FLOPs per token      {numbers['flops_per_token'] / 1e9:,.3f} G",
        f"sent per step        {links(numbers['by_link'])}",
        f"step                 {numbers['seconds']:.3f} s: compute {numbers['compute']:.3f} s; not hidden: {exposed}",
        f"throughput           {numbers['tokens_per_second']:,.0f} tokens/s, MFU {numbers['mfu']:.1%}; {steps:,} steps "
        f"take {numbers['days']:,.2f} days",
        f"checkpoint           {numbers['checkpoint'] / 1e9:,.2f} GB, written in "
        f"{numbers['checkpoint_seconds']:,.1f} s",
    ])  # fmt: skip


def brief(name: str, numbers: dict[str, Any]) -> str:
    """Return a row of a Markdown table."""
    communication = sum(numbers["exposed"].values())
    cells = [name, numbers["plan"], f"{numbers['memory'] / 1e9:.1f} GB", f"{numbers['compute']:.3f} s",
             f"{communication:.3f} s", f"{numbers['seconds']:.3f} s", f"{numbers['tokens_per_second']:,.0f}",
             f"{numbers['by_link']['between nodes'] / 1e9:,.2f} GB",
             f"{numbers['checkpoint'] / 1e9:,.0f} GB"]  # fmt: skip
    return f"| {' | '.join(cells)} |"
