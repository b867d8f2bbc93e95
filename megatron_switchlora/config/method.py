"""The method's section of the run configuration: how the decoder's linear layers are trained."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, Optional, Union

# Options that only methods with switches, or with adapters, read.
OF_SWITCHES = (
    "interval0", "switch_ratio", "switch_total_steps", "freeze_steps", "selection", "bank_device", "bank_spread"
)  # fmt: skip
OF_ADAPTERS = ("init", "alpha", "rslora", "compute", "merged_cache")


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

    name: Literal["full", "lora", "relora", "switchlora", "lte", "mhlora", "galore"] = "switchlora"
    """full: every weight; lora: a fixed low-rank adapter; relora: one that is folded into W and begun anew again and
    again; switchlora: adapters whose vectors are switched; lte: heads with adapters and optimizers of their own, merged
    every merge_interval steps; mhlora: their sum in one model; galore: every weight, by Adam in a low-rank space of the
    gradients (needs the package galore-torch)."""
    rank: int = 24
    """Rank r of every adapter; with galore, of every projected gradient."""
    alpha: Optional[float] = None
    """Scaling s = alpha / rank; by default 1 (SwitchLoRA, eq. 4 and 14), and 4096 with lte and mhlora, whose s is large
    (LTE, appendix A), but for initial values whose B is not zero."""
    full_rank_steps: int = 0
    """Steps of full-rank training before the method begins, from the weights that these reach."""
    full_rank_lr: float = 0.001
    """Peak learning rate of the decoder's matrices in those steps."""
    rslora: bool = False
    """Scaling s = alpha / sqrt(rank) instead (rsLoRA, arXiv 2312.03732); LoRA-GA is defined with it."""
    init: Optional[Literal["switchlora", "classic", "pissa", "lora_ga", "semi_orthogonal"]] = None
    """switchlora: A and B uniform with the paper's deviations and W <- W - sBA; classic: A kaiming uniform, B zero;
    pissa: W's principal singular vectors, and W <- W - sBA (not where vectors are switched); lora_ga: singular vectors
    of the gradient at the start (method.ga), likewise; semi_orthogonal: A's rows orthogonal, B zero. By default classic
    with relora, semi_orthogonal with lte and mhlora, else switchlora."""
    ga: LoraGaConfig = field(default_factory=LoraGaConfig)
    """Initial values from the gradient, with init lora_ga."""
    orthogonal_scale: Literal["sqrt_n_r", "sqrt_r_n"] = "sqrt_n_r"
    """Scale of semi-orthogonal rows of length n: sqrt(n / r), as LTE's code has it, or sqrt(r / n), as its paper."""
    local_heads: int = 1
    """LTE heads in one process, which share one W; mhlora: its heads. lte trains parallel.lte_heads times as many."""
    merge_interval: Union[int, Literal["never"]] = 10
    """Steps T between merges of the LTE heads."""
    merge_form: Literal["reset", "resetless"] = "resetless"
    """resetless: factors go on and W is corrected; reset: B starts again at zero (LTE, Algorithm 1)."""
    merge_traffic: Literal["auto", "factors", "delta"] = "auto"
    """What crosses heads in a merge: factors (all-gathered), their mean product (all-reduced); auto: the smaller."""
    redraw_A: bool = False
    """Draw A anew at every merge (with merge_form reset)."""
    inner: Literal["lora", "switchlora"] = "lora"
    """What an LTE head trains with."""
    base: Literal["fp32", "nf4"] = "fp32"
    """How LTE heads hold the frozen W: in fp32, or quantised to 4 bits, with what merges need in host memory."""
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
    restart_interval: int = 5000
    """Steps K between ReLoRA's restarts: fold sBA into W, draw A anew, B zero."""
    restart_warmup: int = 100
    """Steps in which the learning rates climb back to their schedule after a restart."""
    restart_moments: Literal["zero", "prune"] = "zero"
    """What a restart leaves of the adapters' Adam moments: nothing, or the entries of largest magnitude."""
    restart_keep: float = 0.001
    """Share of a moment's entries that restart_moments prune leaves (the paper prunes 99.9 %)."""
    galore_update_gap: int = 200
    """Steps between decompositions of GaLore's gradients."""
    galore_scale: float = 0.25
    """GaLore's scale of the update that is projected back."""
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
    def of_lte(self) -> bool:
        """Whether this is LTE, or what LTE is compared with."""
        return self.name in ("lte", "mhlora")

    @property
    def switches(self) -> bool:
        """Whether vectors are switched."""
        return self.name == "switchlora" or (self.name == "lte" and self.inner == "switchlora")

    @property
    def adapts(self) -> bool:
        """Whether W is frozen beside adapters; else the decoder's matrices train."""
        return self.name not in ("full", "galore")

    @property
    def initial(self) -> str:
        """Initial values of the factors: `init`, or the method's default."""
        if self.of_lte and self.inner == "lora":
            return self.init or "semi_orthogonal"
        return self.init or ("classic" if self.name == "relora" else "switchlora")

    @property
    def unused(self) -> list[str]:
        """Options that are not as by default and that this method does not read: a configuration may be shared."""
        names = [*(() if self.switches else OF_SWITCHES), *(() if self.adapts else OF_ADAPTERS)]
        if not self.adapts or self.initial != "semi_orthogonal":
            names.append("orthogonal_scale")
        if self.adapts and (self.compute == "split" or self.shares_base):
            names.append("merged_cache")
        if self.merge_interval == "never":
            names.append("redraw_A")
        default = type(self)(name=self.name)
        default.init = self.init and default.initial  # type: ignore[assignment]  # a run's init is filled in
        return [name for name in names if getattr(self, name) != getattr(default, name)]

    @property
    def scaling(self) -> float:
        """s in W x + s B A x; of mhlora divided by its heads."""
        alpha = self.alpha
        if alpha is None:
            alpha = 4096.0 if self.of_lte and self.initial in ("semi_orthogonal", "classic") else 1.0
        by = math.sqrt(self.rank) if self.rslora else self.rank
        return alpha / by / (self.local_heads if self.name == "mhlora" else 1)

    @property
    def adapter_rank(self) -> int:
        """Vectors on either side of a layer's adapter: mhlora puts its heads side by side."""
        return self.rank * (self.local_heads if self.name == "mhlora" else 1)

    @property
    def heads_here(self) -> int:
        """Heads in one process that are trained apart."""
        return self.local_heads if self.name == "lte" else 1

    @property
    def shares_base(self) -> bool:
        """Whether heads keep their last merge apart from W, which other heads share, or which is quantised."""
        return self.name == "lte" and (self.local_heads > 1 or self.base == "nf4")

    @property
    def resetless(self) -> bool:
        """Whether merges of LTE heads zero nothing."""
        return self.name == "lte" and self.merge_form == "resetless"

    @property
    def keeps_origins(self) -> bool:
        """Whether LTE heads need their common origin at a merge: switches change W, so that there is none, and a base
        in 4 bits holds too little."""
        return (self.resetless and not self.switches) or (self.name == "lte" and self.base == "nf4")

    @property
    def keeps_initial(self) -> bool:
        """Whether a run keeps A and B of its start: they make an adapter over the base it began from."""
        return self.name == "lora" and self.init == "lora_ga"
