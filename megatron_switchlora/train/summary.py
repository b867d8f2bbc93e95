"""Describe a run in a few sentences at its start and at its end."""

from __future__ import annotations

import os
from statistics import mean, median

import torch

from megatron_switchlora.checkpoint.resume import ResumePoint
from megatron_switchlora.distributed.mesh import AXES, Mesh
from megatron_switchlora.lowrank.nf4 import bitsandbytes_works
from megatron_switchlora.model.protocol import family_of
from megatron_switchlora.planning.traffic import describe_saving, full_rank_bytes
from megatron_switchlora.run.folder import RunFolder
from megatron_switchlora.run.metrics_log import perplexity
from megatron_switchlora.startup.environment import cpu_threads
from megatron_switchlora.train.context import RunContext


def describe_start(context: RunContext, mesh: Mesh, resume_point: ResumePoint) -> list[str]:
    """Return lines that report what is trained, on which mesh and data, and from which checkpoint."""
    config, counts = context.config, context.counts
    sizes = " x ".join(f"{axis} {mesh.size(axis)}" for axis in AXES)
    _, source = cpu_threads(config.train.threads, context.ranks.local_size, os.environ)
    heads = f" in each of {config.heads} heads" if config.heads > 1 else ""
    lines = [
        f"{config.method.name}: {counts.trainable / 1e6:.2f} M of {counts.full_total / 1e6:.2f} M parameters train"
        f"{heads} ({counts.trainable / counts.full_total:.1%}); mesh {sizes} on "
        f"{context.device.type}, CPU threads per rank {torch.get_num_threads()} (by {source}); "
        f"{len(context.train_samples)} training and {len(context.val_samples)} validation samples of "
        f"{config.train.seq_len} tokens; a unigram model reaches perplexity {context.data.unigram_val_ppl:.1f}"
    ]
    if config.method.facts.quantised:
        by = "bitsandbytes" if bitsandbytes_works(context.device) else "plain torch, much slower than bitsandbytes"
        lines.append(f"the base is in 4 bits, dequantised by {by}")
    if resume_point.checkpoint:
        lines.append(f"resumes after step {resume_point.step} from {resume_point.checkpoint.folder}")
    if context.last_step < config.train.steps:
        lines.append(
            f"the data ends after {context.last_step} of {config.train.steps} steps "
            f"(train.epochs {config.train.epochs}), where the run will stop"
        )
    return lines


def describe_end(context: RunContext, mesh: Mesh, run: RunFolder, val_loss: float, seconds: float) -> str:
    """Return the summary of a finished run.

    It reports what was trained, how well and how fast, what the method saved, where the results are, and what to try
    next. Lines without records are left out.
    """
    config, counts = context.config, context.counts
    steps = [record for record in run.history if "loss" in record]
    dp, tokens = mesh.size("dp"), config.train.global_batch_size * config.train.seq_len
    speeds = [record["tokens_per_second"] for record in steps if "tokens_per_second" in record]
    lines = [
        f"Trained a {family_of(config.model).title} of {counts.full_total / 1e6:.2f} M parameters with "
        f"{config.method.name}: {context.last_step} steps, {context.last_step * tokens / 1e6:.2f} M tokens, "
        f"{dp} data-parallel rank{'s' if dp > 1 else ''}, {seconds:.0f} s.",
        f"Validation perplexity: {perplexity(val_loss):.2f} (unigram model of the training tokens on the "
        f"same text: {context.data.unigram_val_ppl:.2f}).",
        *([f"Speed: {median(speeds):,.0f} tokens per second (median step)."] if speeds else []),
        f"Trainable: {counts.trainable:,} of {counts.full_total:,} parameters, "
        f"{counts.trainable / counts.full_total:.1%}"
        + (f", in each of {config.heads} heads." if config.heads > 1 else "."),
    ]
    if dp > 1 and steps and "dp_bytes" in steps[-1]:
        given = steps[-1]["dp_bytes"]
        full = full_rank_bytes(given, config, context.vocab_size, mesh.size("tp"))
        lines.append(
            f"Gradient bytes per step and rank: {given / 1e6:.2f} MB recorded; full-rank training of this model: "
            f"{full / 1e6:.2f} MB (by its parameter count), so {describe_saving(given, full)}."
        )
    merges = [record["merge_bytes"] for record in steps if "merge_bytes" in record]  # full-rank steps have none
    if merges:
        lines.append(f"Between heads: no gradients; merges, {mean(merges) / 1e6:.3f} MB per step and rank on average.")
    lines += [
        f"Run folder: {run.path} (loss.png, metrics.jsonl, final/ for transformers).",
        f'Next: switchlora generate {run.path} "def "',
    ]
    return "\n".join(lines)
