"""Layouts of masters as DeepSpeed's classes make them, without DeepSpeed: of one rank, in one process."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_switchlora.optim.layout import RowLayout
from megatron_switchlora.optim.row_adamw import RowAdamW


def plain(optimizer: RowAdamW) -> tuple[RowLayout, list[Tensor]]:
    """Every parameter is its own master (fp32, stage 0)."""
    layout, masters = RowLayout(), [p for group in optimizer.param_groups for p in group["params"]]
    for param in masters:
        layout.add(param, param, 0, 0, param.numel())
    return layout, masters


def unfused(optimizer: RowAdamW) -> tuple[RowLayout, list[Tensor]]:
    """Every parameter has a master of its own in at least fp32 (bf16, stage 0)."""
    layout, masters = RowLayout(), []
    for group in optimizer.param_groups:
        held = []
        for param in group["params"]:
            held.append(param.detach().float().clone())
            layout.add(param, held[-1], 0, 0, param.numel())
        group["params"] = held
        masters += held
    return layout, masters


def flatten(optimizer: RowAdamW) -> None:
    """Make each group's parameters views of one flat tensor, as stages 1 and 2 do."""
    for group in optimizer.param_groups:
        flat = torch.cat([param.detach().flatten() for param in group["params"]])
        for param, part in zip(group["params"], flat.split([p.numel() for p in group["params"]]), strict=True):
            param.data = part.view(param.shape)


def partitioned(optimizer: RowAdamW, dp: int, rank: int) -> tuple[RowLayout, list[Tensor]]:
    """The rank has a share of each group's flat tensor (stages 1 and 2); boundaries cut rows."""
    flatten(optimizer)
    layout, masters = RowLayout(), []
    layout.partitioned = True
    for group in optimizer.param_groups:
        total = sum(param.numel() for param in group["params"])
        size = -(-total // (2 * dp)) * 2
        flat = torch.zeros(size, device=group["params"][0].device)
        begin, at = rank * size, 0
        for param in group["params"]:
            low, high = max(at, begin), min(at + param.numel(), begin + size)
            if low < high:
                layout.add(param, flat, low - begin, low - at, high - low)
                flat[low - begin : high - begin] = param.detach().flatten()[low - at : high - at].float()
            at += param.numel()
        group["params"] = [flat]
        masters.append(flat)
    return layout, masters


def write_back(layout: RowLayout) -> None:
    """Cast what this rank holds of the masters into the parameters, as a step's end does."""
    for param, pieces in layout.by_param.items():
        for piece in pieces:
            if piece.master is not param:
                piece.source(param.data).copy_(piece.block(piece.master.data))


LAYOUTS = {
    "plain": plain,
    "unfused": unfused,
    "whole": lambda optimizer: partitioned(optimizer, 1, 0),
    "first of 3": lambda optimizer: partitioned(optimizer, 3, 0),
    "second of 3": lambda optimizer: partitioned(optimizer, 3, 1),
    "third of 3": lambda optimizer: partitioned(optimizer, 3, 2),
    "fourth of 8": lambda optimizer: partitioned(optimizer, 8, 3),
}
