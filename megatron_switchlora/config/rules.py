"""Rules between the sections of a run configuration; each section's own rules are in its module.

The message of a rule gives the values and what to change. Rules that need the data (lengths, vocabulary) or the world
(mesh, batch) are checked where those are known.
"""

from __future__ import annotations

from fnmatch import fnmatch

from megatron_switchlora.config.checkpoint import check_checkpoint
from megatron_switchlora.config.data import check_data
from megatron_switchlora.config.errors import require
from megatron_switchlora.config.facts import names_where, walk
from megatron_switchlora.config.family import check_model, find_family
from megatron_switchlora.config.field_checks import check_fields
from megatron_switchlora.config.log import check_log
from megatron_switchlora.config.method import METHODS, MethodConfig, method_config_class
from megatron_switchlora.config.optim import check_optim
from megatron_switchlora.config.parallel import check_parallel, require_shard
from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.config.train import check_train


def changeable_options(config: RunConfig) -> list[str]:
    """Return what `checkpoint.allow_changes` may name: options whose facts allow it, and the text."""
    return [*names_where(config, lambda facts: facts["resume"] == "ask"), "data"]


def unread_options(method: MethodConfig) -> list[str]:
    """Return the options below `method` that its method does not read, by dotted name."""
    facts, general = method.facts, ("name", "full_rank_steps", "full_rank_lr")
    unused, unread = set(facts.unused), []
    for name, _, _ in walk(method):
        section = name.split(".")[0]
        reads = section in general or section in facts.reads or section in facts.sections
        if not reads or unused & {name, section}:
            unread.append(f"method.{name}")
    return unread


def unused_options(method: MethodConfig) -> list[str]:
    """Return the options below `method` that are given but change nothing, by dotted name.

    That is no error, since several methods may share a YAML.
    """
    default = method_config_class()(name=method.name)
    default.init = method.init and default.initial  # type: ignore[assignment]  # a run's init is filled in
    usual = {f"method.{name}": value for name, _, value in walk(default)}
    given = {f"method.{name}": value for name, _, value in walk(method)}
    return [name for name in unread_options(method) if given[name] != usual[name]]


def refuse_foreign_sections(method: MethodConfig) -> None:
    """Refuse a section that another method alone reads; one that several read gives only a warning.

    Raises:
        UserError: an option of such a section is given.
    """
    owners: dict[str, list[str]] = {}
    for name, facts in METHODS.items():
        for section in facts.sections:
            owners.setdefault(section, []).append(name)
    own, unused = method.facts.sections, unused_options(method)
    foreign = [name for name, methods in owners.items() if len(methods) == 1 and name not in own]
    for section in foreign:
        given = [name for name in unused if name.startswith(f"method.{section}.")]
        require(
            not given,
            f"{', '.join(given)} {'belongs' if len(given) == 1 else 'belong'} to method.name {owners[section][0]}, not "
            f"{method.name}: leave {'it' if len(given) == 1 else 'them'} out.",
        )


def _check_warm_start(config: RunConfig) -> None:
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


def check_rates(config: RunConfig) -> None:
    """Check the learning rates against what the method has to train.

    Raises:
        UserError: with the rule, the values and what to change.
    """
    o, method = config.optim, config.method
    require(config.lr > 0, f"optim.lr must be positive, not {config.lr}.")
    require(
        o.lora_plus_ratio == 1 or method.facts.adapts,
        f"optim.lora_plus_ratio {o.lora_plus_ratio:g} is B's learning rate over A's, and method.name {method.name} has "
        "no adapters: leave it out, or use lora, relora, switchlora, lte or mhlora.",
    )
    rate = max(config.lr * max(1.0, o.lora_plus_ratio), config.dense_lr, method.full_rank_steps and method.full_rank_lr)
    require(
        o.weight_decay * rate < 1,
        f"optim.weight_decay {o.weight_decay:g} times the largest learning rate {rate:g} must be below 1, or a step "
        "would remove the whole weight: lower one of them.",
    )


def _check_allowed_changes(config: RunConfig) -> None:
    known = changeable_options(config)
    wrong = [
        pattern for pattern in config.checkpoint.allow_changes if not any(fnmatch(name, pattern) for name in known)
    ]
    require(
        not wrong,
        f"checkpoint.allow_changes cannot hold {', '.join(wrong)}: only {', '.join(known)} can change in a run.",
    )


def _check_mesh(config: RunConfig) -> None:
    m, groups = config.model, config.parallel.lte_heads
    require(
        groups == 1 or config.method.facts.merges,
        f"parallel.lte_heads {groups} needs method.name lte, which trains heads separately; it is "
        f"{config.method.name}: set parallel.lte_heads to 1 or change the method.",
    )
    find_family(m.family).check_run(config)
    if m.vocab_size is not None:
        require_shard("The vocabulary", m.vocab_size, config.parallel.tp)


def validate(config: RunConfig) -> None:
    """Check every rule that needs no data and no process group.

    Raises:
        UserError: with the rule, the values and what to change.
    """
    check_fields(config)
    check_model(config.model)
    check_optim(config.optim)
    check_train(config.train)
    check_data(config.data)
    check_parallel(config.parallel)
    check_checkpoint(config.checkpoint)
    check_log(config.log)
    refuse_foreign_sections(config.method)
    require(
        config.method.init != "lora_ga" or config.method.facts.adapts,
        f"method.init lora_ga initialises adapters, and method.name {config.method.name} has none: leave it out.",
    )
    config.method.facts.check(config)
    check_rates(config)
    _check_warm_start(config)
    _check_allowed_changes(config)
    _check_mesh(config)
