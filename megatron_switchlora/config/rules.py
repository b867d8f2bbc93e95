"""What a run configuration must fulfil, as far as it needs no data and no process group.

Each rule is a sentence with the values and what to change. Rules that need the data (lengths, vocabulary) or the
world (mesh, batch) stand where those are known, with the helpers of config.py; those of the model's shape alone stand
in rules_model.py, those of the data in rules_data.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from fnmatch import fnmatch

from megatron_switchlora.config.field_checks import check_fields
from megatron_switchlora.config.rules_data import validate_data
from megatron_switchlora.config.rules_model import check_model
from megatron_switchlora.config.run import LoraGaConfig, RunConfig, require, require_shard

# What a resumed run may be told to change, by `checkpoint.allow_changes`.
CHANGEABLE = (
    "optim.*", "train.steps", "train.warmup_steps", "train.epochs", "train.precision", "method.interval0",
    "method.switch_ratio", "method.switch_total_steps", "method.freeze_steps", "data",
)  # fmt: skip


def _validate_warm_start(config: RunConfig) -> None:
    method, t = config.method, config.train
    steps, warmup = method.full_rank_steps, t.warmup_steps
    require(steps >= 0, f"method.full_rank_steps must not be negative, it is {steps}.")
    rate = method.full_rank_lr
    require(rate > 0, f"method.full_rank_lr must be positive, not {rate}.")
    alone = not steps and rate != type(method)().full_rank_lr
    require(not alone, f"method.full_rank_lr {rate} belongs to method.full_rank_steps, which is 0: give both or none.")
    if steps:
        require(
            method.name != "full",
            "method.full_rank_steps comes before another method, and method.name full trains so throughout: leave it "
            "out.",
        )
        require(
            warmup <= t.steps - steps and steps < t.steps,
            f"method.full_rank_steps {steps} of train.steps {t.steps} must leave the method its own warm-up of "
            f"train.warmup_steps {warmup} and a step: lower one of them.",
        )


def _validate_method(config: RunConfig) -> None:
    method, m = config.method, config.model
    for owner, prefix in (("relora", "restart_"), ("galore", "galore_")):
        if method.name != owner:
            _refuse_foreign(config, owner, [f.name for f in fields(method) if f.name.startswith(prefix)])
    if method.name == "full":
        return
    kv_size = m.kv_heads * m.head_dim
    smallest = min(m.hidden_size, m.intermediate_size, kv_size)
    require(
        1 <= method.rank <= smallest,
        f"method.rank must be between 1 and min(m, n) of every matrix of the decoder, here {smallest}; it is "
        f"{method.rank}: lower the rank or widen the model.",
    )
    if method.name == "galore":
        _validate_galore(config)
        return
    alpha = method.alpha
    require(alpha is None or alpha > 0, f"method.alpha must be positive, not {alpha}.")
    require(
        method.initial != "pissa" or not method.switches,
        "method.init pissa gives method.rank vectors of W itself, but switching needs candidates for all of min(m, n): "
        "use init switchlora or classic, or method.name lora or relora.",
    )
    require(
        method.initial != "pissa" or not method.of_lte,
        f"method.init pissa gives every head of method.name {method.name} the same vectors: use another init.",
    )
    if method.name == "relora":
        _validate_restarts(config)
    if method.switches:
        _validate_switching(config)


def _validate_galore(config: RunConfig) -> None:
    """Its ZeRO stage is ds_config.py's to check, its package methods/__init__.py's."""
    method, tp = config.method, config.parallel.tp
    require(
        tp == 1,
        f"method.name galore takes the singular vectors of whole gradients, and with parallel.tp {tp} a rank has a "
        "part of each: set parallel.tp to 1.",
    )
    require(
        config.train.precision == "fp32",
        f"method.name galore is proven on fp32 parameters alone, train.precision is {config.train.precision}: set it "
        "to fp32.",
    )
    require(
        method.galore_update_gap >= 1, f"method.galore_update_gap must be at least 1, not {method.galore_update_gap}."
    )
    require(
        method.galore_scale > 0,
        f"method.galore_scale must be positive, not {method.galore_scale}.",
    )


def _validate_restarts(config: RunConfig) -> None:
    method, warmup = config.method, config.train.warmup_steps
    require(
        method.restart_interval >= max(1, warmup),
        f"method.restart_interval must be at least 1 and not below train.warmup_steps, or the first warm-up would hide "
        f"a restart's; they are {method.restart_interval} and {warmup}: restart later or warm up for fewer steps.",
    )
    require(
        0 <= method.restart_warmup <= method.restart_interval,
        f"method.restart_warmup must lie between 0 and method.restart_interval {method.restart_interval}, it is "
        f"{method.restart_warmup}: warm up for fewer steps.",
    )
    require(
        0 < method.restart_keep < 1,
        f"method.restart_keep is the share of the moments that a pruning leaves and must lie between 0 and 1, it is "
        f"{method.restart_keep}: for none, give method.restart_moments zero.",
    )


def _validate_switching(config: RunConfig) -> None:
    method, m = config.method, config.model
    require(
        method.initial != "semi_orthogonal",
        "method.init semi_orthogonal gives the vectors of one adapter, and switching needs candidates like them: use "
        "method.init switchlora or classic.",
    )
    require(
        method.rank >= 2, "method.rank 1 cannot switch: A and B switch different positions, so give rank 2 or more."
    )
    largest = m.hidden_size  # of q and o; kv and a narrow feed-forward have less
    require(
        method.rank < largest,
        f"A bank has min(m, n) candidates for each matrix, of which method.rank are live, so method.rank {method.rank} "
        f"leaves nothing to switch in any matrix (min(m, n) is {largest} at most): lower the rank, or use method.name "
        "lora.",
    )
    require(method.freeze_steps >= 0, f"method.freeze_steps must not be negative, it is {method.freeze_steps}.")
    require(method.interval0 > 0, f"method.interval0 must be positive, not {method.interval0}.")
    require(
        method.interval0 >= 2 * method.freeze_steps,
        f"method.interval0 must be at least 2 * method.freeze_steps, or frozen vectors would fill the ring; they are "
        f"{method.interval0:g} and {method.freeze_steps}: raise the interval or freeze for fewer steps.",
    )
    require(method.switch_ratio > 0, f"method.switch_ratio must be positive, not {method.switch_ratio}.")
    total = method.switch_total_steps
    require(total is None or total >= 1, f"method.switch_total_steps must be at least 1, not {total}.")


def _validate_lora_ga(config: RunConfig) -> None:
    method, ga, m, tp = config.method, config.method.ga, config.model, config.parallel.tp
    if method.init != "lora_ga":
        given = [f.name for f in fields(ga) if getattr(ga, f.name) != getattr(LoraGaConfig(), f.name)]
        require(
            not given,
            f"method.ga.{', method.ga.'.join(given)} belong to method.init lora_ga, not {method.init}: give it too, or "
            "leave them out.",
        )
        return
    require(
        method.name in ("lora", "switchlora", "lte"),
        f"method.init lora_ga is for method.name lora, switchlora and lte, not {method.name}: use one of them, or "
        "leave method.init out.",
    )
    smallest = min(m.hidden_size, m.intermediate_size, m.kv_heads * m.head_dim)
    require(
        2 * method.rank <= smallest,
        f"method.init lora_ga takes 2 * method.rank singular pairs of every adapted matrix, at most min(m, n), here "
        f"{smallest}; they are {2 * method.rank}: lower method.rank to {smallest // 2} or widen the "
        "model.",
    )
    require(
        method.rslora,
        f"method.init lora_ga is defined with the scaling alpha / sqrt(rank), and method.rslora is {method.rslora}: "
        "set it to true.",
    )
    require(ga.gamma > 0, f"method.ga.gamma must be positive, not {ga.gamma}.")
    require(ga.samples >= 1, f"method.ga.samples must be at least 1, not {ga.samples}.")
    for name in ("oversample", "power_iterations"):
        value = getattr(ga, name)
        require(value is None or value >= 0, f"method.ga.{name} must not be negative, it is {value}.")
    require(
        ga.svd == "randomised" or tp == 1,
        f"method.ga.svd exact needs a matrix's whole gradient on one rank, but parallel.tp is {tp}: use randomised, "
        "with a larger method.ga.oversample where it must be closer.",
    )


def _validate_train(config: RunConfig) -> None:
    t, o = config.train, config.optim
    for name in ("steps", "seq_len", "micro_batch_size", "global_batch_size", "eval_interval"):
        value = getattr(t, name)
        require(value >= 1, f"train.{name} must be at least 1, not {value}.")
    require(
        0 <= t.warmup_steps <= t.steps,
        f"train.warmup_steps must lie between 0 and train.steps {t.steps}; it is {t.warmup_steps}.",
    )
    require(t.epochs is None or t.epochs >= 1, f"train.epochs must be at least 1, not {t.epochs}.")
    require(
        t.eval_samples is None or t.eval_samples >= 1, f"train.eval_samples must be at least 1, not {t.eval_samples}."
    )
    require(0 <= t.threads <= 4096, f"train.threads must lie between 0 (the cores) and 4096, it is {t.threads}.")
    require(t.check_interval >= 0, f"train.check_interval must not be negative, it is {t.check_interval}.")
    require(t.seed >= 0, f"train.seed must not be negative, it is {t.seed}.")
    for name in ("lr", "eps"):
        value = getattr(o, name)
        require(value > 0, f"optim.{name} must be positive, not {value}.")
    require(
        o.dense_lr is None or o.dense_lr >= 0,
        f"optim.dense_lr must not be negative, it is {o.dense_lr}.",
    )
    ratio = o.lora_plus_ratio
    require(ratio > 0, f"optim.lora_plus_ratio must be positive, not {ratio}.")
    require(
        ratio == 1 or config.method.adapts,
        f"optim.lora_plus_ratio {ratio:g} is B's learning rate over A's, and method.name {config.method.name} has no "
        "adapters: leave it out, or use lora, relora, switchlora, lte or mhlora.",
    )
    for name in ("beta1", "beta2"):
        value = getattr(o, name)
        require(0 <= value < 1, f"optim.{name} must lie in [0, 1), it is {value}.")
    require(
        o.clip >= 0,
        f"optim.clip must not be negative (0 switches it off), it is {o.clip}.",
    )
    _validate_decay(config)


def _validate_decay(config: RunConfig) -> None:
    o, method = config.optim, config.method
    require(o.weight_decay >= 0, f"optim.weight_decay must not be negative, it is {o.weight_decay}.")
    rate = max(o.lr * max(1.0, o.lora_plus_ratio), config.dense_lr, method.full_rank_steps and method.full_rank_lr)
    require(
        o.weight_decay * rate < 1,
        f"optim.weight_decay {o.weight_decay:g} times the largest learning rate {rate:g} must be below 1, or a step "
        "would take all of a weight away: lower one of them.",
    )


def _validate_stops(config: RunConfig) -> None:
    t, c = config.train, config.checkpoint
    require(
        t.stop_after_steps is None or t.stop_after_steps >= 1,
        f"train.stop_after_steps must be at least 1, not {t.stop_after_steps}.",
    )
    require(
        t.stop_after_seconds is None or t.stop_after_seconds > 0,
        f"train.stop_after_seconds must be positive, not {t.stop_after_seconds}.",
    )
    for name in ("interval", "keep_every"):
        value = getattr(c, name)
        require(value >= 0, f"checkpoint.{name} must not be negative, it is {value}.")
    require(c.keep_last >= 1, f"checkpoint.keep_last must be at least 1, not {c.keep_last}.")
    wrong = [n for n in c.allow_changes if not any(fnmatch(n, p) or n == p for p in CHANGEABLE)]
    require(
        not wrong,
        f"checkpoint.allow_changes cannot hold {', '.join(wrong)}: only {', '.join(CHANGEABLE)} can change in a run.",
    )


# Options of method.name lte; those of mhlora are the first two.
OF_LTE = (
    "local_heads", "orthogonal_scale", "merge_interval", "merge_form", "merge_traffic", "redraw_A", "inner", "base"
)  # fmt: skip


def _refuse_foreign(config: RunConfig, owner: str, options: Iterable[str]) -> None:
    """Raises: UserError, if options of another method are given."""
    method = config.method
    given = [f.name for f in fields(method) if f.name in options and getattr(method, f.name) != f.default]
    require(
        not given,
        f"method.{', method.'.join(given)} belong to method.name {owner}, not {method.name}: leave them out.",
    )


def _validate_lte(config: RunConfig) -> None:
    method, train, groups = config.method, config.train, config.parallel.lte_heads
    require(groups >= 1, f"parallel.lte_heads must be at least 1, not {groups}.")
    require(
        groups == 1 or method.name == "lte",
        f"parallel.lte_heads {groups} needs method.name lte, which trains heads apart; it is {method.name}: set "
        "parallel.lte_heads to 1 or change the method.",
    )
    if method.name not in ("lte", "mhlora"):
        _refuse_foreign(config, "lte or mhlora", OF_LTE[:2])
    if method.name != "lte":
        _refuse_foreign(config, "lte", OF_LTE[2:])
    require(method.local_heads >= 1, f"method.local_heads must be at least 1, not {method.local_heads}.")
    if method.name != "lte":
        return
    interval = method.merge_interval
    require(
        isinstance(interval, str) or interval >= 1,
        f"method.merge_interval must be at least 1 step, or never; it is {interval}.",
    )
    require(
        train.micro_batch_size % method.local_heads == 0,
        f"train.micro_batch_size {train.micro_batch_size} must be a multiple of method.local_heads "
        f"{method.local_heads}, since each head takes its part of a micro-batch: change one of them.",
    )
    require(
        train.global_batch_size % config.heads == 0,
        f"train.global_batch_size {train.global_batch_size} must be a multiple of the {config.heads} LTE heads "
        f"(parallel.lte_heads {groups} x method.local_heads {method.local_heads}): change one of them.",
    )
    if method.inner == "switchlora":
        _validate_switching_heads(config)
    _validate_merges(config)


def _validate_merges(config: RunConfig) -> None:
    method, m, tp = config.method, config.model, config.parallel.tp
    resets = method.merge_form == "reset"
    require(
        not resets or method.initial in ("semi_orthogonal", "classic"),
        f"method.merge_form reset starts with B = 0 and one W for all heads, which method.init {method.initial} does "
        "not: use semi_orthogonal or classic, or merge_form resetless.",
    )
    require(
        resets or not method.redraw_A,
        "method.redraw_A true needs method.merge_form reset: where B is not zero, another A would change the function.",
    )
    require(
        not method.shares_base or method.compute != "merged",
        f"method.compute merged forms W + sBA, and heads over a base that is shared (method.local_heads "
        f"{method.local_heads}) or in 4 bits (method.base {method.base}) compute beside it: use auto or split.",
    )
    lengths = {"model.hidden_size": m.hidden_size, "model.intermediate_size": m.intermediate_size}
    wrong = [f"{name} {size}" for name, size in lengths.items() if method.base == "nf4" and size % (64 * tp)]
    require(
        tp == 1 or not wrong,
        f"method.base nf4 at parallel.tp {tp} needs sizes that are multiples of 64 x {tp}, the blocks of a rank's "
        f"columns, and {', '.join(wrong)} is not: change the size or parallel.tp.",
    )


def _validate_switching_heads(config: RunConfig) -> None:
    method = config.method
    require(
        not method.shares_base,
        f"method.inner switchlora rewrites each head's own W, so heads cannot share one (method.local_heads "
        f"{method.local_heads}, method.base {method.base}): give each its ranks with parallel.lte_heads, in fp32.",
    )
    require(
        method.merge_form == "resetless" and method.merge_traffic != "factors",
        f"method.inner switchlora merges reset-less and by weights, since switches have changed them; "
        f"method.merge_form is {method.merge_form} and method.merge_traffic {method.merge_traffic}: leave both out.",
    )


def _validate_parallel(config: RunConfig) -> None:
    m, tp, seconds = config.model, config.parallel.tp, config.parallel.timeout
    require(tp >= 1, f"parallel.tp must be at least 1, not {tp}.")
    for name in ("start_timeout", "timeout"):
        wait = getattr(config.parallel, name)
        require(
            0 < wait <= 604_800, f"parallel.{name} must be above 0 and at most 604800 seconds, a week; it is {wait}."
        )
    require(seconds >= 1, f"parallel.timeout must be at least 1 second, not {seconds}: 300 suits most.")
    for name, count in (("num_heads", m.num_heads), ("num_kv_heads", m.kv_heads)):
        require(
            count % tp == 0,
            f"model.{name} {count} must be a multiple of parallel.tp {tp}, since a rank holds whole heads: change one "
            "of them.",
        )
    require_shard("model.intermediate_size", m.intermediate_size, tp)
    if m.vocab_size is not None:
        require_shard("The vocabulary", m.vocab_size, tp)


def validate(config: RunConfig) -> None:
    """Check every rule that needs no data and no process group.

    Raises:
        UserError: with the rule, the values and what to change.
    """
    check_fields(config)
    check_model(config.model)
    _validate_method(config)
    _validate_lora_ga(config)
    _validate_train(config)
    _validate_warm_start(config)
    _validate_stops(config)
    validate_data(config.data)
    _validate_parallel(config)
    _validate_lte(config)
