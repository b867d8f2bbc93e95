"""The whole state of a run as slices of named tensors: what a checkpoint writes and what it fills.

Trainable tensors are saved as their fp32 masters, of which the weights are the cast, with both moments
and the row steps, frozen dense tensors as they are; then the method's own slices (frozen W, bank,
schedule). Rank by rank nothing is held twice in the files: of ranks with the same slice, one writes it,
in turns.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Optional, Protocol

import torch

from megatron_switchlora.checkpoint.archive import Archive
from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.distributed.mesh import Mesh
from megatron_switchlora.distributed.shard import is_split
from megatron_switchlora.distributed.slices import TensorSlice, parameter_slice
from megatron_switchlora.methods.base import Method
from megatron_switchlora.model.protocol import LanguageModel
from megatron_switchlora.optim.row_adamw import RowAdamW


class Engine(Protocol):
    """What a checkpoint needs of `train.engine.Engine`."""

    config: RunConfig
    mesh: Mesh
    method: Method
    device: torch.device
    optimizer: RowAdamW
    model: LanguageModel
    ds: Any


def state_slices(engine: Engine) -> Iterator[TensorSlice]:
    """This rank's slices, in the same order on all ranks of a group."""
    optimizer, stored_name = engine.optimizer, engine.method.stored_name
    for name, param in engine.model.named_parameters():
        if param.requires_grad:
            yield from optimizer.slices(stored_name(name), param, _same_here(is_split(param), optimizer.partitioned))
        else:  # of LTE heads, too, there is one
            yield parameter_slice(name, param, engine.method.frozen_group(param))
    yield from engine.method.slices()


def _same_here(split: bool, partitioned: bool) -> Optional[str]:
    """The group of ranks that hold the same of a master: of a parameter split over tp or not, partitioned by ZeRO or
    not."""
    if split:
        return None if partitioned else "dp"
    return "tp" if partitioned else "head"


def own_share(slices: Iterable[TensorSlice], mesh: Mesh) -> Iterator[TensorSlice]:
    """Of all slices of the ranks of a group, each once: the ranks that hold the same take turns."""
    turns: Counter[str] = Counter()
    for held in slices:
        if held.group is not None:
            axis = mesh.axis(held.group)
            turn = turns[held.group] % axis.size
            turns[held.group] += 1
            if turn != axis.rank:
                continue
        if held.tensor.numel():
            yield held


def load_state(engine: Engine, archive: Archive, step: int) -> None:
    """Bring a fresh engine to where the checkpoint's run was after `step` steps; `method.loaded()` comes after it.

    Raises:
        UserError: tensors are missing or have other shapes.
    """
    fill_slices(engine, archive.fill, step)


@torch.no_grad()
def fill_slices(engine: Engine, fill: Callable[[TensorSlice], None], step: int) -> None:
    """Call `fill` for all that a fresh engine holds, which has then `step` steps behind it."""
    for held in state_slices(engine):
        fill(held)
    for name, param in engine.model.named_parameters():
        if param.requires_grad:  # from the masters: ZeRO gathers only what it has stepped
            fill(parameter_slice(engine.method.stored_name(name), param, None))
    engine.ds.global_steps = step
    engine.ds.global_samples = step * engine.config.train.global_batch_size


def state_file(config: RunConfig, steps: int, more: dict[str, Any]) -> bytes:
    """state.json: the configuration, the position after `steps` steps in the data (a pure function of it: for
    readers), and what the run adds."""
    position = {"step": steps, "samples": steps * config.train.global_batch_size}
    return json.dumps({**position, "config": config.to_dict(), **more}, indent=1).encode()
