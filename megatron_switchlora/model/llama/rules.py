"""What the shape of a LLaMA must fulfil beside the rules of all families."""

from __future__ import annotations

from typing import Any

from megatron_switchlora.config.errors import require
from megatron_switchlora.config.model import ModelConfig
from megatron_switchlora.config.parallel import require_shard

# Scalings of the rotary embedding that do not depend on the sequence: keys that they need, keys that they may have.
ROPE_SCALINGS: dict[str, tuple[set[str], set[str]]] = {
    "linear": ({"factor"}, set()),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}, set()),
    "yarn": (
        {"factor", "original_max_position_embeddings"},
        {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    ),
}


def check_shape(m: ModelConfig) -> None:
    """Check the shape of a LLaMA.

    Raises:
        UserError: with the rule, the values and what to change.
    """
    require(
        m.num_kv_heads is None or m.num_kv_heads >= 1,
        f"model.num_kv_heads must be at least 1, not {m.num_kv_heads}: leave it out for as many as model.num_heads.",
    )
    require(
        m.hidden_size % m.num_heads == 0,
        f"model.hidden_size {m.hidden_size} must be a multiple of model.num_heads {m.num_heads}: change one of them.",
    )
    require(
        m.head_dim % 2 == 0,
        f"The head size {m.head_dim} (model.hidden_size {m.hidden_size} / model.num_heads {m.num_heads}) must be even "
        "for rotary embeddings: change one of them.",
    )
    require(
        m.num_heads % m.kv_heads == 0,
        f"model.num_heads {m.num_heads} must be a multiple of model.num_kv_heads {m.kv_heads}: change one of them.",
    )
    if m.rope_scaling is not None:
        _check_rope_scaling(m.rope_scaling, m.rope_theta)


def check_split(m: ModelConfig, tp: int) -> None:
    """Check that tensor-parallel ranks can split the layers.

    Raises:
        UserError: they cannot.
    """
    for name, count in (("num_heads", m.num_heads), ("num_kv_heads", m.kv_heads)):
        require(
            count % tp == 0,
            f"model.{name} {count} must be a multiple of parallel.tp {tp}, since a rank holds whole heads: change one "
            "of them.",
        )
    require_shard("model.intermediate_size", m.intermediate_size, tp)


def _check_rope_scaling(scaling: dict[str, Any], theta: float) -> None:
    kind: Any = scaling.get("rope_type")
    supported = ", ".join(ROPE_SCALINGS)
    require(
        kind not in ("dynamic", "longrope"),
        f"model.rope_scaling has rope_type {kind!r}, whose frequencies change with the length of the sequence; "
        f"supported are {supported}, which do not. Where sequences stay within the model's max_position_embeddings, "
        "dynamic scales nothing: leave it out. For longrope, start from a model with another scaling.",
    )
    require(
        isinstance(kind, str) and kind in ROPE_SCALINGS,
        f"model.rope_scaling must name a rope_type of {supported}, not {kind!r}: give one of them, or null for none.",
    )
    needed, optional = ROPE_SCALINGS[kind]
    given = set(scaling) - {"rope_type"}
    require(
        needed <= given <= needed | optional,
        f"model.rope_scaling of rope_type {kind} must have {', '.join(sorted(needed))}"
        + (f" and may have {', '.join(sorted(optional))}" if optional else "")
        + f"; it has {', '.join(sorted(map(str, given))) or 'nothing else'}: add what is missing, leave out the rest.",
    )
    for name in sorted(given):
        _check_rope_value(name, scaling[name])
    _check_rope_order(kind, scaling, theta)


def _check_rope_order(kind: str, scaling: dict[str, Any], theta: float) -> None:
    factor = scaling["factor"]
    require(factor >= 1, f"model.rope_scaling.factor stretches the context and must be at least 1, it is {factor}.")
    if kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        require(
            low < high,
            f"model.rope_scaling.low_freq_factor {low} must be below high_freq_factor {high}: change one of them.",
        )
    if kind == "yarn":
        slow, fast = scaling.get("beta_slow", 1), scaling.get("beta_fast", 32)
        require(
            slow <= fast,
            f"model.rope_scaling.beta_slow {slow} must not be above beta_fast {fast} (by default 1 and 32): change one "
            "of them.",
        )
        require(theta > 1, f"model.rope_theta must be above 1 for rope_type yarn, it is {theta}: raise it.")


def _check_rope_value(name: str, value: Any) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if name == "truncate":
        require(isinstance(value, bool), f"model.rope_scaling.truncate must be true or false, not {value!r}.")
    elif name == "original_max_position_embeddings":
        require(
            whole and 1 <= value < 1e9,
            f"model.rope_scaling.{name} must be a whole number from 1 and below 1e9, not {value!r}.",
        )
    else:
        require(
            (whole or isinstance(value, float)) and 0 < value < 1e9,
            f"model.rope_scaling.{name} must be a number above 0 and below 1e9, not {value!r}.",
        )
