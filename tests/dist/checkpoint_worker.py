"""Saves and resumes with fresh engines on one mesh: what a checkpoint must bring back, to the bit."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_switchlora.checkpoint import saver
from megatron_switchlora.checkpoint.archive import write_slices
from megatron_switchlora.checkpoint.engine_state import load_state, state_slices
from megatron_switchlora.checkpoint.files import Checkpoint, open_checkpoint, published, verified
from megatron_switchlora.checkpoint.lte_regroup import load_regrouped, regroups
from megatron_switchlora.checkpoint.weights import Weights
from megatron_switchlora.config.checkpoint import CheckpointConfig
from megatron_switchlora.distributed.head_names import of_head, split_head
from megatron_switchlora.distributed.replica_check import fingerprint
from megatron_switchlora.hf.folders import merged_state_dict
from megatron_switchlora.methods import SwitchLora
from megatron_switchlora.methods.lora import draw_factor
from tests.dist.engines import build_engine, micro_batches, start
from tests.plain import VOCAB, make_batches, small_config


def whole_state(engine: Any) -> list[list[int]]:
    """A fingerprint of everything: saved slices, and the weights that the forward uses."""
    tensors = [held.tensor for held in state_slices(engine)] + [param.data for param in engine.params]
    return [fingerprint(tensor.contiguous()).tolist() for tensor in tensors]


def load(engine: Any, checkpoint: Checkpoint, step: int) -> None:
    if regroups(engine.config, checkpoint.state()):
        load_regrouped(engine, checkpoint)
        engine.method.regrouped()
    else:
        load_state(engine, checkpoint.archive(), step)


def kept_heads(engine: Any, checkpoint: Checkpoint) -> int:
    """LTE heads here whose adapters are the checkpoint's, with masters, moments and row steps."""
    archive, alike = checkpoint.archive(), {}
    for held in state_slices(engine):
        head, name = split_head(held.name)
        if head is not None and ".lora_" in name:
            same = held.name in archive and torch.equal(
                archive.read(held.name, held.offset, held.tensor.shape).to(held.tensor.dtype), held.tensor
            )
            alike[head] = alike.get(head, True) and same
    return sum(alike.values())


def fresh_heads(engine: Any, checkpoint: Checkpoint) -> int:
    """LTE heads here that the checkpoint has not: adapters as a fresh run draws them, moments and row steps zero; dense
    tensors, with moments, of head n mod N."""
    archive, dense = checkpoint.archive(), set(engine.method.dense())
    stored = 1 + max(head for name in archive.names() if (head := split_head(name)[0]) is not None)
    drawn = drawn_factors(engine) if engine.config.method.lte.inner == "lora" else {}
    fresh = set()
    for held in state_slices(engine):
        own_head, own_name = split_head(held.name)
        if own_head is None or own_head < stored:
            continue
        head, (name, _, kind) = own_head, own_name.partition(":")
        if ".lora_" in name:
            fresh.add(head)
            if kind:
                assert not held.tensor.any(), held.name
            elif drawn:
                box = tuple(slice(o, o + n) for o, n in zip(held.offset, held.tensor.shape, strict=True))
                assert torch.equal(held.tensor, drawn[held.name][box]), held.name
        elif name in dense:
            stand_in = archive.read(of_head(head % stored, own_name), held.offset, held.tensor.shape)
            assert torch.equal(stand_in.to(held.tensor.dtype), held.tensor), held.name
    return len(fresh)


def drawn_factors(engine: Any) -> dict[str, torch.Tensor]:
    """A and B of the heads here at the start of a run, by the names of their slices."""
    method, found = engine.method, {}
    for name, linear in method.linears.items():
        shape = (linear.out_features, linear.in_features)
        for head, pair in enumerate(method._pairs(linear), method.first_head):
            for side, factor in zip("AB", pair, strict=True):
                full = draw_factor(engine.config, side, name, shape, factor.size(0), head)
                found[f"head_{head:02d}/{name}.lora_{side}"] = full
    return found


@torch.no_grad()
def export_gap(engine: Any, checkpoint: Checkpoint) -> float:
    """How far the exported weights are from those of the model that is evaluated."""
    weights = Weights(checkpoint)
    state = merged_state_dict(engine.method.evaluated())
    return max(float((weights.read(name) - tensor).abs().max() / tensor.abs().max()) for name, tensor in state.items())


def run_case(case: dict[str, Any], mesh: Any) -> dict[str, Any]:
    """Train from `first` (loaded from `folder` if not 0), save at `save_at`, end at `steps`."""
    config = small_config(case["method"], train__precision=case["precision"], train__seed=1, **case.get("changes", {}))
    config.parallel.lte_heads, config.parallel.tp = mesh.size("lte"), mesh.size("tp")
    folder = Path(case["folder"]) / "checkpoints"
    if dist.get_rank() == 0:
        folder.parent.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    engine = build_engine(config, case["stage"], mesh, begins=not case["first"])
    found: dict[str, Any] = {"losses": [], "norms": [], "switched": [], "facts": {}}
    if case["first"]:
        (path,) = [p for p in published(folder) if int(p.name[5:]) == case["first"]]
        load(engine, open_checkpoint(path), case["first"])
        engine.method.loaded()
        found["kept"] = kept_heads(engine, open_checkpoint(path))
        found["fresh"] = fresh_heads(engine, open_checkpoint(path)) if config.method.name == "lte" else 0
        found["export_gap"] = export_gap(engine, open_checkpoint(path))
        assert engine.differing_replicas() == []
        found["loaded"] = whole_state(engine)
    keeper = saver.Saver(folder, engine, CheckpointConfig(keep_last=9), lambda text: None)
    batches = make_batches(config, case["steps"])
    for step in range(case["first"], case["steps"]):
        result = engine.train_step(step, micro_batches(config, batches[step], mesh), lambda: (keeper.written,))
        assert result.healthy
        found["losses"].append(result.loss)
        found["norms"].append(result.grad_norm)
        found["switched"].append(result.switched)
        if result.votes[0] == dist.get_world_size():
            keeper.finish()
        if step + 1 == case.get("save_at"):
            state = {"step": step + 1, "config": config.to_dict(), "vocab_size": VOCAB}
            keeper.save(step + 1, {"state.json": json.dumps(state).encode()})
            found["saved"] = whole_state(engine)
            if isinstance(engine.method, SwitchLora):
                state = engine.method.state
                found["facts"] = {
                    "frozen": int(sum((values > 0).sum() for values in state.frozen.values())),
                    "wrapped": int((state.slots["A"] < engine.config.method.rank).sum()),
                }
    keeper.finish()
    if case.get("save_at") and dist.get_rank() == 0:
        verified(folder / f"step-{case['save_at']:08d}")
    dist.barrier()
    return found


def write_slowly(path: Path, slices: Any) -> None:
    """Steps go on meanwhile: what is written must be a copy of the state as it was."""
    time.sleep(0.3)
    write_slices(path, slices)


def act(payload: dict[str, Any]) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    mesh = start(payload["tp"], payload.get("heads", 1))
    saver.write_slices = write_slowly  # type: ignore[attr-defined]
    return [run_case(case, mesh) for case in payload["cases"]]
