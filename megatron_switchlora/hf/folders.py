"""Write the merged model as a folder that `transformers` loads, and read such a folder back.

Adapters are folded in W's precision (fp32). Module names are already Hugging Face's. Tensor-parallel shards are
gathered, and their padding is removed. Only safetensors and JSON are read or written.

`marks` are the token ids of the begin, end and padding marks, and an imported model's other settings of generation:
{"bos_token_id": int | None, "eos_token_id": int | list[int] | None, "pad_token_id": int | None, "generation": {...}}.
An import adds its "source" for model cards. State.json of each checkpoint passes them from an import to the exports.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from megatron_switchlora.checkpoint.archive import save_durably
from megatron_switchlora.config.errors import UserError
from megatron_switchlora.config.model import ModelConfig
from megatron_switchlora.distributed.shard import full_shape, shard_of
from megatron_switchlora.model.protocol import LanguageModel, family_of

MARKS = ("bos_token_id", "eos_token_id", "pad_token_id")


def joined_marks(tokenizer: Any, imported: dict[str, Any]) -> dict[str, Any]:
    """Join the marks of the tokenizer (None: the model was not trained) with those of the import.

    The tokenizer's marks take precedence, except that the end marks of both are kept, as a list if they differ. The
    result holds the marks for config.json, and in "generation" those for generation_config.json.
    """
    generation = imported.get("generation") or {"do_sample": False}
    given = {**imported, **{key: generation[key] for key in MARKS if generation.get(key) is not None}}
    return {**_joined(tokenizer, imported), "generation": {**generation, **_joined(tokenizer, given)}}


def _joined(tokenizer: Any, imported: dict[str, Any]) -> dict[str, Any]:
    own = {key: getattr(tokenizer, key, None) for key in MARKS}
    marks = {key: imported.get(key) if own[key] is None else own[key] for key in MARKS}
    ends = imported.get("eos_token_id")
    listed = ends if isinstance(ends, list) else [ends]
    if ends is not None:
        included = own["eos_token_id"] in (None, *listed)
        marks["eos_token_id"] = ends if included else [own["eos_token_id"], *listed]
    return marks


def hf_config(
    config: ModelConfig, vocab_size: int, seq_len: int, marks: dict[str, Any], dtype: str = "float32"
) -> dict[str, Any]:
    """Return `config.json` of the equivalent model of transformers with weights in `dtype`."""
    named = {key: marks[key] for key in MARKS}
    return family_of(config).hf_config(config, vocab_size, seq_len, named, dtype)


def hf_names(model: LanguageModel) -> dict[str, str]:
    """Return a table from our names of all parameters to Hugging Face's, in the model's order."""
    return {name: family_of(model.config).hf_name(name) for name, _ in model.named_parameters()}


def hf_shapes(model: LanguageModel) -> dict[str, list[int]]:
    """Return the full shapes of all parameters by their Hugging Face names."""
    names = hf_names(model)
    return {names[name]: full_shape(param) for name, param in model.named_parameters()}


def write_configs(folder: Path, config: dict[str, Any], generation: dict[str, Any]) -> None:
    """Write `config.json` and `generation_config.json`."""
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def merged_state_dict(model: LanguageModel, keeps: bool = True) -> dict[str, Tensor]:
    """Return the effective weights by Hugging Face name, in fp32 on the CPU.

    Collective over tp, and over the ranks over which the rows of frozen weights are spread. Ranks without `keeps`
    return an empty dict. A tied output layer is left out.
    """
    state, family, tied = {}, family_of(model.config), model.tied_names()
    for name, module in model.named_modules():
        adapted = hasattr(module, "effective_weight")  # some of these have no `weight` in fp32
        if (not adapted and getattr(module, "weight", None) is None) or f"{name}.weight" in tied:
            continue
        shard = module.effective_weight() if adapted else module.weight.detach()
        split = getattr(module, "split", None)
        weight = shard if split is None else split.gather(shard)
        if keeps:
            state[family.hf_name(f"{name}.weight")] = weight.to("cpu", torch.float32).contiguous()
    return state


def export_model(
    model: LanguageModel, folder: Path, seq_len: int, marks: dict[str, Any] | None = None, writes: bool = True
) -> None:
    """Write the model's configuration and weights into an existing folder. Collective as `merged_state_dict`.

    The files are `config.json`, `generation_config.json` and `model.safetensors`. Only the rank with `writes` writes
    them. `marks` come from `joined_marks`; by default there are none.
    """
    state = merged_state_dict(model, keeps=writes)
    if not writes:
        return
    marks = marks or joined_marks(None, {})
    write_configs(folder, hf_config(model.config, model.vocab_size, seq_len, marks), marks["generation"])
    save_durably(state, folder / "model.safetensors", {"format": "pt"})


def load_merged(model: LanguageModel, folder: Path) -> None:
    """Load an exported folder, or this rank's shards of it, into a model without adapters.

    Raises:
        UserError: the file is missing or damaged, or its tensors do not fit the model.
    """
    path = folder / "model.safetensors"
    if not path.is_file():
        raise UserError(f"{path} does not exist: a finished run has it; give the run folder with --output_dir.")
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}): export a checkpoint of the run again.") from None
    hf_name_of = hf_names(model)
    params = {hf_name_of[name]: param for name, param in model.named_parameters()}
    names = sorted(set(params) | set(state))
    wrong = [n for n in names if n not in params or n not in state or full_shape(params[n]) != list(state[n].shape)]
    if wrong:
        raise UserError(
            f"{path} does not fit the configured model: {len(wrong)} tensors differ, the first is {wrong[0]}."
        )
    for name, param in params.items():
        param.data.copy_(shard_of(param, state[name]))
