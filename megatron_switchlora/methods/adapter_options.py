"""Define the rules and facts that all methods with adapters share."""

from __future__ import annotations

import math
from dataclasses import fields

from megatron_switchlora.config.errors import require
from megatron_switchlora.config.method import LoraGaConfig, MethodFacts
from megatron_switchlora.config.run import AttachedConfig, RunConfig
from megatron_switchlora.model.protocol import projections


class AdapterFacts(MethodFacts):
    """Facts of a method that trains adapters beside a frozen W."""

    reads = frozenset(
        {"rank", "alpha", "rslora", "init", "orthogonal_scale", "compute", "merged_cache", "base_spread", "ga"}
    )

    @property
    def unused(self) -> list[str]:
        method = self.method
        names = [] if method.initial == "semi_orthogonal" else ["orthogonal_scale"]
        splits = method.compute == "split" or self.shares_base or self.quantised
        return [*names, "merged_cache"] if splits else names

    @property
    def default_lr(self) -> float:
        """LoRA's rate in SwitchLoRA's paper (arXiv 2406.06564), which also scales adapters by s = 1 / rank."""
        return 0.01

    def check(self, config: RunConfig) -> None:
        check_adapter(config)


def smaller_sides(config: RunConfig) -> list[int]:
    """Return min(m, n) of each kind of matrix that gets adapters."""
    if isinstance(config, AttachedConfig):
        return [min(shape) for shape in config.shapes]
    return [min(p.out_features, p.in_features) for p in projections(config.model)]


def check_rank(config: RunConfig) -> None:
    """Require that every matrix has at least `method.rank` rows and columns.

    Raises:
        UserError: a matrix is smaller.
    """
    rank, smallest = config.method.rank, min(smaller_sides(config))
    require(
        1 <= rank <= smallest,
        f"method.rank must be between 1 and min(m, n) of every matrix of the decoder, here {smallest}, but it is "
        f"{rank}: lower the rank or widen the model.",
    )


def check_adapter(config: RunConfig) -> None:
    """Check rank, scaling and initial values.

    Raises:
        UserError: an option breaks a rule.
    """
    method = config.method
    check_rank(config)
    alpha = method.alpha
    require(alpha is None or (math.isfinite(alpha) and alpha > 0), f"method.alpha must be positive, not {alpha}.")
    _check_init(config)
    _check_lora_ga(config)
    _check_spread(config)
    _check_precision(config)


def _check_init(config: RunConfig) -> None:
    method, facts = config.method, config.method.facts
    require(
        method.initial != "pissa" or not facts.switches,
        "method.init pissa gives only method.rank vectors (from W), but switching needs min(m, n) candidates: use "
        "method.init switchlora or classic, or method.name lora or relora.",
    )
    require(
        method.initial != "semi_orthogonal" or not facts.switches,
        "method.init semi_orthogonal gives the vectors of one adapter only, but switching needs more candidates of the "
        "same kind: use method.init switchlora or classic.",
    )
    require(
        method.initial != "pissa" or "pissa" in facts.inits,
        f"method.init pissa gives every head of method.name {method.name} the same vectors: use another method.init.",
    )
    require(
        method.initial in facts.inits,
        f"method.name {facts.title} takes method.init {', '.join(sorted(facts.inits))}, not {method.initial}: use one "
        "of them, or leave method.init out.",
    )


def _check_lora_ga(config: RunConfig) -> None:
    method, ga, tp = config.method, config.method.ga, config.parallel.tp
    if method.init != "lora_ga":
        given = [f.name for f in fields(ga) if getattr(ga, f.name) != getattr(LoraGaConfig(), f.name)]
        require(
            not given,
            f"method.ga.{', method.ga.'.join(given)} belong to method.init lora_ga, but method.init is {method.init}: "
            "set method.init to lora_ga, or leave these options out.",
        )
        return
    smallest = min(smaller_sides(config))
    require(
        2 * method.rank <= smallest,
        f"method.init lora_ga takes 2 * method.rank singular pairs of every adapted matrix, which must not exceed "
        f"min(m, n), here {smallest}, but are {2 * method.rank}: lower method.rank to {smallest // 2} or widen the "
        "model.",
    )
    require(
        method.rslora,
        f"method.init lora_ga needs the scaling alpha / sqrt(rank), but method.rslora is {method.rslora}: set it to "
        "true.",
    )
    require(math.isfinite(ga.gamma) and ga.gamma > 0, f"method.ga.gamma must be positive, not {ga.gamma}.")
    require(ga.samples >= 1, f"method.ga.samples must be at least 1, not {ga.samples}.")
    for name in ("oversample", "power_iterations"):
        value = getattr(ga, name)
        require(value is None or value >= 0, f"method.ga.{name} must be at least 0, not {value}.")
    require(
        ga.svd == "randomised" or tp == 1,
        f"method.ga.svd exact needs a matrix's whole gradient on one rank, but parallel.tp is {tp}: use randomised, "
        "and raise method.ga.oversample for more accuracy.",
    )


def _check_spread(config: RunConfig) -> None:
    method, spread = config.method, config.method.base_spread
    if spread == "none":
        return
    require(
        not method.facts.merges,
        f"method.base_spread {spread} spreads the frozen W over data-parallel ranks, which method.name {method.name} "
        "does not support, since its merges rewrite the whole W: set it to none, or use lora, relora or switchlora.",
    )
    require(
        method.compute != "split" and method.merged_cache in ("auto", "accumulation"),
        f"method.base_spread {spread} gathers W + sBA once per step and keeps it, so layers cannot compute with W "
        f"alone or form it again; method.compute is {method.compute} and method.merged_cache is "
        f"{method.merged_cache}: leave both out, or set base_spread to none.",
    )


def _check_precision(config: RunConfig) -> None:
    method, facts = config.method, config.method.facts
    if method.base_precision == "fp32":
        return
    require(
        "base_precision" in facts.reads,
        f"method.base_precision {method.base_precision} rounds the frozen W to 4 bits, and method.name {method.name} "
        + (
            "has an option of its own for its heads: use method.lte.base."
            if facts.merges
            else "would lose what it folds into it, or sums several adapters: use fp32, or method.name lora."
        ),
    )
    require(
        method.compute != "merged" and method.base_spread == "none",
        f"method.base_precision {method.base_precision} computes with W in 4 bits and the adapter apart, so W + sBA is "
        f"never formed or gathered; method.compute is {method.compute} and method.base_spread is {method.base_spread}: "
        "leave both out.",
    )
    check_blocks(config, f"method.base_precision {method.base_precision}")


def check_blocks(config: RunConfig, option: str) -> None:
    """Check that each tensor-parallel rank has whole blocks of a matrix in 4 bits; `option` asks for it.

    Raises:
        UserError: a size is no multiple of a block for each rank.
    """
    m, tp = config.model, config.parallel.tp
    lengths = {"model.hidden_size": m.hidden_size, "model.intermediate_size": m.intermediate_size}
    wrong = [f"{name} {size}" for name, size in lengths.items() if size % (64 * tp)]
    require(
        tp == 1 or not wrong,
        f"{option} with parallel.tp {tp} needs sizes that are multiples of 64 x {tp} (whole blocks of 64 columns per "
        f"rank), but {', '.join(wrong)} is not: change the size or parallel.tp.",
    )
