"""The method's section of the run configuration: how the decoder's linear layers are trained."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, Optional


@dataclass
class LoraGaConfig:
    """Initial values from the gradient (LoRA-GA, arXiv 2407.05000), with method.init lora_ga."""

    vectors: Literal["gradient", "gaussian"] = "gradient"
    """gradient: singular vectors of the gradient; gaussian: normal ones of expected length 1. With scale stable these
    are LoRA-GA and stable output alone, with scale unit the gradient alone and Gaussian (the paper's ablations)."""
    direction: Literal["ArB2r", "A2rBr", "ArBr", "random"] = "ArB2r"
    """Which of the first 2r pairs. ArB2r: A the first r right vectors, B the left vectors r to 2r; A2rBr: the reverse;
    ArBr: in turns, B first; random: drawn from the seed, A's and B's disjoint."""
    scale: Literal["stable", "backward", "gd", "unit", "weight"] = "stable"
    """Length c of every vector. stable: m^(1/4) / sqrt(gamma); backward: n^(1/4) / sqrt(gamma); gd: 1 / s; unit: 1;
    weight: mean of sqrt(sigma / s) over the first r singular values sigma of W."""
    gamma: float = 16.0
    """Divisor in the scales stable and backward: 16 for T5, 64 for LLaMA 7B in the paper."""
    samples: int = 64
    """Training samples over which the gradient is averaged, drawn by the seed."""
    svd: Literal["randomised", "exact"] = "randomised"
    """randomised: on 2r + oversample vectors, of a gradient split over tensor-parallel ranks too; exact: needs tp 1."""
    oversample: Optional[int] = None
    """Vectors beyond 2r of the randomised decomposition; by default 2r more, as in the paper's code."""
    power_iterations: int = 4
    """Passes that sharpen the randomised decomposition."""


@dataclass
class MethodConfig:
    """How the linear layers of the decoder are trained."""

    name: Literal["full", "lora", "switchlora"] = "switchlora"
    """full: every weight; lora: a fixed low-rank adapter; switchlora: adapters whose vectors are switched."""
    rank: int = 24
    """Rank r of every adapter."""
    alpha: float = 1.0
    """Scaling s = alpha / rank (SwitchLoRA, eq. 4 and 14)."""
    rslora: bool = False
    """Scaling s = alpha / sqrt(rank) instead (rsLoRA, arXiv 2312.03732); LoRA-GA is defined with it."""
    init: Literal["switchlora", "classic", "lora_ga"] = "switchlora"
    """switchlora: A and B uniform with the paper's deviations and W <- W - sBA; classic: A kaiming uniform, B zero;
    lora_ga: singular vectors of the gradient at the start (method.ga) and W <- W - sBA."""
    ga: LoraGaConfig = field(default_factory=LoraGaConfig)
    """Initial values from the gradient, with init lora_ga."""
    interval0: float = 40.0
    """Switching interval at the start: r / interval0 vectors a side, layer and step."""
    switch_ratio: float = 0.1
    """The switching rate falls to 0.3 of its start after this share of switch_total_steps."""
    switch_total_steps: Optional[int] = None
    """Length T of the switching schedule in steps; by default train.steps."""
    freeze_steps: int = 5
    """Steps N for which the counterpart of a switched vector is frozen (0 masks the stale gradient once, as 1)."""
    selection: Literal["ring", "random", "independent"] = "ring"
    """ring: positions and candidates in order; random: candidates drawn at random; independent: positions too,
    with separate counts for A and B (Algorithm 2 of the paper)."""
    bank_device: Literal["device", "host"] = "device"
    """Where the candidate vectors live; host memory is pinned when there is a GPU."""
    bank_spread: Literal["tp", "dp"] = "tp"
    """tp: no candidate is held twice over the tensor-parallel ranks, data-parallel ranks hold copies; dp: candidates
    are spread over the data-parallel ranks too."""
    compute: Literal["auto", "merged", "split"] = "auto"
    """merged: form W + sBA, then one dense product; split: W x and s B (A x) apart; auto: whichever costs fewer
    FLOPs, a layer at a time."""
    merged_cache: Literal["micro_batch", "accumulation", "recompute"] = "micro_batch"
    """How long the merged form keeps W + sBA: from a micro-batch's forward to its backward, over all micro-batches of
    a step, or not at all (formed again in backward)."""

    @property
    def scaling(self) -> float:
        """s in W x + s B A x."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def keeps_initial(self) -> bool:
        """Whether a run keeps A and B of its start: they make an adapter over the base it began from."""
        return self.name == "lora" and self.init == "lora_ga"
