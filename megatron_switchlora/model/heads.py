"""The dense tensors of K LTE heads in one process: embedding, norms and head of each, side by side.

Activations hold the heads' samples one head after the other, [K b, S, D]. Every head's tensor is a
parameter of its own, NAME.weight.k, so that optimizer, checkpoint and merge treat it as that of a head on
ranks of its own. Tensor parallelism as in the layers replaced. A family's own modules with dense tensors
have `for_heads(heads)`, which returns what replaces them; see `model/norm.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_switchlora.config.errors import UserError
from megatron_switchlora.distributed.collectives import leave
from megatron_switchlora.distributed.linear import ColumnParallelLinear, VocabParallelEmbedding
from megatron_switchlora.distributed.shard import declare
from megatron_switchlora.model.protocol import LanguageModel


def copies(param: nn.Parameter, heads: int) -> nn.ParameterList:
    """Return a copy of a parameter for each head."""
    shard = param.shard  # type: ignore[attr-defined]
    each = (nn.Parameter(param.detach().clone()) for _ in range(heads))
    return nn.ParameterList(declare(copy, shard=shard, head=head) for head, copy in enumerate(each))


class HeadsEmbedding(nn.Module):
    """Token ids [K b, S] to vectors [K b, S, hidden]."""

    def __init__(self, base: VocabParallelEmbedding, heads: int) -> None:
        super().__init__()
        self.weight, self.split = copies(base.weight, heads), base.split

    def forward(self, tokens: Tensor) -> Tensor:
        local, here = self.split.locate(tokens)
        pairs = zip(local.chunk(len(self.weight)), self.weight, strict=True)
        vectors = torch.cat([F.embedding(ids, weight) for ids, weight in pairs])
        if self.split.axis.size == 1:
            return vectors
        return leave(self.split.axis, vectors.masked_fill(~here.unsqueeze(-1), 0.0))


class HeadsOutput(nn.Module):
    """Column-parallel output layers."""

    def __init__(self, base: ColumnParallelLinear, weight: nn.ParameterList) -> None:
        super().__init__()
        self.weight, self.split = weight, base.split

    def partial_parameters(self) -> tuple[nn.Parameter, ...]:
        return ()

    def forward(self, x: Tensor) -> Tensor:
        pairs = zip(x.chunk(len(self.weight)), self.weight, strict=True)
        return torch.cat([F.linear(each, weight) for each, weight in pairs])


def split_dense_tensors(model: LanguageModel, heads: int) -> None:
    """Give each of `heads` heads its own dense tensors, equal at first; the model's losses are then [heads].

    Raises:
        UserError: a module of the family has none for several heads.
    """
    output, tied = model.lm_head, None
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, VocabParallelEmbedding):
                embedding = HeadsEmbedding(child, heads)
                tied = embedding.weight if child.weight is output.weight else tied
                setattr(module, name, embedding)
            elif child is not output and not isinstance(child, nn.ParameterList):
                setattr(module, name, _for_heads(model, child, heads))
    weight = copies(output.weight, heads) if tied is None else tied
    model.lm_head = HeadsOutput(output, weight)  # type: ignore[assignment]
    model.heads = heads


def _for_heads(model: LanguageModel, module: nn.Module, heads: int) -> nn.Module:
    """Return what replaces a module: itself, if it has no parameters of its own."""
    if not list(module.parameters(recurse=False)):
        return module
    if not hasattr(module, "for_heads"):
        raise UserError(
            f"model.family {model.config.family} has no {type(module).__name__} for several LTE heads in one process, "
            f"and there are {heads}: give each head its ranks with parallel.lte_heads."
        )
    return module.for_heads(heads)  # type: ignore[operator]
