"""A LLaMA's folder from Hugging Face as our configuration and fp32 tensors: where an import begins.

`read_hf_config` reads `config.json` as transformers 5 does, in its own style (`rope_parameters`) and in that of version
4 (`rope_theta`, `rope_scaling`), and refuses every setting under which transformers would compute something that our
LLaMA does not: an import has the same function or none. `hf_tensors` gives the weights one by one in the order of our
model's parameters, full and unpadded; who loads them cuts them for a rank. Only JSON and safetensors are read: a pickle
runs code of whoever wrote it. The headers of all files (names, shapes, types) are checked before the first tensor is
read; a tensor is read when it is asked for and owns its memory, so that one at a time is held. No collectives. Not
supported: quantized weights, biases, heads of a size other than hidden / heads, other architectures, however near.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_switchlora.config.errors import UserError, require
from megatron_switchlora.config.rules_model import check_model
from megatron_switchlora.config.run import ModelConfig
from megatron_switchlora.data.hf_tokenizer import require_own
from megatron_switchlora.disk import read_json
from megatron_switchlora.distributed.shard import full_shape
from megatron_switchlora.model.llama.model import LlamaForCausalLM

ARCHITECTURES = ("LlamaForCausalLM", "LlamaModel")  # of LlamaModel only tied embeddings make a language model
FLOATS = ("F64", "F32", "F16", "BF16")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def read_hf_config(folder: Path) -> tuple[ModelConfig, int]:
    """The configuration of the LLaMA in a folder of Hugging Face's format, and its vocabulary size.

    Raises:
        UserError: no folder or no readable `config.json`, another architecture, a setting that makes it another
            function than our LLaMA's, or a shape that `check_model` refuses.
    """
    require(folder.is_dir(), f"{folder} is not a folder: give the one that holds config.json and model.safetensors.")
    path = folder / "config.json"
    content = read_object(path)
    _require_llama(path, content)
    vocab_size = read_whole(path, content, "vocab_size")
    context = read_whole(path, content, "max_position_embeddings", 2048)
    heads = read_whole(path, content, "num_attention_heads")
    theta, scaling = _read_rope(path, content, context)
    config = ModelConfig(
        vocab_size=vocab_size,
        hidden_size=read_whole(path, content, "hidden_size"),
        intermediate_size=read_whole(path, content, "intermediate_size"),
        num_layers=read_whole(path, content, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=read_whole(path, content, "num_key_value_heads", heads),
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=context,
        rms_norm_eps=read_number(path, content, "rms_norm_eps", 1e-6),
        initializer_range=read_number(path, content, "initializer_range", 0.02),
        tie_embeddings=_flag(path, content, "tie_word_embeddings"),
    )
    try:
        check_model(config)
    except UserError as error:
        raise UserError(f"{path} describes a model that cannot be trained here. {error}") from None
    head_dim = read_whole(path, content, "head_dim", config.head_dim)
    require(
        head_dim == config.head_dim,
        f"{path} has head_dim {head_dim}, but heads here have hidden_size {config.hidden_size} / num_attention_heads "
        f"{config.num_heads} = {config.head_dim}: choose a model whose head size is that.",
    )
    return config, vocab_size


def read_object(path: Path) -> dict[str, Any]:
    """Raises: UserError, if it is not the JSON object that it should be, or a link out of its folder."""
    require_own(path.parent, [path])
    try:
        content = read_json(path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror}. Give a folder that transformers' save_pretrained wrote."
        ) from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): fetch the file again.") from None
    require(isinstance(content, dict), f"{path} must hold a JSON object, not {type(content).__name__}: fetch it again.")
    return content


def read_whole(path: Path, content: dict[str, Any], key: str, default: Optional[int] = None) -> int:
    value: Any = default if content.get(key) is None else content[key]
    require(
        isinstance(value, int) and not isinstance(value, bool),
        f"{path} must hold {key} as a whole number, not {value!r}: correct it.",
    )
    return value


def read_number(path: Path, content: dict[str, Any], key: str, default: float) -> float:
    value = default if content.get(key) is None else content[key]
    require(
        isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30,
        f"{path} must hold {key} as a finite number, not {value!r}: correct it.",
    )
    return float(value)


def _flag(path: Path, content: dict[str, Any], key: str) -> bool:
    value = False if content.get(key) is None else content[key]
    require(isinstance(value, bool), f"{path} must hold {key} as true or false, not {value!r}: correct it.")
    return value


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
            not _flag(path, content, key), f"{path} has {key} true, but linears here have no biases: choose another."
        )
    activation = content.get("hidden_act", "silu")
    require(
        activation == "silu",
        f"{path} has hidden_act {activation!r}, but the feed-forward here is SwiGLU with silu: choose another model.",
    )
    require(
        content.get("quantization_config") is None,
        f"{path} has a quantization_config, but only weights in floating point can be trained: give the folder of the "
        "model before quantization, or dequantize it in transformers and save it again.",
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


class Stored(NamedTuple):
    """Where a tensor lies, and what the header of its file says of it."""

    path: Path
    name: str
    shape: list[int]
    dtype: str


def hf_tensors(folder: Path, config: ModelConfig, vocab_size: int) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every parameter of `LlamaForCausalLM(config, vocab_size)`, in its order: full shapes, fp32, on
    the CPU. A tied head is left out. float64 weights are rounded.

    Raises:
        UserError: at the call: no safetensors, a damaged file, an index that does not fit its files, missing, surplus
            or misshapen tensors, other types than floats, a tied head that differs from the embedding. While reading:
            a file that changed meanwhile, a value that is not finite.
    """
    stored = _stored_tensors(folder)
    if config.tie_embeddings and "lm_head.weight" in stored:
        head, embedding = stored.pop("lm_head.weight"), stored.get("model.embed_tokens.weight")
        require(
            embedding is None
            or (head.shape == embedding.shape and torch.equal(read_stored(head), read_stored(embedding))),
            f"{folder} holds a lm_head.weight that is not its model.embed_tokens.weight, but its config.json has "
            "tie_word_embeddings true: set that to false, or take the tensor out.",
        )
    shapes = hf_shapes(config, vocab_size)
    _require_fit(folder, shapes, stored)
    return ((name, read_stored(stored[name])) for name in shapes)


