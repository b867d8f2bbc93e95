"""Magnitude pruning of Adam moments, the same on every mesh and ZeRO stage (ReLoRA, arXiv 2307.05695, section 3).

Of each moment of a whole parameter, over all its shards, the k = keep x size entries of largest magnitude stay: at
least one, and ties with the k-th. The others become zero.

No rank sees the whole. Each offers the k largest entries of what it holds and no other rank offers. One all-gather over
the head group collects the offers for all parameters. The k-th largest offer is exactly the k-th largest entry of the
moment. ReLoRA's published code prunes at random or by magnitude, each data-parallel rank its own full copy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_switchlora.distributed.mesh import Mesh
from megatron_switchlora.distributed.shard import full_shape, is_split
from megatron_switchlora.optim.row_adamw import RowAdamW

MOMENTS = ("exp_avg", "exp_avg_sq")


def kept_count(param: nn.Parameter, keep: float) -> int:
    """Return how many entries of a moment of the whole parameter stay."""
    return max(1, round(keep * torch.Size(full_shape(param)).numel()))


@torch.no_grad()
def prune_moments(optimizer: RowAdamW, params: Sequence[nn.Parameter], keep: float, mesh: Mesh) -> None:
    """Keep the share `keep` in (0, 1] of both moments of every parameter. Collective over the head group."""
    wanted = [(param, key, kept_count(param, keep)) for param in params for key in MOMENTS]
    offers = _together(torch.cat([_offer(optimizer, *each, mesh) for each in wanted]), mesh)
    for (param, key, count), offered in zip(wanted, offers.split([count for *_, count in wanted], dim=1), strict=True):
        threshold = offered.flatten().topk(count).values[-1]
        for block in _blocks(optimizer, param, key):
            block.masked_fill_(block.abs() < threshold, 0.0)


def _blocks(optimizer: RowAdamW, param: nn.Parameter, key: str) -> list[Tensor]:
    """Return views of what this rank holds of a moment."""
    return [piece.block(optimizer.state[piece.master][key]) for piece in optimizer.pieces(param)]


def _offer(optimizer: RowAdamW, param: nn.Parameter, key: str, count: int, mesh: Mesh) -> Tensor:
    """Return the `count` largest magnitudes here; -1 where there are fewer, or another rank offers them."""
    offer = torch.full((count,), -1.0, device=param.device)
    first_of_copies = (is_split(param) or mesh.rank("tp") == 0) and (optimizer.partitioned or mesh.rank("dp") == 0)
    blocks = _blocks(optimizer, param, key) if first_of_copies else []
    if blocks:
        held = torch.cat([block.abs().flatten() for block in blocks])
        largest = held.topk(min(count, len(held))).values
        offer = offer.to(held.dtype)
        offer[: len(largest)] = largest
    return offer


def _together(offer: Tensor, mesh: Mesh) -> Tensor:
    """Return all ranks' offers [ranks, entries]."""
    ranks = mesh.axis("head")
    if ranks.size == 1:
        return offer[None]
    offers = [torch.empty_like(offer) for _ in range(ranks.size)]
    dist.all_gather(offers, offer, group=ranks.group)
    return torch.stack(offers)
