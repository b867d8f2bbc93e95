"""`--dry_run`: what a run would be, from its configuration alone.

Prints mesh and batch, parameters by group, a rank's memory by kind and the gradient bytes of a step,
for any number of ranks. Reads no data, no tokenizer and no network, and needs neither GPU nor process
group; what a run refuses of its configuration is refused here with the same message (not a used output
folder or a missing GPU: the plan may be for another machine).
"""

from __future__ import annotations

from typing import Any

from megatron_switchlora.config.ds_config import Zero, resolve_ds_config, zero_settings
from megatron_switchlora.config.errors import UserError
from megatron_switchlora.config.parallel import require_shard
from megatron_switchlora.config.run import RunConfig, accumulation_steps, full_rank_config
from megatron_switchlora.distributed.mesh import mesh_sizes
from megatron_switchlora.planning.counts import HOST, count_run
from megatron_switchlora.planning.memory import Item, memory_items, peak_bytes, phase_bytes
from megatron_switchlora.planning.traffic import describe_saving, gradient_bytes, merge_bytes

PHASES = {"always": "throughout", "backward": "forward and backward", "step": "optimizer step"}


def plan(config: RunConfig, given_ds_config: dict[str, Any], world_size: int) -> str:
    """Return the report. `given_ds_config` is the user's DeepSpeed JSON.

    Raises:
        UserError: what the run would refuse, or a vocabulary that only the tokenizer knows.
    """
    mesh = mesh_sizes(config.parallel, world_size)
    zero = zero_settings(resolve_ds_config(given_ds_config, config, mesh["dp"]))
    vocab_size, source = planned_vocabulary(config)
    items = memory_items(config, vocab_size, mesh["tp"], mesh["dp"], zero)
    before = _full_rank_phase(config, vocab_size, world_size, zero) if config.method.full_rank_steps else []
    sections = [
        _setting(config, mesh, zero, f"{vocab_size:,} ({source})"),
        _parameters(config, vocab_size, mesh["tp"]),
        memory_lines(items) + before,
        _gradients(config, vocab_size, mesh, zero),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections)


def _full_rank_phase(config: RunConfig, vocab_size: int, world_size: int, zero: Zero) -> list[str]:
    first = full_rank_config(config)
    mesh = mesh_sizes(first.parallel, world_size)
    peak = peak_bytes(memory_items(first, vocab_size, mesh["tp"], mesh["dp"], zero))
    unit, scale = ("GB", 1e9) if peak >= 1e9 else ("MB", 1e6)
    return [f"  the {config.method.full_rank_steps} full-rank steps before it peak at {peak / scale:.3f} {unit}"]


def planned_vocabulary(config: RunConfig) -> tuple[int, str]:
    """Return the size of the vocabulary and where it is written, without a tokenizer."""
    model, data = config.model, config.data
    if model.vocab_size is not None:
        size, source = model.vocab_size, "model.vocab_size"
    elif data.tokenizer == "bpe":
        size, source = data.vocab_size, "data.vocab_size; a small corpus may train a smaller tokenizer"
    else:
        raise UserError(
            f"--dry_run does not read data.tokenizer {data.tokenizer!r}: give the vocabulary as model.vocab_size."
        )
    require_shard("The vocabulary", size, config.parallel.tp)
    return size, source


def _setting(config: RunConfig, mesh: dict[str, int], zero: Zero, vocabulary: str) -> list[str]:
    train, method = config.train, config.method
    micro_batches = accumulation_steps(config, mesh["dp"])
    tokens = train.global_batch_size * train.seq_len
    rank = f" at rank {method.rank}" if "rank" in method.facts.reads else ""
    hosts = f"; W spread over hosts of {HOST} ranks" if method.base_spread == "node" else ""
    sums = ", micro-batches summed in fp32" if zero.fp32_accumulation else ""
    return [
        f"Dry run of {method.name}{rank}: nothing is read, trained or written.",
        f"mesh        lte {mesh['lte']} x dp {mesh['dp']} x tp {mesh['tp']}; ZeRO stage {zero.stage}{sums}; "
        f"{train.precision}{hosts}",
        f"batch       {train.global_batch_size} samples of {train.seq_len} tokens; a rank runs {micro_batches} x "
        f"{train.micro_batch_size} (micro-batches x samples)",
        f"length      {train.steps:,} steps of {tokens:,} tokens, {train.steps * tokens / 1e6:,.1f} M tokens",
        f"vocabulary  {vocabulary}",
    ]


def _parameters(config: RunConfig, vocab_size: int, tp: int) -> list[str]:
    """List parameters: totals count each once, unpadded; the last column is what a rank holds, padded."""
    whole, here = count_run(config, vocab_size), count_run(config, vocab_size, tp)
    parts = {"decoder matrices": "matrices", **{part: part for part in ("adapters", "embedding", "head", "norms")}}
    rows = [
        *((name, whole.trained[part], whole.fixed[part], here[part]) for name, part in parts.items()),
        ("total", whole.trainable, whole.fixed.total(), here.trainable + here.fixed.total()),
        ("full-rank training", whole.full_total, 0, here.full_total),
    ]
    lines = [f"{'parameters':<20}{'trainable':>27}{'frozen':>27}{'on a rank':>18}"]
    for name, trainable, frozen, local in rows:
        if local:
            lines.append(f"  {name:<18}{_millions(trainable):>27}{_millions(frozen):>27}{local:>18,}")
    return lines


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f} M {count:>15,}" if count else "-"


def memory_lines(items: list[Item]) -> list[str]:
    """Return a rank's memory by phase and kind."""
    peak = peak_bytes(items)
    unit, scale = ("GB", 1e9) if peak >= 1e9 else ("MB", 1e6)
    lines = [f"{'memory of a rank':<52}{unit:>9}"]
    for phase, title in PHASES.items():
        in_phase = [item for item in items if item.phase == phase]
        lines.append(f"  {title:<50}{phase_bytes(items, phase) / scale:>9.3f}")  # type: ignore[arg-type]
        lines += [f"    {item.kind:<48}{item.bytes / scale:>9.3f}" for item in in_phase]
    lines.append(f"  {'peak: throughout + the larger phase (estimate)':<50}{peak / scale:>9.3f}")
    lines += [f"  {item.kind:<50}{item.bytes / scale:>9.3f}" for item in items if item.phase == "host"]
    return lines


def _gradients(config: RunConfig, vocab_size: int, mesh: dict[str, int], zero: Zero) -> list[str]:
    given, full = gradient_bytes(config, vocab_size, mesh["tp"], mesh["dp"], zero)
    merges = merge_bytes(config, vocab_size, mesh["tp"])
    every = config.method.facts.merge_interval
    across = [
        f"Merge of {config.heads} LTE heads: a rank hands {merges / 1e6:,.2f} MB to the others, "
        + ("never" if every is None else f"every {every} steps ({merges / every / 1e6:,.2f} MB per step)")
        + "; nothing else crosses heads but 32 bytes per step."
    ]
    return _gradient_lines(given, full, zero) + (across if mesh["lte"] > 1 else [])


def _gradient_lines(given: int, full: int, zero: Zero) -> list[str]:
    if not given:
        return ["Gradient bytes per step and rank: 0, with one data-parallel rank."]
    often = "once per micro-batch" if zero.stage == 2 else "once per step"
    return [
        f"Gradient bytes per step and rank: {given / 1e6:,.2f} MB, reduced {often}; full-rank training in this "
        f"setting: {full / 1e6:,.2f} MB, so {describe_saving(given, full)}."
    ]
