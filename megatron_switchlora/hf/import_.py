"""Read a Hugging Face folder as our configuration and fp32 tensors, the first step of an import.

`read_hf_config` asks the family of the folder's model_type. The family refuses every setting under which its model
would compute something else. So an import either has the same function or fails.

`hf_tensors` yields the weights one by one in the order of our model's parameters, full and unpadded. Whoever loads them
cuts them into shards. The headers of all files (names, shapes, types) are checked before the first tensor is read. Each
tensor is read on demand into memory of its own, so that one is held at a time. There are no collectives.

Only JSON and safetensors are read, since a pickle runs its author's code. Quantized weights are not supported, nor are
models that store several of our tensors in one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_switchlora.config.errors import UserError, require
from megatron_switchlora.config.family import FAMILIES, check_model
from megatron_switchlora.config.model import ModelConfig
from megatron_switchlora.data.hf_tokenizer import require_own
from megatron_switchlora.disk import read_json
from megatron_switchlora.hf.folders import hf_shapes
from megatron_switchlora.model.protocol import Family, build_on_meta, family_of

FLOATS = ("F64", "F32", "F16", "BF16")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def read_hf_config(folder: Path) -> tuple[ModelConfig, int]:
    """Return the configuration and the vocabulary size of the model in a Hugging Face folder.

    Raises:
        UserError: there is no folder or no readable `config.json`, no family computes the model, a setting changes the
            family's function, or `check_model` refuses a shape.
    """
    require(folder.is_dir(), f"{folder} is not a folder: give the one that holds config.json and model.safetensors.")
    path = folder / "config.json"
    content = read_object(path)
    config = _family_for(path, content).read_hf_config(path, content)
    require(
        content.get("quantization_config") is None,
        f"{path} has a quantization_config, but only weights in floating point can be trained: give the folder of the "
        "model before quantization, or dequantize it in transformers and save it again.",
    )
    try:
        check_model(config)
    except UserError as error:
        raise UserError(f"{path} describes a model that cannot be trained here. {error}") from None
    assert config.vocab_size is not None, "a family reads the vocabulary size"
    return config, config.vocab_size


def _family_for(path: Path, content: dict[str, Any]) -> Family:
    kind = content.get("model_type")
    families = [family for family in FAMILIES.values() if isinstance(family, Family)]
    fitting = [family for family in families if kind in family.model_types]
    known = ", ".join(name for family in families for name in family.model_types)
    require(
        bool(fitting),
        f"{path} describes model_type {kind!r} with architectures {content.get('architectures')!r}, which no model "
        "family here computes, and related models differ in biases, attention windows, norms or heads: give a model of "
        f"model_type {known}, or give the module of its family with --plugins.",
    )
    return fitting[-1]  # a plugin's family before ours


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: the file is missing, is not a JSON object, or is a link out of its folder.
    """
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


class Stored(NamedTuple):
    """A tensor's file, and its entry in the file's header."""

    path: Path
    name: str
    shape: list[int]
    dtype: str


