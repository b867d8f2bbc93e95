"""What a run configuration must fulfil, as far as it needs no data and no process group.

Each rule is a sentence with the values and what to change. Rules that need the data (lengths, vocabulary) or the
world (mesh, batch) stand where those are known, with the helpers of config.py; those of the model's shape alone stand
in rules_model.py, those of the data in rules_data.py.
"""

from __future__ import annotations

from fnmatch import fnmatch

from megatron_switchlora.config.errors import require
from megatron_switchlora.config.facts import names_where, walk
from megatron_switchlora.config.family import find_family
from megatron_switchlora.config.field_checks import check_fields
from megatron_switchlora.config.method import METHODS, MethodConfig, method_config_class
from megatron_switchlora.config.rules_data import validate_data
from megatron_switchlora.config.rules_model import check_model
from megatron_switchlora.config.run import RunConfig, require_shard


def changeable_options(config: RunConfig) -> list[str]:
    """Return what `checkpoint.allow_changes` may name: options that say so, and the text."""
    return [*names_where(config, lambda facts: facts["resume"] == "ask"), "data"]


def unread_options(method: MethodConfig) -> list[str]:
    """Return the options below `method` that its method does not read, by dotted name."""
    facts, general = method.facts, ("name", "full_rank_steps", "full_rank_lr")
    unused, found = set(facts.unused), []
    for name, _, _ in walk(method):
        section = name.split(".")[0]
        reads = section in general or section in facts.reads or section in facts.sections
        if not reads or unused & {name, section}:
            found.append(f"method.{name}")
    return found


def unused_options(method: MethodConfig) -> list[str]:
    """Return the options below `method` that are given and change nothing, by dotted name: a YAML may be shared."""
    default = method_config_class()(name=method.name)
    default.init = method.init and default.initial  # type: ignore[assignment]  # a run's init is filled in
    usual = {f"method.{name}": value for name, _, value in walk(default)}
    given = {f"method.{name}": value for name, _, value in walk(method)}
    return [name for name in unread_options(method) if given[name] != usual[name]]


def _refuse_foreign_sections(method: MethodConfig) -> None:
    """A section that one method alone reads is an error with another; one that several read is a warning."""
    owners: dict[str, list[str]] = {}
    for name, facts in METHODS.items():
        for section in facts.sections:
            owners.setdefault(section, []).append(name)
    own = method.facts.sections
    foreign = [name for name, methods in owners.items() if len(methods) == 1 and name not in own]
    for section in foreign:
        given = [name for name in unused_options(method) if name.startswith(f"method.{section}.")]
        require(
            not given,
            f"{', '.join(given)} {'belongs' if len(given) == 1 else 'belong'} to method.name {owners[section][0]}, not "
            f"{method.name}: leave {'it' if len(given) == 1 else 'them'} out.",
        )


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
            warmup <= t.steps - steps and steps < t.steps,
            f"method.full_rank_steps {steps} of train.steps {t.steps} must leave the method its own warm-up of "
            f"train.warmup_steps {warmup} and a step: lower one of them.",
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
    for name, value in (("lr", config.lr), ("eps", o.eps)):
        require(value > 0, f"optim.{name} must be positive, not {value}.")
    require(
        o.dense_lr is None or o.dense_lr >= 0,
        f"optim.dense_lr must not be negative, it is {o.dense_lr}.",
    )
    ratio = o.lora_plus_ratio
    require(ratio > 0, f"optim.lora_plus_ratio must be positive, not {ratio}.")
    require(
        ratio == 1 or config.method.facts.adapts,
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
    rate = max(config.lr * max(1.0, o.lora_plus_ratio), config.dense_lr, method.full_rank_steps and method.full_rank_lr)
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
    known = changeable_options(config)
    wrong = [pattern for pattern in c.allow_changes if not any(fnmatch(name, pattern) for name in known)]
    require(
        not wrong,
        f"checkpoint.allow_changes cannot hold {', '.join(wrong)}: only {', '.join(known)} can change in a run.",
    )


def _validate_parallel(config: RunConfig) -> None:
    m, tp, groups, seconds = config.model, config.parallel.tp, config.parallel.lte_heads, config.parallel.timeout
    require(groups >= 1, f"parallel.lte_heads must be at least 1, not {groups}.")
    require(
        groups == 1 or config.method.facts.merges,
        f"parallel.lte_heads {groups} needs method.name lte, which trains heads apart; it is {config.method.name}: set "
        "parallel.lte_heads to 1 or change the method.",
    )
    require(tp >= 1, f"parallel.tp must be at least 1, not {tp}.")
    for name in ("start_timeout", "timeout"):
        wait = getattr(config.parallel, name)
        require(
            0 < wait <= 604_800, f"parallel.{name} must be above 0 and at most 604800 seconds, a week; it is {wait}."
        )
    require(seconds >= 1, f"parallel.timeout must be at least 1 second, not {seconds}: 300 suits most.")
    find_family(m.family).check_run(config)
    if m.vocab_size is not None:
        require_shard("The vocabulary", m.vocab_size, tp)


def validate(config: RunConfig) -> None:
    """Check every rule that needs no data and no process group.

    Raises:
        UserError: with the rule, the values and what to change.
    """
    check_fields(config)
    check_model(config.model)
    _refuse_foreign_sections(config.method)
    require(
        config.method.init != "lora_ga" or config.method.facts.adapts,
        f"method.init lora_ga begins adapters, and method.name {config.method.name} has none: leave it out.",
    )
    config.method.facts.check(config)
    _validate_train(config)
    _validate_warm_start(config)
    _validate_stops(config)
    validate_data(config.data)
    _validate_parallel(config)
