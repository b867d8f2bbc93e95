"""Read the dense weights of a checkpoint, by the model's names, for any method.

    a full-rank tensor     its fp32 master
    an adapted tensor      W + s B A, folded in fp32
    W in 4 bits            as the levels that its codes stand for
    the same of N heads    base + (s/N) sum_n B_n A_n, where base is the origin O, the common W, or the mean of W_n
Factors and dense tensors are first rounded to the run's precision, as the run's forward pass sees them. Any box of a
tensor can be read. So a rank reads only its shard, and a conversion holds only a few tensors. `load_initial` starts a
run of any method, on any mesh, from these weights, with the checkpoint's function.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Optional, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

import megatron_switchlora.methods  # noqa: F401  # registers them: stored configurations name one
from megatron_switchlora.checkpoint.files import Checkpoint, damaged, published
from megatron_switchlora.config.errors import UserError
from megatron_switchlora.config.facts import names_where
from megatron_switchlora.config.family import check_model
from megatron_switchlora.config.method import method_config_class
from megatron_switchlora.config.model import ModelConfig
from megatron_switchlora.config.plugins import listed, load_plugins
from megatron_switchlora.config.run import RunConfig, run_config_class
from megatron_switchlora.distributed.head_names import of_head, split_head
from megatron_switchlora.distributed.precision import PRECISIONS
from megatron_switchlora.distributed.shard import full_shape
from megatron_switchlora.distributed.slices import parameter_slice
from megatron_switchlora.lowrank.nf4 import dequantise, levels_on
from megatron_switchlora.model.protocol import LanguageModel, build_on_meta, family_of

T = TypeVar("T")


def find_folder(path: Path) -> Path:
    """Return the folder of a checkpoint: the path itself, or a run's newest checkpoint.

    Raises:
        UserError: the run has no checkpoint.
    """
    inside = published(path / "checkpoints")
    if (path / "config.yaml").is_file() and not inside:
        raise UserError(f"The run {path} has no published checkpoint: give another run, or train until it has one.")
    return inside[-1] if inside else path


def run_of(folder: Path) -> Path:
    """Return the folder of the run that a checkpoint belongs to, or else the checkpoint's own folder."""
    return folder.absolute().parents[1] if folder.absolute().parent.name == "checkpoints" else folder


class Weights:
    """Dense weights of a checkpoint; `config` is its run's configuration, as nested dicts."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.state: dict[str, Any] = checkpoint.state()
        self.config: dict[str, Any] = stored_config(checkpoint)
        self.imported: dict[str, Any] = self.state.get("imported") or {}  # marks and source of the imported model
        if "imported_from" in self.state:
            self.imported = {**self.imported, "source": str(self.state["imported_from"])}
        self.folder, self.archive = checkpoint.folder, checkpoint.archive()
        load_plugins(listed(self.config.get("plugins", [])), run_of(checkpoint.folder))
        self.model = _known(ModelConfig, self.config.get("model", {}))
        self.vocab_size: int = self.state.get("vocab_size", 0)
        check_model(self.model)
        self.family = family_of(self.model)
        self.precision = PRECISIONS[self.config.get("train", {}).get("precision", "fp32")]
        self.method = _known(method_config_class(), self.config.get("method", {}))
        heads = {head for name in self.archive.names() if (head := split_head(name)[0]) is not None}
        self.heads = sorted(heads)
        self.scaling = self.method.scaling / max(1, len(self.heads))

    def run_config(self) -> Optional[RunConfig]:
        """Return the run's configuration, or None for an import, which was not trained here."""
        return _known(run_config_class(), self.config) if "train" in self.config else None

    def names(self) -> list[str]:
        """Return the names of the model's parameters, in its order."""
        stored = {split_head(name)[1] for name in self.archive.names()}
        for kind in ("origin", "nf4_codes"):
            stored |= {f"{name.removesuffix(kind)}weight" for name in stored if name.endswith(f".{kind}")}
        order = list(self._shapes)
        differing = sorted(set(order) ^ {name for name in stored if name.endswith(".weight")})
        if differing:
            damaged(self.folder, f"its tensors are not those of its model ({', '.join(differing[:3])})")
        return order

    def _of_heads(self, name: str) -> list[str]:
        """Return the stored tensors of that name: one per head, or a single one."""
        by_head = [stored for head in self.heads if (stored := of_head(head, name)) in self.archive]
        return by_head or [name]

    def adapted(self, name: str) -> bool:
        return self._of_heads(f"{name.removesuffix('weight')}lora_A")[0] in self.archive

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """Return A [N r, in] and B [N r, out] of an adapted weight, those of N heads concatenated.

        They are in fp32, rounded to the run's precision.
        """
        A, B = (self._of_heads(f"{name.removesuffix('weight')}lora_{side}") for side in "AB")
        return tuple(torch.cat([self._rounded(self.archive.read(each)) for each in same]) for same in (A, B))  # type: ignore[return-value]

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the model's parameters, in its order."""
        return {name: tuple(full_shape(p)) for name, p in build_on_meta(self.model, self.vocab_size).named_parameters()}

    def _stored_base(self, name: str) -> list[str]:
        origin = f"{name.removesuffix('weight')}origin"
        return [origin] if origin in self.archive else self._of_heads(name)

    def _dequantised(self, name: str, offset: Sequence[int] | None, size: Sequence[int] | None) -> Tensor:
        """Return a box of a W in 4 bits; whole rows are read, since a block of columns has one scale."""
        (row, column), (rows, columns) = offset or (0, 0), size or self._shapes[name]
        stem = name.removesuffix("weight")
        parts = (f"{stem}nf4_{kind}" for kind in ("codes", "scales"))
        codes, scales = (self.archive.read(part, (row, 0), (rows, self.archive.shapes[part][1])) for part in parts)
        whole = dequantise(codes, scales, self._shapes[name][1], levels_on(codes.device))
        return whole[:, column : column + columns]

    def base(self, name: str, offset: Sequence[int] | None = None, size: Sequence[int] | None = None) -> Tensor:
        """Return a box, by default all, of an adapted weight's frozen W, or of another weight itself.

        It is in fp32. If each head has its own W, it is their mean.
        """
        in_4_bits = f"{name.removesuffix('weight')}nf4_codes" in self.archive
        if in_4_bits and self._stored_base(name)[0] not in self.archive:  # LTE's heads have an origin
            return self._dequantised(name, offset, size)
        stored = [self.archive.read(each, offset, size).float() for each in self._stored_base(name)]
        mean = stored[0] if len(stored) == 1 else torch.stack(stored).mean(0)
        return mean if self.adapted(name) else self._rounded(mean)

    @property
    def keeps_initial(self) -> bool:
        """Whether the checkpoint holds the initial A and B of the run."""
        return any(name.endswith(".lora_A_0") for name in self.archive.names())

    def initial_factors(self, name: str) -> tuple[Tensor, Tensor]:
        """Return A_0 [r, in] and B_0 [r, out] in fp32, as they were subtracted from W."""
        stem = name.removesuffix("weight")
        return self.archive.read(f"{stem}lora_A_0"), self.archive.read(f"{stem}lora_B_0")

    def original(self, name: str) -> Tensor:
        """Return W + s B_0 A_0, the matrix from which the run started, in fp32; other weights as they are now."""
        if not self.adapted(name):
            return self.base(name)
        A, B = self.initial_factors(name)
        return torch.addmm(self.base(name), B.t(), A, alpha=self.scaling)

    def read(self, name: str, offset: Sequence[int] | None = None, size: Sequence[int] | None = None) -> Tensor:
        """Return a box, by default all, of the effective weight, in fp32."""
        base = self.base(name, offset, size)
        if not self.adapted(name):
            return base
        A, B = self.factors(name)
        (row, column), (rows, columns) = offset or (0, 0), base.shape
        return torch.addmm(base, B[:, row : row + rows].t(), A[:, column : column + columns], alpha=self.scaling)

    def _rounded(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.precision).float()


