"""Linear layers and the embedding as the tensor-parallel mesh sees them.

    ColumnParallelLinear    weight [out, in], split on out
    RowParallelLinear       weight [out, in], split on in
    VocabParallelEmbedding  weight [vocabulary, hidden], split on the vocabulary
The mesh is 1 x dp x 1 for now, so a shard is the whole tensor and no collective runs; the split is
declared on the parameter all the same. No biases, as in LLaMA.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_switchlora.parallel.shard import declare


class ParallelLinear(nn.Module):
    """y = x W^T with x [..., in] and W [out, in]; the base of the two splits."""

    shard_dim: int

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = declare(nn.Parameter(torch.empty(out_features, in_features)), shard_dim=self.shard_dim)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)

    def effective_weight(self) -> Tensor:
        """The matrix [out, in] that the layer applies."""
        return self.weight.detach()


class ColumnParallelLinear(ParallelLinear):
    """Split on the output features: q, k, v, gate, up and the head."""

    shard_dim = 0


class RowParallelLinear(ParallelLinear):
    """Split on the input features: o and down."""

    shard_dim = 1


class VocabParallelEmbedding(nn.Module):
    """Token ids [...] to vectors [..., hidden]."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = declare(nn.Parameter(torch.empty(vocab_size, hidden_size)), shard_dim=0)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight)


def token_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of each token, in fp32 at least. logits [..., V], targets [...] -> [...]."""
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    flat = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")
    return flat.view_as(targets)