def hf_tensors(folder: Path, config: ModelConfig, vocab_size: int) -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face name, tensor) of every parameter of our model, in its order: full shapes, fp32, on the CPU.

    A tied output layer is left out. float64 weights are rounded.

    Raises:
        UserError: at the call, if there are no safetensors, a file is damaged, or the index does not match its files.
            At the call, if tensors are missing, surplus, of another shape or not floats. At the call, if a tied output
            layer differs from the embedding. While reading, if a file has changed or a value is not finite.
    """
    family, model = family_of(config), build_on_meta(config, vocab_size)
    stored = _stored_tensors(folder, family)
    for name, same in model.tied_names().items():
        name, same = family.hf_name(name), family.hf_name(same)
        tied, first = stored.pop(name, None), stored.get(same)
        require(
            tied is None
            or first is None
            or (tied.shape == first.shape and torch.equal(read_stored(tied), read_stored(first))),
            f"{folder} holds a {name} that differs from its {same}, but its config.json has tie_word_embeddings true: "
            "set that to false, or remove the tensor.",
        )
    shapes = hf_shapes(model)
    _require_fit(folder, shapes, stored)
    return ((name, read_stored(stored[name])) for name in shapes)


def _require_fit(folder: Path, shapes: dict[str, list[int]], stored: dict[str, Stored]) -> None:
    missing, surplus = [n for n in shapes if n not in stored], [n for n in stored if n not in shapes]
    require(not missing, f"{folder} lacks {first_names(missing)}, which its config.json needs: fetch all its files.")
    require(
        not surplus,
        f"{folder} holds {first_names(surplus)}, which the model of its config.json does not have: remove tensors that "
        "do not belong to it, or correct config.json.",
    )
    for name, shape in shapes.items():
        tensor = stored[name]
        require(
            tensor.shape == shape,
            f"{tensor.path} holds {tensor.name} of shape {tensor.shape}, but by config.json it has shape {shape}: "
            "correct config.json, or fetch the file that belongs to it.",
        )
        require(
            tensor.dtype in FLOATS,
            f"{tensor.path} holds {tensor.name} as {tensor.dtype}, but weights must be one of {', '.join(FLOATS)}: "
            "give the model before quantization.",
        )


def first_names(names: list[str]) -> str:
    others = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + others


def _stored_tensors(folder: Path, family: Family) -> dict[str, Stored]:
    """Return all weights of the folder by the names of Hugging Face's class."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():  # transformers prefers it, too
        tensors = scan(single)
    else:
        require(index.is_file(), _nothing_to_read(folder))
        tensors = _scan_sharded(folder, index)
    return {name: tensors[stored] for stored, name in family.read_names(tensors).items()}


def _nothing_to_read(folder: Path) -> str:
    pickles = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLES)
    if not pickles:
        return f"{folder} holds neither model.safetensors nor model.safetensors.index.json: fetch the model's weights."
    return (
        f"{folder} holds {first_names(pickles)}, but no safetensors. Such files are pickles, which can run code when "
        "they are loaded, so they are not read here. If you trust them, load the folder with "
        "AutoModelForCausalLM.from_pretrained of transformers. Then write it with save_pretrained(new_folder, "
        "safe_serialization=True) and give the new folder (version 5 always writes safetensors)."
    )


def _scan_sharded(folder: Path, index: Path) -> dict[str, Stored]:
    places: Any = read_object(index).get("weight_map")
    require(
        isinstance(places, dict) and len(places) > 0 and all(isinstance(file, str) for file in places.values()),
        f"{index} must hold a weight_map from tensor names to files: fetch it again.",
    )
    files = sorted(set(places.values()))
    for file in files:
        require(
            "/" not in file and "\\" not in file and file.endswith(".safetensors"),
            f"{index} lists the file {file!r}, but its files must be safetensors in its own folder: correct it.",
        )
    tensors: dict[str, Stored] = {}
    for file in files:
        in_file = scan(folder / file)
        differing = sorted(in_file.keys() ^ {name for name, place in places.items() if place == file})
        require(
            not differing,
            f"{index} does not match {file}: they differ in {first_names(differing)}. Fetch both again.",
        )
        tensors |= in_file
    return tensors


def scan(path: Path) -> dict[str, Stored]:
    """Return the tensors that the header of a file lists."""
    require_own(path.parent, [path])
    with _opened(path) as file:
        views = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {name: Stored(path, name, list(view.get_shape()), view.get_dtype()) for name, view in views.items()}


def read_stored(stored: Stored) -> Tensor:
    """Return the tensor in fp32, in memory of its own."""
    with _opened(stored.path) as file:
        tensor = file.get_tensor(stored.name).to(torch.float32, copy=True)  # get_tensor returns a view of the file
    require(
        bool(torch.isfinite(tensor).all()),
        f"{stored.path} has values in {stored.name} that are not finite in fp32: fetch it again, or use another model.",
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
