"""A LLaMA's config.json and ours, and the names of its stored tensors.

`read_config` reads `config.json` as transformers 5 does, in its own style (`rope_parameters`) and in that of version 4
(`rope_theta`, `rope_scaling`), and refuses every setting under which transformers would compute something that our
LLaMA does not. Not supported: biases, heads of a size other than hidden / heads, other architectures, however near.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Optional

from megatron_switchlora.config.errors import require
from megatron_switchlora.config.model import ModelConfig
from megatron_switchlora.model.entries import read_flag, read_number, read_whole
from megatron_switchlora.model.llama.rope import rope_parameters

ARCHITECTURES = ("LlamaForCausalLM", "LlamaModel")  # of LlamaModel only tied embeddings make a language model


def hf_config(config: ModelConfig, vocab_size: int, seq_len: int, marks: dict[str, Any], dtype: str) -> dict[str, Any]:
    """`config.json` of the equivalent `transformers.LlamaForCausalLM`, its weights stored as `dtype`."""
    # where transformers 4 looks for it; version 5 reads either
    scaling = {} if config.rope_scaling is None else {"rope_scaling": config.rope_scaling}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": max(seq_len, config.max_position_embeddings or 0),
        "rope_parameters": rope_parameters(config),
        "rope_theta": config.rope_theta,
        **scaling,
        "rms_norm_eps": config.rms_norm_eps,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        **marks,
        "use_cache": True,
        "dtype": dtype,
    }


def read_config(path: Path, content: dict[str, Any]) -> ModelConfig:
    """Return the configuration of the LLaMA that a config.json describes.

    Raises:
        UserError: another architecture, or a setting that makes it another function than our LLaMA's.
    """
    _require_llama(path, content)
    context = read_whole(path, content, "max_position_embeddings", 2048)
    hidden, heads = read_whole(path, content, "hidden_size"), read_whole(path, content, "num_attention_heads")
    theta, scaling = _read_rope(path, content, context)
    size = hidden // max(1, heads)
    head_dim = read_whole(path, content, "head_dim", size)
    require(
        head_dim == size or hidden % max(1, heads) != 0,  # which check_model refuses
        f"{path} has head_dim {head_dim}, but heads here have hidden_size {hidden} / num_attention_heads {heads} = "
        f"{size}: choose a model whose head size is that.",
    )
    return ModelConfig(
        family="llama",
        vocab_size=read_whole(path, content, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=read_whole(path, content, "intermediate_size"),
        num_layers=read_whole(path, content, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=read_whole(path, content, "num_key_value_heads", heads),
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=context,
        rms_norm_eps=read_number(path, content, "rms_norm_eps", 1e-6),
        initializer_range=read_number(path, content, "initializer_range", 0.02),
        tie_embeddings=read_flag(path, content, "tie_word_embeddings"),
    )


def read_names(stored: Iterable[str]) -> dict[str, str]:
    """Return what stored tensors are called in `transformers.LlamaForCausalLM`."""
    # the frequencies of rotary embeddings, which old versions stored, follow from the configuration
    names = [name for name in stored if not name.endswith("rotary_emb.inv_freq")]
    prefix = "" if any(name.startswith("model.") for name in names) else "model."  # as LlamaModel is saved
    return {name: prefix + name for name in names}


def _require_llama(path: Path, content: dict[str, Any]) -> None:
    kind, names = content.get("model_type"), content.get("architectures") or []
    require(
        kind == "llama" and isinstance(names, list) and all(name in ARCHITECTURES for name in names),
        f"{path} describes model_type {kind!r} with architectures {names!r}, but only LLaMA's function is implemented "
        "here, and related models differ from it (biases, windows of attention, norms, heads): give a model of "
        "model_type 'llama' and architecture LlamaForCausalLM.",
    )
    for key in ("attention_bias", "mlp_bias"):
        require(
            not read_flag(path, content, key),
            f"{path} has {key} true, but linears here have no biases: choose another.",
        )
    activation = content.get("hidden_act", "silu")
    require(
        activation == "silu",
        f"{path} has hidden_act {activation!r}, but the feed-forward here is SwiGLU with silu: choose another model.",
    )


def _read_rope(path: Path, content: dict[str, Any], context: int) -> tuple[float, Optional[dict[str, Any]]]:
    """rope_theta and scaling, filled in where transformers 5 does, so that nothing depends on the context length."""
    given = content.get("rope_scaling") or content.get("rope_parameters") or {}
    require(isinstance(given, dict), f"{path} must hold the rope parameters as an object, not {given!r}: correct it.")
    theta = read_number(path, {"rope_theta": content.get("rope_theta"), **given}, "rope_theta", 10000.0)
    for partial in (given.get("partial_rotary_factor"), content.get("partial_rotary_factor")):
        require(
            partial is None or partial == 1,
            f"{path} has partial_rotary_factor {partial!r}, but heads here are rotated whole: choose another model.",
        )
    kind = given.get("rope_type", given.get("type", "default"))
    apart = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
    scaling = {key: value for key, value in given.items() if key not in apart and value is not None}
    if kind == "default" and not scaling:
        return theta, None
    if kind in ("llama3", "yarn"):
        name = "original_max_position_embeddings"
        outside = content.get(name)
        scaling[name] = scaling.get(name, context) if outside is None else outside
    return theta, {"rope_type": kind, **scaling}
