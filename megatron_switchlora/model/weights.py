"""The dense weights of a checkpoint: what its model computes, by Hugging Face name, whatever trained it.

A full-rank tensor is its fp32 master; an adapted one is W + s B A, folded in fp32. Factors and dense
tensors are first rounded to the run's precision, as its forward pass sees them. Any box can be read, so
a rank takes only its shard, and a conversion holds only a few tensors. `load_initial` starts a run of any
method, on any mesh, from these weights: its function is the checkpoint's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from megatron_switchlora.checkpoint.files import Checkpoint, published
from megatron_switchlora.config import MethodConfig, ModelConfig, UserError
from megatron_switchlora.model.llama import LlamaForCausalLM
from megatron_switchlora.parallel.parts import parameter_part

T = TypeVar("T")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def find_folder(path: Path) -> Path:
    """The folder of a checkpoint: the path itself, or the newest one of a run.

    Raises:
        UserError: a run without one.
    """
    inside = published(path / "checkpoints")
    if (path / "config.yaml").is_file() and not inside:
        raise UserError(f"The run {path} has no published checkpoint: give another run, or let it reach one.")
    return inside[-1] if inside else path


class Weights:
    """Dense weights of a checkpoint; `config` is its run's, as nested dicts."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.state: dict[str, Any] = checkpoint.state()
        self.config: dict[str, Any] = self.state["config"]
        self.archive = checkpoint.archive()
        self.model = _known(ModelConfig, self.config["model"])
        self.vocab_size: int = self.state["vocab_size"]
        self.precision = PRECISIONS[self.config.get("train", {}).get("precision", "fp32")]
        self.method = _known(MethodConfig, self.config.get("method", {}))

    def names(self) -> list[str]:
        """Hugging Face names in the model's order."""
        found = [name for name in self.archive.names() if name.endswith(".weight")]
        return sorted(found, key=_model_order)

    def adapted(self, name: str) -> bool:
        return f"{name.removesuffix('weight')}lora_A" in self.archive

    def shape(self, name: str) -> tuple[int, ...]:
        return self.archive.shapes[name]

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """A [r, in] and B [r, out] of an adapted weight, fp32, rounded to the run's precision."""
        stem = name.removesuffix("weight")
        return self._rounded(self.archive.read(f"{stem}lora_A")), self._rounded(self.archive.read(f"{stem}lora_B"))

    @property
    def keeps_initial(self) -> bool:
        """Whether the checkpoint holds A and B of the run's start."""
        return any(name.endswith(".lora_A_0") for name in self.archive.names())

    def initial_factors(self, name: str) -> tuple[Tensor, Tensor]:
        """A_0 [r, in] and B_0 [r, out], fp32, as they were subtracted from W."""
        stem = name.removesuffix("weight")
        return self.archive.read(f"{stem}lora_A_0"), self.archive.read(f"{stem}lora_B_0")

    def original(self, name: str) -> Tensor:
        """W + s B_0 A_0: the matrix from which the run began, fp32; a weight that is not adapted as it is now."""
        if not self.adapted(name):
            return self.base(name)
        A, B = self.initial_factors(name)
        return torch.addmm(self.base(name), B.t(), A, alpha=self.method.scaling)

    def base(self, name: str) -> Tensor:
        """The frozen W of an adapted weight, else the weight itself, fp32."""
        whole = self.archive.read(name)
        return whole.float() if self.adapted(name) else self._rounded(whole)

    def read(self, name: str, offset: Sequence[int] | None = None, size: Sequence[int] | None = None) -> Tensor:
        """A box of the effective weight, by default all of it, fp32."""
        part = self.archive.read(name, offset, size)
        if not self.adapted(name):
            return self._rounded(part)
        A, B = self.factors(name)
        (row, column), (rows, columns) = offset or (0, 0), part.shape
        return torch.addmm(part, B[:, row : row + rows].t(), A[:, column : column + columns], alpha=self.method.scaling)

    def _rounded(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.precision).float()


def _known(kind: type[T], stored: dict[str, Any]) -> T:
    """A section of a stored configuration, without what this version does not know."""
    inner: dict[str, Any] = {field.name: field.default_factory for field in fields(kind)}  # type: ignore[arg-type]
    known = {key: value for key, value in stored.items() if key in inner}
    return kind(
        **{key: _known(inner[key], value) if is_dataclass(inner[key]) else value for key, value in known.items()}
    )


def _model_order(name: str) -> tuple[int, int, str]:
    """Embedding, layers by number, final norm, head."""
    words = name.split(".")
    if words[1] == "layers":
        return 1, int(words[2]), name
    return {"embed_tokens": 0, "norm": 2}.get(words[1], 3), 0, name


def describe_model(config: ModelConfig, vocab_size: int) -> dict[str, Any]:
    """What must agree for weights to mean the same function."""
    same = {field.name: getattr(config, field.name) for field in fields(config)}
    same |= {"vocab_size": vocab_size, "num_kv_heads": config.kv_heads}
    return {key: value for key, value in same.items() if key not in ("initializer_range", "max_position_embeddings")}


@torch.no_grad()
def load_initial(model: LlamaForCausalLM, weights: Weights) -> None:
    """Replace a dense model's initial values, or this rank's part of them, by a checkpoint's weights.

    Raises:
        UserError: the checkpoint's model is another one, with both values.
    """
    mine = describe_model(model.config, model.vocab_size)
    theirs = describe_model(weights.model, weights.vocab_size)
    wrong = [f"model.{key} is {theirs[key]!r} there and {mine[key]!r} here" for key in mine if mine[key] != theirs[key]]
    if wrong:
        raise UserError(f"train.init_from holds another model: {'; '.join(wrong)}. Give its model section.")
    for name, param in model.named_parameters():
        part = parameter_part(name, param, None)
        if part.tensor.numel():
            part.tensor.copy_(weights.read(name, part.offset, part.tensor.shape))
