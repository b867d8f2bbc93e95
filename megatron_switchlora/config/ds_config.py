"""DeepSpeed's JSON: which settings it may have, and which the run configuration fills in.

The JSON owns stage, buckets, overlap and accumulation type. Batch sizes, clip and precision belong to the run
configuration, which writes them into the resolved JSON. A file that sets one of them to another value is refused, with
both values. So are DeepSpeed's monitors, since the run configuration owns logging (log.*).

Only settings that are proven with the row-step optimizer are accepted (`ds_keys.SECTIONS`). Stage 3, stock optimizers,
fp16, offload, bf16 moments and others are refused.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from megatron_switchlora.config.ds_keys import checked
from megatron_switchlora.config.errors import UserError, require
from megatron_switchlora.config.field_checks import expanded
from megatron_switchlora.config.run import RunConfig, accumulation_steps
from megatron_switchlora.shipped import given_or_shipped


@dataclass(frozen=True)
class Zero:
    """ZeRO's settings.

    Attributes:
        stage: the ZeRO stage.
        fp32_accumulation: whether micro-batches accumulate in fp32 (BF16_Optimizer).
        bucket: elements of the buckets in which stages 1 and 2 reduce.
    """

    stage: int = 1
    fp32_accumulation: bool = False
    bucket: int = 500_000_000


def read_ds_config(path: Optional[str]) -> dict[str, Any]:
    """Read the file, or return that of ZeRO stage 1 without one; values have their keys' types (`ds_keys.checked`).

    Raises:
        UserError: the file is missing, is no valid JSON object, holds a key twice, or has a value that its key cannot
            have.
    """
    if path is None:
        path = "zero1"
    try:
        file = given_or_shipped(Path(expanded("--ds_config", path)), "ds_configs", ".json")
        text = file.read_text(encoding="utf-8")
        content = json.loads(text, object_pairs_hook=_no_key_twice)
    except OSError as error:
        raise UserError(
            f"--ds_config {path} cannot be read: {error.strerror}. Give a file of ds_configs/, or its name."
        ) from None
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"--ds_config {path} is not valid JSON: {error}.") from None
    except RecursionError:
        raise UserError(f"--ds_config {path} is not valid JSON: it is nested too deeply.") from None
    require(isinstance(content, dict), f"--ds_config {path} must hold a JSON object, not {type(content).__name__}.")
    return checked(content)


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    section = dict(pairs)
    twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    if twice:
        raise ValueError(f"{twice[0]!r} occurs twice, and one of them would be lost: keep one")
    return section


def _refuse_unsupported(given: dict[str, Any], precision: str) -> None:
    """Refuse settings that are not supported; drop those that switch offload off.

    `given` is what `ds_keys.checked` returns.

    Raises:
        UserError: a setting is not supported.
    """
    zero = given.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    require(
        stage in (0, 1, 2),
        f"zero_optimization.stage must be 0, 1 or 2, it is {stage!r}: stage 3 partitions the frozen weights that "
        "switching rewrites; use ds_configs/zero2.json.",
    )
    for section in ("fp16", "amp"):
        require(
            not given.get(section, {}).get("enabled", False),
            f"The DeepSpeed JSON enables {section!r}, which is not supported: use train.precision bf16 or fp32.",
        )
    require(
        not zero.get("round_robin_gradients", False),
        "zero_optimization.round_robin_gradients true reorders ZeRO's flat partitions, for which row resets are not "
        "proven: set it to false.",
    )
    for key in ("offload_optimizer", "offload_param"):
        offload = zero.get(key)
        device = offload.get("device", "none") if isinstance(offload, dict) else offload
        require(device in (None, "none", False), f"zero_optimization.{key} to {device!r} is not supported: remove it.")
        zero.pop(key, None)
    accumulate = given.get("data_types", {}).get("grad_accum_dtype")
    require(
        accumulate in (None, precision) or (accumulate == "fp32" and stage == 1),
        f"data_types.grad_accum_dtype {accumulate!r} does not go with train.precision {precision!r} at ZeRO stage "
        f"{stage}: fp32 accumulation of bf16 gradients needs stage 1; else leave it out.",
    )
    timers = given.get("timers", {}).get("throughput", {})
    require(
        all(key in ("enabled", "synchronized") and isinstance(value, bool) for key, value in timers.items()),
        f"timers.throughput in the DeepSpeed JSON has enabled and synchronized, each true or false, not {timers}: "
        "change it, or leave timers out.",
    )
    _refuse_prescaling(given, stage)


def _refuse_prescaling(given: dict[str, Any], stage: int) -> None:
    scatters = stage == 2 and given.get("zero_optimization", {}).get("reduce_scatter", True)
    factor, before = given.get("gradient_predivide_factor", 1.0), given.get("prescale_gradients", False)
    require(
        not scatters or (factor == 1 and not before),
        f"gradient_predivide_factor {factor:g} and prescale_gradients {before} do not go with ZeRO stage {stage} that "
        "scatters: leave them out, or set zero_optimization.reduce_scatter to false.",
    )


def resolve_ds_config(given: dict[str, Any], config: RunConfig, dp: int) -> dict[str, Any]:
    """Return the JSON with the run configuration's values filled in.

    Raises:
        UserError: a setting is not supported, or contradicts the run configuration.
    """
    train = config.train
    given = checked(given)
    _refuse_unsupported(given, train.precision)
    derived: dict[str, tuple[Any, str]] = {
        "train_batch_size": (
            train.global_batch_size // config.parallel.lte_heads,
            "train.global_batch_size" + (" / parallel.lte_heads" if config.parallel.lte_heads > 1 else ""),
        ),
        "train_micro_batch_size_per_gpu": (train.micro_batch_size, "train.micro_batch_size"),
        "gradient_accumulation_steps": (
            accumulation_steps(config, dp),
            f"train.global_batch_size / (train.micro_batch_size x {dp} data-parallel ranks)",
        ),
        "gradient_clipping": (
            (config.optim.clip, "optim.clip")
            if config.method.facts.heads_here == 1
            else (0.0, "local heads are clipped one by one, by the optimizer")
        ),
        "zero_allow_untested_optimizer": (True, "the row-step optimizer"),
    }
    stage = given.get("zero_optimization", {}).get("stage", 0)
    config.method.facts.check_zero(stage)
    resolved = dict(given)
    for key, (value, owner) in derived.items():
        stated = given.get(key, value)
        require(
            stated == value,
            f"The DeepSpeed JSON sets {key} to {stated!r}, but the run configuration sets {value!r} ({owner}): remove "
            f"{key} from the JSON or change the run configuration.",
        )
        resolved[key] = value
    bf16 = train.precision == "bf16"
    stated = given.get("bf16", {}).get("enabled", bf16)
    require(
        stated == bf16,
        f"The DeepSpeed JSON sets bf16.enabled to {stated!r}, but train.precision is {train.precision!r}: remove it "
        "from the JSON or change train.precision.",
    )
    resolved["bf16"] = {"enabled": bf16}
    resolved.setdefault("steps_per_print", 10**9)
    # By default it waits for the device twice per micro-batch. The trainer measures steps at the loss.
    resolved.setdefault("timers", {"throughput": {"enabled": False}})
    return resolved


def leaves_norm_to_us(resolved: dict[str, Any]) -> bool:
    """Return whether DeepSpeed can leave norm, finite check and clip of the gradients to the engine.

    That is its class for ZeRO 1 and 2, but for stage 1 with fp32 accumulation.
    """
    zero = zero_settings(resolved)
    return zero.stage in (1, 2) and not zero.fp32_accumulation


def for_deepspeed(resolved: dict[str, Any]) -> dict[str, Any]:
    """Return the resolved JSON as DeepSpeed gets it: without norm, check and clip where they are left to the engine."""
    if not leaves_norm_to_us(resolved):
        return resolved
    return {
        **resolved,
        "gradient_clipping": 0.0,
        "zero_optimization": {**resolved["zero_optimization"], "compute_grad_norm": False},
        "bf16": {**resolved["bf16"], "check_grad_overflow": False},
    }


def zero_settings(resolved: dict[str, Any]) -> Zero:
    """Return ZeRO's settings of the resolved DeepSpeed JSON, as far as they affect memory."""
    section = resolved.get("zero_optimization", {})
    bucket = section.get("reduce_bucket_size", Zero.bucket)
    buckets = (2 if section.get("overlap_comm") else 1) if section.get("contiguous_gradients", True) else 0
    fp32_accumulation = resolved["bf16"]["enabled"] and (
        resolved.get("data_types", {}).get("grad_accum_dtype") == "fp32"
    )
    return Zero(section.get("stage", 0), fp32_accumulation, bucket * buckets)
