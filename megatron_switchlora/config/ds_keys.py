"""Every key that DeepSpeed's JSON may have, with its type and range.

DeepSpeed itself ignores some unknown keys, takes texts for some numbers, and fails late on others. Here `--dry_run`,
tools and runs all check every key. "auto" is accepted where it has one meaning. For batch sizes, clip and precision
that is the value of the run configuration. For the rest of ZeRO it is DeepSpeed's default, so the key is left out.
DeepSpeed's monitors are refused, since the run configuration owns logging. So are keys that hold secrets, since the
JSON is copied into the run folder and its checkpoints.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Optional

from megatron_switchlora.config.errors import require
from megatron_switchlora.config.field_checks import expanded

SECRET = re.compile(r"api.?key|token|secret|passw|credential|private|auth", re.IGNORECASE)
# DeepSpeed's monitors, with what to do instead.
MONITORS = {
    "tensorboard": "set log.tensorboard to true",
    "wandb": "set log.wandb to offline or online, with the key in WANDB_API_KEY",
    "csv_monitor": "read metrics.jsonl in the run folder, which has every step without an option",
    "comet": "set log.tensorboard or log.wandb, or read metrics.jsonl in the run folder; Comet has no option",
}


@dataclass(frozen=True)
class Kind:
    """The values that a key may have; `auto` and `null` add "auto" and null, `path` marks a file or folder."""

    words: str
    types: tuple[type, ...]
    least: Optional[float] = None
    above: bool = False  # above `least`, not equal to it
    choices: tuple[str, ...] = ()
    auto: bool = False
    null: bool = False
    path: bool = False


def _whole(least: int, **more: Any) -> Kind:
    return Kind(f"a whole number from {least}", (int,), least, **more)


FLAG, TEXT = Kind("true or false", (bool,)), Kind("a string", (str,))
AUTO_FLAG = Kind("true or false", (bool,), auto=True)
NULL_FLAG = Kind("true or false", (bool,), auto=True, null=True)
# Sections and the keys they may have.
SECTIONS: dict[str, dict[str, Kind]] = {
    "zero_optimization": {
        "stage": _whole(0), "contiguous_gradients": AUTO_FLAG, "reduce_scatter": AUTO_FLAG,
        "reduce_bucket_size": _whole(1, auto=True), "allgather_partitions": AUTO_FLAG,
        "allgather_bucket_size": _whole(1, auto=True), "overlap_comm": NULL_FLAG,
        "round_robin_gradients": AUTO_FLAG, "offload_optimizer": Kind("an object", (dict, str, bool), null=True),
        "offload_param": Kind("an object", (dict, str, bool), null=True),
    },
    "bf16": {"enabled": AUTO_FLAG},
    "fp16": {"enabled": AUTO_FLAG},
    "amp": {"enabled": AUTO_FLAG},
    "data_types": {"grad_accum_dtype": Kind("a string", (str,), choices=("fp32", "bf16", "fp16"), null=True)},
    "comms_logger": {
        "enabled": AUTO_FLAG, "prof_all": AUTO_FLAG, "prof_ops": Kind("a list of strings", (list,), auto=True),
        "verbose": AUTO_FLAG, "debug": AUTO_FLAG,
    },
    "timers": {"throughput": Kind('{"enabled": false}, or with "synchronized"', (dict,))},
    "flops_profiler": {
        "enabled": FLAG, "recompute_fwd_factor": Kind("a number from 0", (int, float), 0), "profile_step": _whole(1),
        "module_depth": _whole(-1), "top_modules": _whole(1), "detailed": FLAG,
        "output_file": Kind("a string", (str,), null=True, path=True),
    },
}  # fmt: skip
DERIVED = {
    "train_batch_size": _whole(1, auto=True),
    "train_micro_batch_size_per_gpu": _whole(1, auto=True),
    "gradient_accumulation_steps": _whole(1, auto=True),
    "gradient_clipping": Kind("a number from 0", (int, float), 0, auto=True),
    "zero_allow_untested_optimizer": AUTO_FLAG,
}
SCALARS = DERIVED | {
    "steps_per_print": _whole(1, null=True), "wall_clock_breakdown": FLAG, "memory_breakdown": FLAG, "dump_state": FLAG,
    "prescale_gradients": FLAG,
    "gradient_predivide_factor": Kind("a number above 0", (int, float), 0, above=True),
}  # fmt: skip


def checked(given: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of the JSON in which every value has its key's type.

    Whole numbers may be written 5e8 or 500000000, ~ is expanded in paths, and a key that is "auto" is left out.

    Raises:
        UserError: an unknown key, or a value that its key cannot have.
    """
    for monitor, instead in MONITORS.items():
        require(
            monitor not in given,
            f"The DeepSpeed JSON has a section {monitor!r}, but the run configuration owns logging: remove it, and "
            f"{instead}.",
        )
    _refuse_secrets(given, "")
    for section in ("optimizer", "scheduler"):
        require(
            section not in given,
            f"The DeepSpeed JSON sets {section!r}, but the row-step optimizer and its schedule come from the run "
            f"configuration (optim.*): remove {section!r} from the JSON.",
        )
    resolved: dict[str, Any] = {}
    for key, value in given.items():
        require(
            key in SCALARS or key in SECTIONS,
            f"The DeepSpeed JSON sets {key!r}, which is unknown or not proven with the row-step optimizer: remove it. "
            f"Allowed are {', '.join(sorted([*SCALARS, *SECTIONS]))}.",
        )
        if key in SCALARS:
            resolved |= _kept(key, key, value, SCALARS[key])
        else:
            resolved[key] = _section(key, value)
    return resolved


