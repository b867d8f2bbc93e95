"""DeepSpeed's JSON: what it may say, and what the run configuration fills in.

The JSON owns stage, buckets, overlap, accumulation type and logging. Batch sizes, clip and precision
belong to the run configuration: they are written into the resolved JSON, and a file that sets one of
them to another value is refused, naming both. Only settings that the row-step optimizer is proven with
are let through (`ALLOWED`): stage 3, stock optimizers, fp16, offload, bf16 moments and others are refused.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from megatron_switchlora.config import RunConfig, UserError, accumulation_steps, require

DERIVED = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "zero_allow_untested_optimizer",
)
# Sections and the keys they may set; None: any. DeepSpeed itself ignores what it does not know.
ALLOWED: dict[str, Optional[set[str]]] = {
    "zero_optimization": {
        "stage", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "allgather_partitions",
        "allgather_bucket_size", "overlap_comm", "round_robin_gradients", "offload_optimizer", "offload_param",
    },
    "bf16": {"enabled"},
    "fp16": {"enabled"},
    "amp": {"enabled"},
    "data_types": {"grad_accum_dtype"},
    "tensorboard": None, "wandb": None, "csv_monitor": None, "comet": None, "comms_logger": None,
    "flops_profiler": None,
}  # fmt: skip
SCALARS = {
    *DERIVED, "steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "prescale_gradients",
    "gradient_predivide_factor",
}  # fmt: skip


@dataclass(frozen=True)
class Zero:
    """DeepSpeed's part: ZeRO stage, whether micro-batches accumulate in fp32 (BF16_Optimizer), and the elements of
    the buckets in which stages 1 and 2 reduce."""

    stage: int = 1
    fp32_accumulation: bool = False
    bucket: int = 500_000_000


def read_ds_config(path: Optional[str]) -> dict[str, Any]:
    """Parse the file; without one, ZeRO stage 1.

    Raises:
        UserError: missing file, invalid JSON, or no object in it.
    """
    if path is None:
        return {"zero_optimization": {"stage": 1}}
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--ds_config {path} cannot be read: {error.strerror}. Give a file of ds_configs/.") from None
    except ValueError as error:
        raise UserError(f"--ds_config {path} is not valid JSON: {error}.") from None
    require(isinstance(content, dict), f"--ds_config {path} must hold a JSON object, not {type(content).__name__}.")
    return content


def _refuse_unknown(given: dict[str, Any]) -> None:
    for section in ("optimizer", "scheduler"):
        require(
            section not in given,
            f"The DeepSpeed JSON sets {section!r}, but the row-step optimizer and its schedule come from the run "
            f"configuration (optim.*): remove {section!r} from the JSON.",
        )
    for key, value in given.items():
        require(
            key in SCALARS or key in ALLOWED,
            f"The DeepSpeed JSON sets {key!r}, which is unknown or not proven with the row-step optimizer: remove it. "
            f"Allowed are {', '.join(sorted([*SCALARS, *ALLOWED]))}.",
        )
        if key in SCALARS:
            continue
        require(isinstance(value, dict), f"{key} must be an object in the DeepSpeed JSON, not {value!r}.")
        allowed = ALLOWED[key]
        wrong = [] if allowed is None else sorted(set(value) - allowed)
        require(
            not wrong,
            f"The DeepSpeed JSON sets {key}.{wrong[0] if wrong else ''}, which is unknown or not proven with the "
            f"row-step optimizer: remove it. Allowed in {key} are {', '.join(sorted(allowed or ()))}.",
        )


def _refuse_unsupported(given: dict[str, Any], precision: str) -> None:
    _refuse_unknown(given)
    zero = given.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    require(
        stage in (0, 1, 2) and not isinstance(stage, bool),
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
        require(device in (None, "none"), f"zero_optimization.{key} to {device!r} is not supported: remove it.")
    accumulate = given.get("data_types", {}).get("grad_accum_dtype")
    require(
        accumulate in (None, precision) or (accumulate == "fp32" and stage == 1),
        f"data_types.grad_accum_dtype {accumulate!r} does not go with train.precision {precision!r} at ZeRO stage "
        f"{stage}: fp32 accumulation of bf16 gradients needs stage 1; else leave it out.",
    )


def resolve_ds_config(given: dict[str, Any], config: RunConfig, dp: int) -> dict[str, Any]:
    """The JSON with the run configuration's values filled in.

    Raises:
        UserError: an unsupported setting, or one that contradicts the run configuration.
    """
    train = config.train
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
            config.optim.clip if config.method.heads_here == 1 else 0.0,
            "optim.clip" if config.method.heads_here == 1 else "local heads are clipped one by one, by the optimizer",
        ),
        "zero_allow_untested_optimizer": (True, "the row-step optimizer"),
    }
    stage = given.get("zero_optimization", {}).get("stage", 0)
    require(
        config.method.name != "galore" or stage == 0,
        f"method.name galore takes the singular vectors of whole gradients, and ZeRO stage {stage} cuts them over the "
        "ranks (without --ds_config it is stage 1): use ds_configs/zero0.json.",
    )
    resolved = json.loads(json.dumps(given))
    for key, (value, owner) in derived.items():
        stated = given.get(key, "auto")
        require(
            stated == "auto" or stated == value,
            f"The DeepSpeed JSON sets {key} to {stated!r}, but the run configuration says {value!r} ({owner}): remove "
            f"{key} from the JSON or change the run configuration.",
        )
        resolved[key] = value
    bf16 = train.precision == "bf16"
    stated = given.get("bf16", {}).get("enabled", "auto")
    require(
        stated in ("auto", bf16),
        f"The DeepSpeed JSON sets bf16.enabled to {stated!r}, but train.precision is {train.precision!r}: remove it "
        "from the JSON or change train.precision.",
    )
    resolved["bf16"] = {"enabled": bf16}
    resolved.setdefault("steps_per_print", 10**9)
    return resolved


def zero_settings(resolved: dict[str, Any]) -> Zero:
    """What the resolved DeepSpeed JSON says about memory."""
    section = resolved.get("zero_optimization", {})
    bucket = int(section.get("reduce_bucket_size", Zero.bucket))
    buckets = (2 if section.get("overlap_comm") else 1) if section.get("contiguous_gradients", True) else 0
    fp32_accumulation = resolved["bf16"]["enabled"] and (
        resolved.get("data_types", {}).get("grad_accum_dtype") == "fp32"
    )
    return Zero(section.get("stage", 0), fp32_accumulation, bucket * buckets)
