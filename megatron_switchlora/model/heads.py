"""The dense tensors of K LTE heads in one process: embedding, norms and head of each, side by side.

Activations hold the heads' samples one head after the other, [K b, S, D]. Every head's tensor is a
parameter of its own, NAME.weight.k, so that optimizer, checkpoint and merge treat it as that of a head on
ranks of its own. Tensor parallelism as in the layers replaced.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_switchlora.distributed.collectives import leave
from megatron_switchlora.distributed.linear import ColumnParallelLinear, VocabParallelEmbedding
from megatron_switchlora.distributed.shard import declare
from megatron_switchlora.model.llama.model import LlamaForCausalLM, RMSNorm, normalised


def copies(param: nn.Parameter, heads: int) -> nn.ParameterList:
    """A head's copy of a parameter for each head."""
    shard = param.shard  # type: ignore[attr-defined]
    each = (nn.Parameter(param.detach().clone()) for _ in range(heads))
    return nn.ParameterList(declare(copy, shard=shard, head=head) for head, copy in enumerate(each))


class HeadsNorm(nn.Module):
    """RMSNorm with weights [hidden] a head."""

    def __init__(self, base: RMSNorm, heads: int) -> None:
        super().__init__()
        self.weight, self.eps = copies(base.weight, heads), base.eps

    def forward(self, x: Tensor) -> Tensor:
        by_head = normalised(x, self.eps).unflatten(0, (len(self.weight), -1))
        return (torch.stack(list(self.weight))[:, None, None] * by_head).flatten(0, 1)


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


def split_dense_tensors(model: LlamaForCausalLM, heads: int) -> None:
    """Give each of `heads` heads its own embedding, norms and output layer, equal at first; losses are [heads]."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, RMSNorm):
                setattr(module, name, HeadsNorm(child, heads))
    embedding = HeadsEmbedding(model.model.embed_tokens, heads)
    output = model.lm_head
    weight = embedding.weight if model.config.tie_embeddings else copies(output.weight, heads)
    model.model.embed_tokens = embedding  # type: ignore[assignment]
    model.lm_head = HeadsOutput(output, weight)  # type: ignore[assignment]
    model.heads = heads
