"""Merge a LoRA folder of PEFT into its base: W + s B A with s = alpha / r, or alpha / sqrt(r) with rsLoRA.

Only plain LoRA on linears is merged, so that an import has the function that PEFT computes. Anything else in
adapter_config.json or the tensor file is an error: DoRA, rank patterns, saved modules, initialisations that change the
base, other kinds of adapters. The sum is computed in fp32, one tensor at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_switchlora.config.errors import require
from megatron_switchlora.disk import user_path
from megatron_switchlora.hf.import_ import (
    Stored,
    first_names,
    read_object,
    read_stored,
    scan,
)
from megatron_switchlora.model.entries import read_number, read_whole

CONFIG, FILE, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
KNOWN = (  # entries that do not change the sum; all others must be unset
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "use_rslora", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern", "megatron_core", "qalora_group_size", "init_lora_weights", "bias", "eva_config",
)  # fmt: skip
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # other initialisations change the base
INSTEAD = "merge it in PEFT (merge_and_unload, then save_pretrained) and give that folder."


@dataclass(frozen=True)
class Adapter:
    """A PEFT adapter over its base.

    `factors` holds A [r, in] and B [out, r] by the name of the adapted weight. `own` holds weights that replace the
    base's, which PEFT stores with the adapter of an output layer.
    """

    folder: Path
    base: Path
    scaling: float
    factors: dict[str, tuple[Stored, Stored]]
    own: dict[str, Stored]

    def merged(
        self, tensors: Iterator[tuple[str, Tensor]], shapes: dict[str, list[int]]
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the base's (name, tensor) with the adapter folded in.

        Raises:
            UserError: at the call, if factors do not fit the base's shapes; while reading, as `read_stored`.
        """
        for name, (A, B) in self.factors.items():
            wanted = shapes.get(name)
            require(wanted is not None, f"{self.folder} adapts {name}, which its base {self.base} does not have.")
            own = self.own[name].shape if name in self.own else wanted
            require(
                wanted == [B.shape[0], A.shape[1]] == own,
                f"{self.folder} adapts {name} with B {B.shape} and A {A.shape}, but the base's has shape {wanted}: "
                "give the adapter's own base with --base.",
            )
        return ((name, self._added(name, tensor)) for name, tensor in tensors)

    def _added(self, name: str, weight: Tensor) -> Tensor:
        if name not in self.factors:
            return weight
        A, B = map(read_stored, self.factors[name])
        weight = read_stored(self.own[name]) if name in self.own else weight
        return torch.addmm(weight, B, A, alpha=self.scaling)


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def read_adapter(folder: Path, base: Path | None = None) -> Adapter:
    """Read the adapter in a folder, over `base` or else over the base whose path the adapter gives.

    A relative path starts at the working directory, as in PEFT.

    Raises:
        UserError: the adapter is not a plain LoRA, the base is not a folder, or files are damaged or missing.
    """
    path = folder / CONFIG
    config = read_object(path)
    kind = config.get("peft_type")
    require(kind == "LORA", f"{path} has peft_type {kind!r}, but only LORA is merged here: {INSTEAD}")
    foreign = [key for key, value in config.items() if key not in KNOWN and value]
    require(not foreign, f"{path} has {_values(config, foreign)}, but only plain LoRA is merged here: {INSTEAD}")
    require(config.get("bias", "none") == "none", f"{path} has {_values(config, ['bias'])}: {INSTEAD}")
    start = config.get("init_lora_weights")
    require(
        any(start is plain or start == plain for plain in PLAIN_STARTS),
        f"{path} has {_values(config, ['init_lora_weights'])}, which changes the base: {INSTEAD}",
    )
    rank, alpha = read_whole(path, config, "r"), read_number(path, config, "lora_alpha", math.nan)
    require(rank >= 1, f"{path} must hold r of at least 1, not {rank}: correct it.")
    factors, own = _factors(folder / FILE, rank)
    named = str(config.get("base_model_name_or_path") or "")
    base_folder = base or user_path(named)
    require(
        bool(named or base) and base_folder.is_dir(),
        f"{path} names its base {named!r}, which is no folder here: fetch the base and give its folder with --base.",
    )
    return Adapter(folder, base_folder, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank), factors, own)


def _values(config: dict[str, Any], keys: list[str]) -> str:
    return ", ".join(f"{key} {str(config.get(key))[:60]}" for key in keys)


def _factors(path: Path, rank: int) -> tuple[dict[str, tuple[Stored, Stored]], dict[str, Stored]]:
    require(
        path.is_file(),
        f"{path} does not exist, and adapters are read from no other file: save it with PEFT's save_pretrained, which "
        "writes safetensors.",
    )
    stored = scan(path)
    names = sorted(name[: -len(".lora_A.weight")] for name in stored if name.endswith(".lora_A.weight"))
    wanted = {f"{name}.lora_{side}.weight" for name in names for side in "AB"}
    own = {f"{name}.base_layer.weight" for name in names} & stored.keys()
    strange = sorted((stored.keys() - own) ^ wanted) + [name for name in names if not name.startswith(PREFIX)]
    require(
        not strange and bool(names),
        f"{path} is not a plain LoRA, as it holds or lacks {first_names(strange)}: {INSTEAD}",
    )
    for name in wanted | own:
        shape = stored[name].shape
        fits = len(shape) == 2 and (name in own or shape["lora_B" in name] == rank)
        require(fits, f"{path} holds {name} of shape {shape}, but r in {CONFIG} is {rank}: fetch both again.")
    inner = {name: f"{name.removeprefix(PREFIX)}.weight" for name in names}
    pairs = {inner[name]: (stored[f"{name}.lora_A.weight"], stored[f"{name}.lora_B.weight"]) for name in names}
    return pairs, {inner[name.removesuffix(".base_layer.weight")]: stored[name] for name in own}
