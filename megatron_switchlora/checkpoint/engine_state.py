"""Describe the whole state of a run as slices of named tensors, which a checkpoint writes and fills.

    trainable tensors       as fp32 masters, of which the weights are casts, with both moments and the row steps
    frozen dense tensors    as they are
    the method's slices     frozen W, bank, schedule
The files hold nothing twice. Among ranks with the same slice one writes it, and they take turns.
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
    """Yield this rank's slices, in the same order on all ranks of a group."""
    optimizer, stored_name = engine.optimizer, engine.method.stored_name
    for name, param in engine.model.named_parameters():
        if param.requires_grad:
            yield from optimizer.slices(stored_name(name), param, _same_here(is_split(param), optimizer.partitioned))
        else:  # LTE heads share one
            yield parameter_slice(name, param, engine.method.frozen_group(param))
    yield from engine.method.slices()


def _same_here(split: bool, partitioned: bool) -> Optional[str]:
    """Return the group of ranks that hold the same values of a master, or None if no other rank does.

    `split` is true if tp splits the parameter, `partitioned` if ZeRO partitions the master.
    """
    if split:
        return None if partitioned else "dp"
    return "tp" if partitioned else "head"


def own_share(slices: Iterable[TensorSlice], mesh: Mesh) -> Iterator[TensorSlice]:
    """Yield the slices that this rank writes: ranks of a group that hold the same slices take turns."""
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
    """Fill a fresh engine with the state after `step` steps; call `method.loaded()` afterwards.

    Raises:
        UserError: tensors are missing or have other shapes.
    """
    fill_slices(engine, archive.fill, step)


@torch.no_grad()
def fill_slices(engine: Engine, fill: Callable[[TensorSlice], None], step: int) -> None:
    """Call `fill` for every slice of a fresh engine, and set its position to `step` steps."""
    for held in state_slices(engine):
        fill(held)
    for name, param in engine.model.named_parameters():
        if param.requires_grad:  # from the masters, since ZeRO gathers a weight only after an update
            fill(parameter_slice(engine.method.stored_name(name), param, None))
    engine.ds.global_steps = step
    engine.ds.global_samples = step * engine.config.train.global_batch_size


def state_file(config: RunConfig, steps: int, more: dict[str, Any]) -> bytes:
    """Return the content of state.json: the configuration, the position after `steps` steps, and the run's `more`.

    The position in the data follows from the steps; it is there for people who read the file.
    """
    position = {"step": steps, "samples": steps * config.train.global_batch_size}
    return json.dumps({**position, "config": config.to_dict(), **more}, indent=1).encode()
