"""Export a checkpoint of any mesh to Hugging Face or PEFT, with only a few tensors in memory at a time.

`export_dense` folds the adapters and writes sharded safetensors that `AutoModelForCausalLM` loads. `export_peft` writes
the frozen base in the same format, and the adapters beside it as a LoRA that `PeftModel` loads. The adapter gives the
absolute path of its base. Its lora_B is [out, r], the transpose of the package's own. Folders are built elsewhere and
renamed, so they are either complete or absent.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_switchlora.checkpoint.archive import save_durably
from megatron_switchlora.checkpoint.files import Checkpoint, build_folder
from megatron_switchlora.checkpoint.weights import Weights
from megatron_switchlora.config.errors import UserError
from megatron_switchlora.data.hf_tokenizer import as_trained, load_tokenizer, require_own, save_tokenizer
from megatron_switchlora.distributed.buckets import grouped
from megatron_switchlora.distributed.precision import PRECISIONS
from megatron_switchlora.hf.folders import hf_config, joined_marks, write_configs
from megatron_switchlora.hf.model_card import card_facts, model_card, write_card
from megatron_switchlora.startup.progress import progress

SHARD_BYTES = 1 << 30
DTYPES = {**PRECISIONS, "fp16": torch.float16}


def write_shards(folder: Path, sizes: dict[str, int], read: Callable[[str], Tensor], limit: int = SHARD_BYTES) -> None:
    """Write tensors as model.safetensors, or as shards of at most `limit` bytes (or one tensor) with an index.

    `sizes` gives their bytes by name, and `read` returns them. One shard is in memory at a time.
    """
    shards = list(grouped(sizes, sizes.__getitem__, limit))
    index: dict[str, str] = {}
    bar = progress(None, "Exporting", "tensors", len(sizes))
    for number, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for name in names:
            tensors[name] = read(name)
            bar.update()
        save_tensors(tensors, folder / file)
        index |= dict.fromkeys(names, file)
    bar.close()
    if len(shards) > 1:
        content = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": index}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write one file in transformers' format."""
    save_durably({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})


def export_dense(checkpoint: Checkpoint, out: Path, dtype: str = "bf16", limit: int = SHARD_BYTES) -> None:
    """Write the effective weights with configuration and tokenizer; the cast to `dtype` follows the folding.

    Raises:
        UserError: `out` exists or cannot be written.
    """
    weights = Weights(checkpoint)

    def fill(folder: Path) -> None:
        _write_model(weights, checkpoint, folder, dtype, weights.read, limit)
        write_card(folder, model_card(card_facts(weights, checkpoint)))

    build_folder(out, fill)


def _write_model(
    weights: Weights, checkpoint: Checkpoint, folder: Path, dtype: str, read: Callable[[str], Tensor], limit: int
) -> None:
    target = DTYPES[dtype]
    ours = {weights.family.hf_name(name): name for name in weights.names()}
    sizes = {hf_name: torch.Size(weights.shape(name)).numel() * target.itemsize for hf_name, name in ours.items()}
    write_shards(folder, sizes, lambda hf_name: read(ours[hf_name]).to(target), limit)
    marks = joined_marks(_hand_on_tokenizer(weights, checkpoint.folder / "tokenizer", folder), weights.imported)
    seq_len = weights.config.get("train", {}).get("seq_len", weights.model.max_position_embeddings)
    stored = str(target).removeprefix("torch.")
    write_configs(folder, hf_config(weights.model, weights.vocab_size, seq_len, marks, stored), marks["generation"])


def _hand_on_tokenizer(weights: Weights, source: Path, folder: Path) -> Any:
    """Write the tokenizer, if there is one, and return it if the model was trained with it, else None.

    A run's tokenizer is written as training used it, an import's unchanged.

    Raises:
        UserError: a link leads out of the checkpoint.
    """
    if not source.is_dir():
        return None
    require_own(source.parent, [source, *source.rglob("*")])
    if "data" not in weights.config:
        shutil.copytree(source, folder, dirs_exist_ok=True)
        return None if weights.imported else load_tokenizer(str(source))
    tokenizer = as_trained(load_tokenizer(str(source)), weights.config["data"].get("add_bos", False))
    save_tokenizer(tokenizer, folder)
    return tokenizer


def export_peft(
    checkpoint: Checkpoint, out: Path, dtype: str = "bf16", limit: int = SHARD_BYTES, original: bool = False
) -> None:
    """Write `out`/base and `out`/adapter.

    With `original` the base holds the matrices from which the run started. The adapter then has rank 2r:
    [B, -B_0] [A; A_0] (LoRA-GA, section 3).

    Raises:
        UserError: the checkpoint has no adapters, or with `original` no A_0 and B_0; or `out` exists or cannot be
            written.
    """
    weights = Weights(checkpoint)
    adapted = [name for name in weights.names() if weights.adapted(name)]
    if not adapted:
        method = weights.config.get("method", {}).get("name", "none")
        raise UserError(
            f"{checkpoint.folder} was trained with method {method} and has no adapters to export: leave --peft out."
        )
    if original and not weights.keeps_initial:
        raise UserError(
            f"{checkpoint.folder} does not hold the initial factors of its run, which only method lora with "
            f"method.init lora_ga keeps (this is {weights.method.name}, {weights.method.init}): leave --original_base "
            "out."
        )

    def fill(folder: Path) -> None:
        for name in ("base", "adapter"):
            (folder / name).mkdir()
        _write_model(weights, checkpoint, folder / "base", dtype, weights.original if original else weights.base, limit)
        tensors: dict[str, Tensor] = {}
        for name in adapted:
            A, B = weights.factors(name)
            if original:
                A_0, B_0 = weights.initial_factors(name)
                A, B = torch.cat([A, A_0]), torch.cat([B, -B_0])
            stem = f"base_model.model.{weights.family.hf_name(name).removesuffix('.weight')}"
            tensors[f"{stem}.lora_A.weight"] = A.to(DTYPES[dtype])
            tensors[f"{stem}.lora_B.weight"] = B.t().to(DTYPES[dtype])
        save_tensors(tensors, folder / "adapter" / "adapter_model.safetensors")
        config = json.dumps(peft_config(weights, adapted, str(out.absolute() / "base"), 1 + original), indent=2)
        (folder / "adapter" / "adapter_config.json").write_text(config + "\n", encoding="utf-8")
        facts = card_facts(weights, checkpoint)
        write_card(folder / "base", model_card(facts, "base"))
        write_card(folder / "adapter", model_card(facts, "adapter"))

    build_folder(out, fill)


def peft_config(weights: Weights, adapted: Iterable[str], base: str, times: int = 1) -> dict[str, Any]:
    """Return `adapter_config.json` of a plain LoRA with the alpha that keeps our scaling.

    The rank is ours, times the number of LTE heads side by side, times `times`.
    """
    method = weights.method
    rank = method.adapter_rank * max(1, len(weights.heads)) * times
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": weights.scaling * (math.sqrt(rank) if method.rslora else rank),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": method.rslora,
        "inference_mode": True,
        "target_modules": sorted({weights.family.hf_name(name).split(".")[-2] for name in adapted}),
    }
