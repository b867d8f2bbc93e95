"""What the package asks of a model family: a `Family`, and the `LanguageModel` that it builds.

A family is a folder (or a plugin's file) that registers a `Family`. Its models consist of

    lm_head          a ColumnParallelLinear over the vocabulary, whose weight the embedding may share
    decoder linears  parallel linears (`distributed/linear.py`) of `num_layers` equal layers
    dense tensors    everything else: matrices, as the embedding, and vectors, as the norms'

Every parameter is the `weight` of its module and declares how it is split. Methods replace decoder linears; engine,
checkpoint, planning and conversion know nothing else of a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, Optional, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_switchlora.config.family import FamilyRules, find_family
from megatron_switchlora.config.model import ModelConfig
from megatron_switchlora.config.parallel import shard_size
from megatron_switchlora.distributed.collectives import gather_columns
from megatron_switchlora.distributed.cross_entropy import linear_cross_entropy
from megatron_switchlora.distributed.linear import ColumnParallelLinear, ParallelLinear, enter_block
from megatron_switchlora.distributed.shard import Axis, full_shape, named_generator, shard_of
from megatron_switchlora.model.elementwise import Elementwise

T = TypeVar("T")


class Projection(NamedTuple):
    """A linear layer of the decoder: full sizes, and which of them tensor parallelism splits."""

    out_features: int
    in_features: int
    row_parallel: bool
    multiple: int
    """A rank's part of that size is padded to a multiple of this."""

    def shard(self, tp: int) -> tuple[int, int]:
        """(out, in) of a rank's part of W, padding included."""
        if self.row_parallel:
            return self.out_features, shard_size(self.in_features, tp, self.multiple)
        return shard_size(self.out_features, tp, self.multiple), self.in_features


class DecoderLinear(NamedTuple):
    """A linear that a method may replace: `setattr(parent, attribute, other)`."""

    name: str
    parent: nn.Module
    attribute: str
    linear: ParallelLinear


class LanguageModel(nn.Module):
    """A whole model, or this rank's part of it; the base of every family's.

    A subclass registers `lm_head`, gives `hidden`, and calls its layers through `run_layer`. `heads` is the number of
    LTE heads among which the batch is split.
    """

    lm_head: ColumnParallelLinear

    def __init__(self, config: ModelConfig, vocab_size: Optional[int] = None, tp: Optional[Axis] = None) -> None:
        super().__init__()
        size = vocab_size if vocab_size is not None else config.vocab_size
        assert size is not None, "vocabulary size unknown"
        self.config, self.vocab_size, self.tp = config, size, tp or Axis()
        self.heads = 1
        self.checkpointing = False
        self.elementwise = Elementwise()

    def hidden(self, tokens_BS: Tensor) -> Tensor:
        """Return what enters `lm_head`: [B, S, D]."""
        raise TypeError("a model computes what enters its head")

    def run_layer(self, layer: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """Call a layer; with `checkpointing` backward computes it again instead of keeping its activations.

        Layers draw no random numbers, so the generators' states are not stored.
        """
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)
        return layer(*inputs)

    def forward(self, tokens_BS: Tensor, labels_BS: Optional[Tensor] = None) -> Tensor:
        """Return logits [B, S, V], or with labels [B, S] (already shifted) their mean cross entropy.

        Where the batch is split over K LTE heads, that of each: [K].
        """
        x_BSD, _ = enter_block(self.hidden(tokens_BS), (self.lm_head,), self.tp)
        if labels_BS is None:
            logits = self.lm_head(x_BSD)
            return gather_columns(replace(self.lm_head.split, dim=logits.dim() - 1), logits)
        weight, split = self.lm_head.weight, self.lm_head.split
        weights = (
            list(weight) if isinstance(weight, nn.ParameterList) else [weight] * self.heads
        )  # heads share a frozen one
        parts = zip(x_BSD.chunk(self.heads), weights, labels_BS.chunk(self.heads), strict=True)
        run = self.elementwise.run if self.elementwise.compiled else None
        losses = [linear_cross_entropy(*part, split, run) for part in parts]
        return losses[0] if self.heads == 1 else torch.stack(losses)

    def use(self, elementwise: Elementwise) -> None:
        """Run norms, rotations and gated activations in this way from here on."""
        for module in self.modules():
            if hasattr(module, "elementwise"):
                module.elementwise = elementwise  # type: ignore[assignment]

    def decoder_linears(self) -> list[DecoderLinear]:
        """Return the linears of the layers, in order: all parallel ones but the head."""
        return [
            DecoderLinear(f"{name}.{attribute}", parent, attribute, child)
            for name, parent in self.named_modules()
            for attribute, child in parent.named_children()
            if isinstance(child, ParallelLinear) and child is not self.lm_head
        ]

    def tied_names(self) -> dict[str, str]:
        """Return the names of parameters that are another one, with that one's name."""
        first: dict[int, str] = {}
        named = self.named_parameters(remove_duplicate=False)
        pairs = ((name, first.setdefault(id(param), name)) for name, param in named)
        return {name: same for name, same in pairs if name != same}


