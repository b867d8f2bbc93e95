"""The few sentences at the end of a run."""

from __future__ import annotations

import math
from statistics import median

from megatron_switchlora.train.trainer import Trainer


def closing_words(trainer: Trainer, val_loss: float, seconds: float) -> str:
    """What was trained, how well, how fast, what it saved, where it is, what to try next."""
    config, counts, run = trainer.config, trainer.counts, trainer.run
    steps = [record for record in run.history if "loss" in record]
    dp = trainer.mesh.size("dp")
    lines = [
        f"Trained a {counts.full_total / 1e6:.2f} M parameter LLaMA with {config.method.name} for {len(steps)} steps "
        f"({steps[-1]['tokens'] / 1e6:.2f} M tokens) on {dp} data-parallel rank{'s' if dp > 1 else ''} in {seconds:.0f} s.",
        f"Validation perplexity {math.exp(val_loss):.2f}; the training tokens' unigram model has "
        f"{trainer.data.unigram_val_ppl:.2f} on the same text.",
        f"Speed: {median(r['tokens_per_second'] for r in steps):,.0f} tokens a second (median step).",
        f"Trainable: {counts.trainable:,} of {counts.full_total:,} parameters ({counts.trainable / counts.full_total:.1%}).",
    ]
    if dp > 1:
        measured = steps[-1]["dp_bytes"]
        lines.append(
            f"Gradient traffic: {measured / 1e6:.2f} MB a step handed to data-parallel collectives by each rank (recorded); "
            f"full-rank training hands over {full_rank_bytes(trainer) / 1e6:.2f} MB (its gradients in the same precision)."
        )
    lines += [
        f"Run folder: {run.path} (loss.png, metrics.jsonl, final/ for transformers).",
        f'Next, try: .venv/bin/python tools/generate.py {run.path} "def "',
    ]
    return "\n".join(lines)


def full_rank_bytes(trainer: Trainer) -> int:
    """Gradient bytes a step of full-rank training in this run's setting: the measured bytes, scaled by parameters."""
    steps = [record for record in trainer.run.history if "loss" in record]
    return round(steps[-1]["dp_bytes"] * trainer.counts.full_total / trainer.counts.trainable)
