"""Random LLaMAs as transformers saves them, and ways to change what lies in their folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

VOCAB, LENGTH = 61, 150
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 2.5},
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn_slopes": {**YARN, "beta_fast": 16, "beta_slow": 2.0, "truncate": False, "attention_factor": 1.3},
    "yarn_mscale": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7},
}


def save(folder: Path, dtype: torch.dtype = torch.float32, shard: str = "1GB", **changes: Any) -> Path:
    """A random model as transformers saves it."""
    config = transformers.LlamaConfig(
        **{
            "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 100, "num_hidden_layers": 2,
            "num_attention_heads": 4, "max_position_embeddings": 256, "initializer_range": 0.1, **changes,
        }
    )  # fmt: skip
    torch.manual_seed(5)
    transformers.LlamaForCausalLM(config).to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def tokens() -> torch.Tensor:
    """Past the length that the scalings stretch."""
    return torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(0))


def edit(folder: Path, **changes: Any) -> None:
    """Change entries of config.json; None takes an entry out, "null" makes it null."""
    path = folder / "config.json"
    content = {**json.loads(path.read_text()), **changes}
    content = {key: None if value == "null" else value for key, value in content.items() if value is not None}
    path.write_text(json.dumps(content))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of a folder with one file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def change_index(folder: Path, change: Callable[[dict], Any]) -> None:
    """Change the index of a folder with several files."""
    path = folder / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