class Family(FamilyRules):
    """A family of models. Formulas are for a token, or a token of a layer, of a `ModelConfig` that passed its rules."""

    sums_per_layer: ClassVar[int] = 2
    """All-reduces of activations over tensor-parallel ranks in the forward pass of a layer, and as many in backward."""
    model_types: ClassVar[tuple[str, ...]] = ()
    """What `model_type` is in the config.json of Hugging Face folders that it reads; none: it reads none."""

    def build(self, config: ModelConfig, vocab_size: Optional[int], tp: Optional[Axis]) -> LanguageModel:
        """Return a model without initial values, or a tensor-parallel rank's part of it, on the default device."""
        raise TypeError("a family builds its models")

    def initial_value(self, name: str, shape: Sequence[int], config: ModelConfig, seed: int) -> Tensor:
        """Return a whole parameter before the first step, a function of its name: vectors are one, matrices normal."""
        if len(shape) < 2:
            return torch.ones(tuple(shape))
        return torch.empty(tuple(shape)).normal_(0.0, config.initializer_range, generator=named_generator(seed, name))

    def mixing_flops(self, config: ModelConfig, seq_len: int) -> int:
        """Return the FLOPs of a token's forward pass through a layer beside its projections, if they are many."""
        return 0

    def kept_bytes(self, config: ModelConfig, tp: int, size: int, compiled: bool) -> int:
        """Return bytes per token that autograd keeps of a layer for backward, numbers of compute having `size` bytes.

        `compiled` tells whether elementwise functions are (`model/elementwise.py`). What low-rank layers add is not
        among these bytes.
        """
        raise TypeError("a family estimates its activations")

    def hf_config(
        self, config: ModelConfig, vocab_size: int, seq_len: int, marks: dict[str, Any], dtype: str
    ) -> dict[str, Any]:
        """Return `config.json` of the exported model; `marks` as in `hf/folders.py`, `dtype` that of its weights."""
        raise TypeError("a family writes its own config.json")

    def read_hf_config(self, path: Path, content: dict[str, Any]) -> ModelConfig:
        """Return the configuration that the content of a config.json, read from `path`, describes.

        Raises:
            UserError: a setting under which the model is another function than ours.
        """
        raise TypeError("a family with model_types reads their config.json")

    def hf_name(self, name: str) -> str:
        """Return a parameter's name in Hugging Face's class."""
        return name

    def read_names(self, stored: Iterable[str]) -> dict[str, str]:
        """Return what a folder's tensors are called in Hugging Face's class; those to ignore are left out."""
        return {name: name for name in stored}


def family_of(config: ModelConfig) -> Family:
    """Return the family of a configuration's model.

    Raises:
        UserError: there is no such family.
    """
    family = find_family(config.family)
    assert isinstance(family, Family), f"{config.family} registered rules alone"
    return family


def build_model(config: ModelConfig, vocab_size: Optional[int] = None, tp: Optional[Axis] = None) -> LanguageModel:
    """Return a model without initial values; `vocab_size` where the configuration leaves it to the tokenizer."""
    return family_of(config).build(config, vocab_size, tp)


def build_on_meta(config: ModelConfig, vocab_size: int, tp: Optional[Axis] = None) -> LanguageModel:
    """Return a model whose tensors have shapes and no memory."""
    with torch.device("meta"):
        return build_model(config, vocab_size, tp)


class ByText(Generic[T]):
    """A value that is compared by its text: the key of a cache where it has no hash."""

    def __init__(self, value: T) -> None:
        self.value, self.text = value, repr(value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ByText) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)


def projections(config: ModelConfig) -> tuple[Projection, ...]:
    """Return the linears of one layer, in the order of `LanguageModel.decoder_linears`."""
    return _shape(ByText(config))[0]


def logits_size(config: ModelConfig, vocab_size: int, tp: int) -> int:
    """Return the logits of a token on a tensor-parallel rank, padding included."""
    return shard_size(vocab_size, tp, _shape(ByText(config))[1])


@lru_cache(maxsize=256)
def _shape(config: ByText[ModelConfig]) -> tuple[tuple[Projection, ...], int]:
    """Return the projections, and the multiple to which a rank's part of the vocabulary is padded."""
    model = build_on_meta(replace(config.value, num_layers=1), 1)
    linears = [each.linear for each in model.decoder_linears()]
    layer = (Projection(x.out_features, x.in_features, x.split_dim == 1, x.split.multiple) for x in linears)
    return tuple(layer), model.lm_head.split.multiple


def initial_value(name: str, shape: Sequence[int], config: ModelConfig, seed: int) -> Tensor:
    """Return a parameter of the whole model before the first step, whatever the method: a function of its name."""
    return family_of(config).initial_value(name, shape, config, seed)


def build_initialized(
    config: ModelConfig, vocab_size: int, tp: Optional[Axis], seed: int, device: torch.device
) -> LanguageModel:
    """Return a model with initial values on a device; the host holds a few tensors at a time."""
    with device:
        model = build_model(config, vocab_size, tp)
    initialize_weights(model, seed)
    return model


def initialize_weights(model: LanguageModel, seed: int) -> None:
    """Fill the parameters; each is drawn by name for the full tensor, then cut."""
    for name, param in model.named_parameters():
        param.data.copy_(shard_of(param, initial_value(name, full_shape(param), model.config, seed)))