def _section(name: str, given: Any) -> dict[str, Any]:
    require(isinstance(given, dict), f"{name} must be an object in the DeepSpeed JSON, not {type(given).__name__}.")
    known = SECTIONS[name]
    resolved: dict[str, Any] = {}
    for key, value in given.items():
        require(
            key in known,
            f"The DeepSpeed JSON sets {name}.{key}, which is unknown or not proven with the row-step optimizer: remove "
            f"it. Allowed in {name} are {', '.join(sorted(known))}.",
        )
        resolved |= _kept(f"{name}.{key}", key, value, known[key])
    return resolved


def _kept(name: str, key: str, value: Any, kind: Kind) -> dict[str, Any]:
    """Return the key with its value, or nothing where that is DeepSpeed's default."""
    if (value == "auto" and kind.auto) or (value is None and kind.null):
        return {}
    fitting = _fitting(value, kind)
    others = [word for word, may in (('"auto"', kind.auto), ("null", kind.null)) if may]
    words = " or ".join([", ".join(kind.choices) or kind.words, *others])
    require(fitting, f"{name} in the DeepSpeed JSON must be {words}, not {value!r}: change it, or leave it out.")
    if kind.types == (int,):
        value = int(value)
    return {key: expanded(f"{name} in the DeepSpeed JSON", value) if kind.path else value}


def _fitting(value: Any, kind: Kind) -> bool:
    if isinstance(value, float) and kind.types == (int,) and value.is_integer():
        value = int(value)
    if not isinstance(value, kind.types) or (isinstance(value, bool) and bool not in kind.types):
        return False
    if isinstance(value, str):
        return "\0" not in value and (not kind.choices or value in kind.choices)
    if isinstance(value, list):
        return all(isinstance(item, str) for item in value)
    if kind.least is None or not isinstance(value, (int, float)):
        return True
    return math.isfinite(value) and abs(value) < 2**63 and (value > kind.least if kind.above else value >= kind.least)


def _refuse_secrets(given: Any, inside: str) -> None:
    for key, value in given.items() if isinstance(given, dict) else ():
        name = f"{inside}{key}"
        require(
            not SECRET.search(key),
            f"The DeepSpeed JSON has {name}, which looks like a secret, and a run copies the JSON into its folder and "
            "checkpoints, where others may read it: remove it.",
        )
        _refuse_secrets(value, f"{name}.")
