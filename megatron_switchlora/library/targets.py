"""Find the linears of a model that get adapters.

    "all-linear"            every linear but the model's output layer, as in PEFT
    another string          a regular expression that matches the whole name
    a list                  names or ends of names after a dot, as "q_proj"; "*" stands for anything

A linear is `nn.Linear`, or the `Conv1D` of transformers, whose weight is [in, out]. A subclass may compute something
else, and torch's own transformer layers read the weights past the module. Both are refused.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Union

from torch import Tensor, nn

from megatron_switchlora.config.errors import require
from megatron_switchlora.lowrank.linear import LowRankLinear

Targets = Union[str, Sequence[str]]
READ_PAST = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


@dataclass
class Target:
    """A linear by its first name, and everywhere that the model calls it: (parent, attribute)."""

    name: str
    module: nn.Module
    places: list[tuple[nn.Module, str]]

    @property
    def transposed(self) -> bool:
        """Whether its weight is [in, out]."""
        return is_conv1d(self.module)

    @property
    def weight(self) -> Tensor:
        """Its weight [out, in]."""
        weight: Any = self.module.weight
        return weight.detach().t() if self.transposed else weight.detach()


def is_conv1d(module: nn.Module) -> bool:
    """Return whether a module is the Conv1D of transformers, which need not be installed."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")


def is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear or is_conv1d(module)


def matches(name: str, targets: Targets) -> bool:
    """Return whether a module's name is among the targets; see above."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == each or fnmatchcase(name, each) or fnmatchcase(name, f"*.{each}") for each in targets)


def find_targets(model: nn.Module, targets: Targets) -> list[Target]:
    """Return the linears that match, in the order of the model's modules; a shared one once, with all its places.

    Raises:
        UserError: nothing matches, or something does that is no linear by itself.
    """
    found: dict[nn.Module, Target] = {}
    outputs = output_layers(model)
    for name, parent, _, child in _children(model):
        if _wanted(name, child, targets, outputs):
            _require_linear(name, child, parent)
            _require_plain(name, child)
            found.setdefault(child, Target(name, child, []))
    for _, parent, attribute, child in _children(model):
        if child in found and (parent, attribute) not in found[child].places:
            found[child].places.append((parent, attribute))
    require(
        bool(found),
        f"targets {targets!r} match no linear of the model: its linears are {some(_linear_names(model))}.",
    )
    _require_own_weights(model, found.values())
    return list(found.values())


def _children(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    """Yield (name, parent, attribute, module) of every place of a module, repeated ones included."""
    for parent_name, parent in model.named_modules(remove_duplicate=False):
        for attribute, child in parent._modules.items():
            if child is not None:
                yield f"{parent_name}.{attribute}" if parent_name else attribute, parent, attribute, child


def _wanted(name: str, module: nn.Module, targets: Targets, outputs: Collection[nn.Module]) -> bool:
    if targets == "all-linear":
        return isinstance(module, nn.Linear) | is_conv1d(module) and module not in outputs
    is_leaf = next(module.children(), None) is None and next(module.parameters(), None) is not None
    return is_leaf and matches(name, targets)


def output_layers(model: nn.Module) -> set[nn.Module]:
    """Return what models of transformers call their output embeddings, also where one is a part of this model."""
    asked = (getattr(module, "get_output_embeddings", None) for module in model.modules())
    found = {ask() for ask in asked if callable(ask)}
    return {module for module in found if isinstance(module, nn.Module)}


def _require_linear(name: str, module: nn.Module, parent: nn.Module) -> None:
    kind = type(module).__name__
    require(
        is_linear(module),
        f"targets match {name}, a {kind}, but adapters fit nn.Linear and transformers' Conv1D alone: leave it out of "
        "the targets.",
    )
    require(
        not isinstance(parent, READ_PAST),
        f"targets match {name}, but {type(parent).__name__} reads its weight without calling it: leave it out of the "
        "targets, or use separate linears.",
    )


def _require_plain(name: str, module: nn.Module) -> None:
    """Refuse a linear whose weight is made of others, as pruning has it, or that somebody else listens to."""
    names = {short for short, _ in [*module.named_parameters(), *module.named_buffers()]}
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    require(
        names <= {"weight", "bias"} and not any(hooks) and "forward" not in vars(module),
        f"{name} has hooks, a forward of its own, or more than weight and bias, which an adapter would not keep: "
        "remove them, or leave it out of the targets.",
    )


def _require_own_weights(model: nn.Module, targets: Iterable[Target]) -> None:
    """Refuse weights that another module holds too, as a tied output layer does."""
    held = Counter(_memory(param) for module in model.modules() for param in module.parameters(recurse=False))
    tied = [target.name for target in targets if held[_memory(target.weight)] > 1]
    require(
        not tied,
        f"The weights of {some(tied)} belong to other modules too, which an adapter would not follow: leave them out "
        "of the targets.",
    )


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata if tensor.is_meta else tensor.untyped_storage().data_ptr()


def _linear_names(model: nn.Module) -> Iterator[str]:
    return (name for name, module in model.named_modules() if is_linear(module) or isinstance(module, LowRankLinear))


def some(names: Iterable[str]) -> str:
    """Return the first names, and how many more there are."""
    listed = list(names)
    rest = f" and {len(listed) - 4} more" if len(listed) > 4 else ""
    return (", ".join(listed[:4]) or "none") + rest
