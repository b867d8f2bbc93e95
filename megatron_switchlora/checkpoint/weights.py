"""The dense weights of a checkpoint: what its model computes, by the model's names, whatever trained it.

A full-rank tensor is its fp32 master; an adapted one is W + s B A, folded in fp32; of LTE heads it is their mean,
O + (s/N) sum_n B_n A_n with the origin O, or the W, that all have, or else the mean of W_n. Factors and dense
tensors are first rounded to the run's precision, as its forward pass sees them. Any box can be read, so
a rank takes only its shard, and a conversion holds only a few tensors. `load_initial` starts a run of any
method, on any mesh, from these weights: its function is the checkpoint's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

import megatron_switchlora.methods  # noqa: F401  # registers them: stored configurations name one
from megatron_switchlora.checkpoint.files import Checkpoint, damaged, published
from megatron_switchlora.config.errors import UserError
from megatron_switchlora.config.family import check_model
from megatron_switchlora.config.method import method_config_class
from megatron_switchlora.config.model import ModelConfig
from megatron_switchlora.config.plugins import listed, load_plugins
from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.distributed.head_names import of_head, split_head
from megatron_switchlora.distributed.slices import parameter_slice
from megatron_switchlora.model.protocol import LanguageModel, build_on_meta, family_of

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


def run_of(folder: Path) -> Path:
    """The folder of the run that a checkpoint lies in; the checkpoint's own where it lies in none."""
    return folder.absolute().parents[1] if folder.absolute().parent.name == "checkpoints" else folder


class Weights:
    """Dense weights of a checkpoint; `config` is its run's, as nested dicts."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.state: dict[str, Any] = checkpoint.state()
        self.config: dict[str, Any] = stored_config(checkpoint)
        self.imported: dict[str, Any] = self.state.get("imported") or {}  # marks of the model that it all began from
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

    def names(self) -> list[str]:
        """Return the names of the model's parameters, in its order."""
        known = {split_head(name)[1] for name in self.archive.names()}
        known |= {f"{name.removesuffix('origin')}weight" for name in known if name.endswith(".origin")}
        order = [name for name, _ in build_on_meta(self.model, self.vocab_size).named_parameters()]
        odd = sorted(set(order) ^ {name for name in known if name.endswith(".weight")})
        if odd:
            damaged(self.folder, f"its tensors are not those of its model ({', '.join(odd[:3])})")
        return order

    def _of_heads(self, name: str) -> list[str]:
        """The stored tensors of that name: one a head, or one."""
        own = [stored for head in self.heads if (stored := of_head(head, name)) in self.archive]
        return own or [name]

    def adapted(self, name: str) -> bool:
        return self._of_heads(f"{name.removesuffix('weight')}lora_A")[0] in self.archive

    def shape(self, name: str) -> tuple[int, ...]:
        return self.archive.shapes[self._stored_base(name)[0]]

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """A [N r, in] and B [N r, out] of an adapted weight, those of N heads one after the other; fp32, rounded to the
        run's precision."""
        A, B = (self._of_heads(f"{name.removesuffix('weight')}lora_{side}") for side in "AB")
        return tuple(torch.cat([self._rounded(self.archive.read(each)) for each in same]) for same in (A, B))  # type: ignore[return-value]

    def _stored_base(self, name: str) -> list[str]:
        origin = f"{name.removesuffix('weight')}origin"
        return [origin] if origin in self.archive else self._of_heads(name)

    def base(self, name: str, offset: Sequence[int] | None = None, size: Sequence[int] | None = None) -> Tensor:
        """A box, by default all, of the frozen W of an adapted weight, else of the weight itself; fp32, the mean of
        the heads' own."""
        stored = [self.archive.read(each, offset, size).float() for each in self._stored_base(name)]
        mean = stored[0] if len(stored) == 1 else torch.stack(stored).mean(0)
        return mean if self.adapted(name) else self._rounded(mean)

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
        return torch.addmm(self.base(name), B.t(), A, alpha=self.scaling)

    def read(self, name: str, offset: Sequence[int] | None = None, size: Sequence[int] | None = None) -> Tensor:
        """A box of the effective weight, by default all of it, fp32."""
        part = self.base(name, offset, size)
        if not self.adapted(name):
            return part
        A, B = self.factors(name)
        (row, column), (rows, columns) = offset or (0, 0), part.shape
        return torch.addmm(part, B[:, row : row + rows].t(), A[:, column : column + columns], alpha=self.scaling)

    def _rounded(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.precision).float()


def stored_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The configuration in a checkpoint's state, as nested dicts; an import's has a model section alone.

    Raises:
        UserError: it has none, or one whose fields have other types than this version's.
    """
    stored = checkpoint.state().get("config")
    odd = odd_fields(RunConfig, stored)
    if odd or not isinstance(stored, dict):
        damaged(checkpoint.folder, f"state.json has no configuration of ours ({', '.join(odd[:3]) or 'none'})")
    return stored


def odd_fields(kind: Any, stored: Any, name: str = "config") -> list[str]:
    """Fields of a stored configuration whose values do not have the types of dataclass `kind`; those that this version
    does not know are passed over."""
    if not isinstance(stored, dict):
        return [name]
    hints = get_type_hints(kind)
    return [
        odd
        for key, value in stored.items()
        if key in hints
        for odd in (
            odd_fields(hints[key], value, f"{name}.{key}")
            if is_dataclass(hints[key])
            else [f"{name}.{key}"] * (not _fits(value, hints[key]))
        )
    ]


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value from JSON or YAML can be a field's of this type."""
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
    """A section of a stored configuration, without what this version does not know."""
    inner: dict[str, Any] = {field.name: field.default_factory for field in fields(kind)}  # type: ignore[arg-type]
    known = {key: value for key, value in stored.items() if key in inner}
    return kind(
        **{key: _known(inner[key], value) if is_dataclass(inner[key]) else value for key, value in known.items()}
    )


def describe_model(config: ModelConfig, vocab_size: int) -> dict[str, Any]:
    """Return what must agree for weights to mean the same function."""
    free = {"initializer_range", "max_position_embeddings"} | family_of(config).unread
    same = {field.name: getattr(config, field.name) for field in fields(config)}
    same |= {"vocab_size": vocab_size, "num_kv_heads": config.kv_heads}
    return {key: value for key, value in same.items() if key not in free}


@torch.no_grad()
def load_initial(model: LanguageModel, weights: Weights) -> None:
    """Replace a dense model's initial values, or this rank's part of them, by a checkpoint's weights.

    Raises:
        UserError: the checkpoint's model is another one, with both values.
    """
    configured = describe_model(model.config, model.vocab_size)
    saved = describe_model(weights.model, weights.vocab_size)
    wrong = [
        f"model.{key} is {saved[key]!r} there and {configured[key]!r} here"
        for key in configured
        if configured[key] != saved[key]
    ]
    if wrong:
        raise UserError(f"train.init_from holds another model: {'; '.join(wrong)}. Give its model section.")
    for name, param in model.named_parameters():
        held = parameter_slice(name, param, None)
        if held.tensor.numel():
            held.tensor.copy_(weights.read(name, held.offset, held.tensor.shape))