def stored_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the configuration in a checkpoint's state, as nested dicts; an import's has only a model section.

    Raises:
        UserError: there is no configuration, or its fields have other types than in this version.
    """
    stored = checkpoint.state().get("config")
    wrong = wrong_fields(RunConfig, stored)
    if wrong or not isinstance(stored, dict):
        damaged(checkpoint.folder, f"state.json has no valid configuration ({', '.join(wrong[:3]) or 'none'})")
    return stored


def wrong_fields(kind: Any, stored: Any, name: str = "config") -> list[str]:
    """Return the fields of a stored configuration whose values do not have the types of dataclass `kind`.

    Fields that this version does not know are ignored.
    """
    if not isinstance(stored, dict):
        return [name]
    hints = get_type_hints(kind)
    return [
        field_name
        for key, value in stored.items()
        if key in hints
        for field_name in (
            wrong_fields(hints[key], value, f"{name}.{key}")
            if is_dataclass(hints[key])
            else [f"{name}.{key}"] * (not _fits(value, hints[key]))
        )
    ]


def _fits(value: Any, hint: Any) -> bool:
    """Return whether a value from JSON or YAML fits a field of this type."""
    kind, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if kind is Union:
        return any(_fits(value, each) for each in inner)
    if kind is Literal:
        return value in inner
    if kind is list:
        return isinstance(value, list) and all(_fits(each, inner[0]) for each in value)
    return type(value) in ({float, int} if hint is float else {kind or hint})


def _known(kind: type[T], stored: dict[str, Any]) -> T:
    """Build a section from a stored configuration, without fields that this version does not know."""
    factories: dict[str, Any] = {field.name: field.default_factory for field in fields(kind)}  # type: ignore[arg-type]
    values = {key: value for key, value in stored.items() if key in factories}
    return kind(
        **{
            key: _known(factories[key], value) if is_dataclass(factories[key]) else value
            for key, value in values.items()
        }
    )


def describe_model(config: ModelConfig, vocab_size: int) -> dict[str, Any]:
    """Return the fields that must be equal for the same weights to give the same function."""
    free = {"initializer_range", "max_position_embeddings"} | family_of(config).unread
    free |= set(names_where(config, lambda facts: not facts["results"]))
    same = {field.name: getattr(config, field.name) for field in fields(config)}
    same |= {"vocab_size": vocab_size, "num_kv_heads": config.kv_heads}
    return {key: value for key, value in same.items() if key not in free}


@torch.no_grad()
def load_initial(model: LanguageModel, weights: Weights) -> None:
    """Replace a dense model's initial values, or this rank's shards of them, by a checkpoint's weights.

    Raises:
        UserError: the checkpoint's model is a different one; the message gives both values.
    """
    configured = describe_model(model.config, model.vocab_size)
    saved = describe_model(weights.model, weights.vocab_size)
    wrong = [
        f"model.{key} is {saved[key]!r} there and {configured[key]!r} here"
        for key in configured
        if configured[key] != saved[key]
    ]
    if wrong:
        raise UserError(f"train.init_from holds another model: {'; '.join(wrong)}. Give its model options.")
    for name, param in model.named_parameters():
        held = parameter_slice(name, param, None)
        if held.tensor.numel():
            held.tensor.copy_(weights.read(name, held.offset, held.tensor.shape))
