"""Check that replicas are equal, by fingerprints compared over a process group.

A fingerprint is two 64-bit sums of the elements' bits read as integers: a plain one, and one weighted by position. One
changed element or two swapped ones change it. It is computed on the device of compute: of a tensor in host memory,
chunk by chunk, since a CPU core takes 25 ns an element. Ranks first compare 8 bytes, one
sum over the fingerprints of all tensors, and the fingerprints only if these differ.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Optional

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK = 1 << 22
INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element


@torch.no_grad()
def fingerprint(tensor: Tensor, device: Optional[torch.device] = None) -> Tensor:
    """Return a tensor's fingerprint, int64 [2], computed on the device, by default its own."""
    device = tensor.device if device is None else device
    sums = torch.zeros(2, dtype=torch.int64, device=device)
    if tensor.numel() == 0:  # torch cannot view an empty tensor as integers
        return sums
    data = tensor.detach().contiguous().view(-1).view(INTEGER[tensor.element_size()])
    for start in range(0, data.numel(), CHUNK):
        chunk = data[start : start + CHUNK].to(device).long()
        weights = (torch.arange(chunk.numel(), device=device) + start) % 1_000_003 + 1
        sums[0] += chunk.sum()
        sums[1] += (chunk * weights).sum()
    return sums


def _gathered(tensor: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    """Return every rank's tensor, of one shape."""
    everyone = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(everyone, tensor, group=group)
    return everyone


def differing(named: Iterable[tuple[str, Tensor]], group: dist.ProcessGroup, device: torch.device) -> list[str]:
    """Return a sentence, with global ranks, for each tensor that is not equal on all ranks of the group.

    Collective over the group; names and order of the tensors must be the same on all ranks.
    """
    pairs = list(named)
    ranks = dist.get_process_group_ranks(group)
    if not pairs or len(ranks) == 1:
        return []
    fingerprints = torch.stack([fingerprint(tensor, device) for _, tensor in pairs])
    overall = _gathered(fingerprint(fingerprints)[1:], group)
    if all(torch.equal(digest, overall[0]) for digest in overall):
        return []
    gathered = _gathered(fingerprints, group)
    sentences = []
    for index, (name, _) in enumerate(pairs):
        first = gathered[0][index]
        odd = [rank for rank, others in zip(ranks, gathered, strict=True) if not torch.equal(others[index], first)]
        if odd:
            sentences.append(f"{name} differs between rank {ranks[0]} and {', '.join(map(str, odd))}")
    return sentences
