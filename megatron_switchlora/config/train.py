"""The training section of the run configuration, and its rules."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, Optional

from megatron_switchlora.config.errors import require
from megatron_switchlora.config.facts import option


@dataclass
class TrainConfig:
    """Length, batch and numerics of a run."""

    steps: int = option(600, resume="ask", basic=True)
    """Optimizer steps."""
    warmup_steps: int = option(50, resume="ask")
    """Steps of linear warm-up before the cosine to zero."""
    seq_len: int = option(128)
    """Tokens per sample."""
    micro_batch_size: int = option(8, resume="free", results=False)
    """Samples that a rank handles at once."""
    global_batch_size: int = option(32, basic=True)
    """Samples per step, over all ranks and accumulation."""
    epochs: Optional[int] = option(None, resume="ask")
    """Passes over the data at most; by default as many as the steps need. A run whose data ends earlier stops there."""
    seed: int = option(0, swept=True)
    """Seed of initial values, data order and switching draws."""
    precision: Literal["fp32", "bf16"] = option("fp32", resume="ask")
    """Precision of compute and of the communicated gradients; masters, moments and the frozen W are fp32."""
    eval_interval: int = option(200, resume="free", results=False)
    """Steps between evaluations; one is made before the first step and one at the end."""
    eval_samples: Optional[int] = option(None, resume="free")
    """Validation samples to use at most; by default all."""
    activation_checkpointing: bool = option(False, resume="free", results=False)
    """Recompute each decoder layer in the backward pass instead of keeping its activations."""
    deterministic: bool = option(False, resume="free", results=False)
    """Compute the same bits again on a GPU, whose usual attention does not: by torch's deterministic algorithms, which
    are slower. An operation without one ends the run. The CPU computes the same bits in any case."""
    device: Literal["auto", "cpu", "cuda"] = option("auto", resume="free", results=False)
    """auto: one GPU per local rank, or the CPU where there is no GPU."""
    compile: Literal["auto", "on", "off"] = option("auto", resume="free", results=False)
    """Compile norms, rotary embedding, gated activation and loss with torch.compile at the first step.
    auto: on a GPU where its compiler works; plans assume that. Where it does not, norms run in the kernels of NVIDIA's
    apex if these are installed. Results differ by rounding."""
    threads: int = option(0, resume="free", results=False)
    """CPU threads of a rank; 0: OMP_NUM_THREADS or MKL_NUM_THREADS, else the host's usable cores divided by its ranks.
    torchrun sets OMP_NUM_THREADS to 1 for several ranks on a host, unless it is set."""
    check_interval: int = option(100, resume="free", results=False)
    """Steps between checks that replicated tensors are still equal on all ranks that hold them; 0 switches them off."""
    init_from: Optional[str] = option(None, resume="free", path=True)
    """Start from the weights of a model imported by "switchlora convert import", of a checkpoint, or of a run's newest
    checkpoint."""
    stop_after_steps: Optional[int] = option(None, resume="free", results=False, swept=True)
    """End this start of the run after this many of its steps, with a checkpoint; the same command line resumes it."""
    stop_after_seconds: Optional[float] = option(None, resume="free", results=False, swept=True)
    """End this start of the run after this many seconds of training, with a checkpoint; the same command line resumes
    it."""
    profile: Optional[str] = option(None, resume="free", results=False)
    """Steps to trace on rank 0 with torch's profiler, for Perfetto: "5-7" traces steps 5, 6 and 7, at most 100 steps.
    Traced steps are slower."""

    @property
    def profiled(self) -> Optional[tuple[int, int]]:
        """The first and the last step of `profile`, counted from 1."""
        given = re.fullmatch(r"([0-9]{1,9})-([0-9]{1,9})", self.profile or "")
        return (int(given[1]), int(given[2])) if given else None


def check_train(t: TrainConfig) -> None:
    """Check the rules of this section alone.

    Raises:
        UserError: with the rule, the values and what to change.
    """
    for name in ("steps", "seq_len", "micro_batch_size", "global_batch_size", "eval_interval"):
        value = getattr(t, name)
        require(value >= 1, f"train.{name} must be at least 1, not {value}.")
    require(
        0 <= t.warmup_steps <= t.steps,
        f"train.warmup_steps must lie between 0 and train.steps {t.steps}; it is {t.warmup_steps}.",
    )
    for name in ("epochs", "eval_samples", "stop_after_steps"):
        number = getattr(t, name)
        require(number is None or number >= 1, f"train.{name} must be at least 1, not {number}.")
    require(0 <= t.threads <= 4096, f"train.threads must lie between 0 (the cores) and 4096, it is {t.threads}.")
    for name in ("check_interval", "seed"):
        value = getattr(t, name)
        require(value >= 0, f"train.{name} must not be negative, it is {value}.")
    require(
        t.stop_after_seconds is None or t.stop_after_seconds > 0,
        f"train.stop_after_seconds must be positive, not {t.stop_after_seconds}.",
    )
    first, last = t.profiled or (0, 0)
    require(
        t.profile is None or (1 <= first <= last <= t.steps and last - first < 100),
        f"train.profile must be the first and the last step to trace, as 5-7: at most 100 steps, from 1 to train.steps "
        f"{t.steps}; it is {t.profile!r}.",
    )