def hf_shapes(config: ModelConfig, vocab_size: int) -> dict[str, list[int]]:
    """The names and full shapes of all parameters."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config, vocab_size)
    return {name: full_shape(param) for name, param in model.named_parameters()}


def _require_fit(folder: Path, shapes: dict[str, list[int]], stored: dict[str, Stored]) -> None:
    missing, surplus = [n for n in shapes if n not in stored], [n for n in stored if n not in shapes]
    require(not missing, f"{folder} lacks {first_names(missing)}, which its config.json asks for: fetch all its files.")
    require(
        not surplus,
        f"{folder} holds {first_names(surplus)}, which the LLaMA of its config.json does not have: take out what does "
        "not belong to it, or correct config.json.",
    )
    for name, shape in shapes.items():
        found = stored[name]
        require(
            found.shape == shape,
            f"{found.path} holds {found.name} of shape {found.shape}, but the sizes in config.json make it {shape}: "
            "correct config.json, or fetch the file that belongs to it.",
        )
        require(
            found.dtype in FLOATS,
            f"{found.path} holds {found.name} as {found.dtype}, but weights must be one of {', '.join(FLOATS)}: give "
            "the model before quantization.",
        )


def first_names(names: list[str]) -> str:
    others = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + others


def _stored_tensors(folder: Path) -> dict[str, Stored]:
    """All weights of the folder by the names of `transformers.LlamaForCausalLM`."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():  # transformers takes it first, too
        tensors = scan(single)
    else:
        require(index.is_file(), _nothing_to_read(folder))
        tensors = _scan_sharded(folder, index)
    # the frequencies of rotary embeddings, which old versions stored, follow from the configuration
    tensors = {name: at for name, at in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    if any(name.startswith("model.") for name in tensors):
        return tensors
    return {f"model.{name}": at for name, at in tensors.items()}  # as LlamaModel is saved


def _nothing_to_read(folder: Path) -> str:
    pickles = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLES)
    if not pickles:
        return f"{folder} holds neither model.safetensors nor model.safetensors.index.json: fetch the model's weights."
    return (
        f"{folder} holds {first_names(pickles)}, but no safetensors. Such files are pickles, which run code of whoever "
        "wrote them when they are loaded, so they are not read here. Where you trust them, load the folder with "
        "LlamaForCausalLM.from_pretrained of transformers, write it with save_pretrained(new_folder, "
        "safe_serialization=True) (version 5 always writes safetensors), and give the new folder."
    )


def _scan_sharded(folder: Path, index: Path) -> dict[str, Stored]:
    places: Any = read_object(index).get("weight_map")
    require(
        isinstance(places, dict) and len(places) > 0 and all(isinstance(file, str) for file in places.values()),
        f"{index} must hold a weight_map from names of tensors to files: fetch it again.",
    )
    files = sorted(set(places.values()))
    for file in files:
        require(
            "/" not in file and "\\" not in file and file.endswith(".safetensors"),
            f"{index} names the file {file!r}, but its files must be safetensors in its own folder: correct it.",
        )
    tensors: dict[str, Stored] = {}
    for file in files:
        found = scan(folder / file)
        differing = sorted(found.keys() ^ {name for name, place in places.items() if place == file})
        require(
            not differing,
            f"{index} does not say what {file} holds: they differ in {first_names(differing)}. Fetch both again.",
        )
        tensors |= found
    return tensors


def scan(path: Path) -> dict[str, Stored]:
    """What the header of a file names."""
    require_own(path.parent, [path])
    with _opened(path) as file:
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {name: Stored(path, name, list(part.get_shape()), part.get_dtype()) for name, part in parts.items()}


def read_stored(at: Stored) -> Tensor:
    """The tensor in fp32, in memory of its own."""
    with _opened(at.path) as file:
        tensor = file.get_tensor(at.name).to(torch.float32, copy=True)  # what get_tensor gives is a view of the file
    require(
        bool(torch.isfinite(tensor).all()),
        f"{at.path} has values in {at.name} that are not finite in fp32: fetch it again, or take a sound model.",
    )
    return tensor


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} cannot be read as safetensors ({error}): it is missing, damaged or incomplete; fetch it again."
        ) from None
