"""Runs training cases on one mesh and reports losses, norms, bytes and what the invariants say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megatron_switchlora.config.parallel import ParallelConfig
from megatron_switchlora.distributed.mesh import build_mesh
from megatron_switchlora.distributed.replica_check import fingerprint
from megatron_switchlora.hf.folders import merged_state_dict
from megatron_switchlora.methods import Relora, SwitchLora
from megatron_switchlora.model.llama.model import LlamaForCausalLM
from megatron_switchlora.model.protocol import initialize_weights
from megatron_switchlora.optim.pruning import kept_count
from tests.dist.engines import build_engine, full_rows, micro_batches, start
from tests.plain import VOCAB, make_batches, small_config


def start_gap(engine: Any) -> float:
    """How far W + sBA is from the plain initial weights, relative, at the start."""
    plain = LlamaForCausalLM(engine.config.model, VOCAB)
    initialize_weights(plain, engine.config.train.seed)
    dense = dict(plain.named_parameters())
    return max(
        float((linear.effective_weight() - linear.split.take(dense[f"{name}.weight"])).norm() / linear.weight.norm())
        for name, linear in engine.method.linears.items()
    )


def watch_freezes(engine: Any, seen: dict[str, float]) -> None:
    """Around every optimizer step: frozen rows' masters stay, others move."""
    method = engine.method
    planned, ended = method.before_step, method.after_step
    held: dict[Any, Any] = {}

    def before_step(step: int) -> int:
        count = planned(step)
        for side in "AB":
            for linear, left in zip(method.switching, method.state.frozen[side], strict=True):
                factor = linear.lora_A if side == "A" else linear.lora_B
                held[factor] = full_rows(engine, factor)["master"], torch.from_numpy(left > 0)
        return count

    def after_step(step: int) -> None:
        for factor, (master, frozen) in held.items():
            moved = (full_rows(engine, factor)["master"] - master).abs().amax(1)
            seen["frozen_rows"] += int(frozen.sum())
            seen["frozen_moved"] = max(seen["frozen_moved"], float(moved[frozen].max()) if frozen.any() else 0.0)
            seen["free_stuck"] += int((moved[~frozen] == 0).sum())
        ended(step)

    method.before_step, method.after_step = before_step, after_step


def watch_switches(engine: Any, seen: dict[str, float]) -> None:
    """Around every switch: the function stays, and switched rows' masters equal the rows the forward uses."""
    method = engine.method
    original = method.before_step

    def before_step(step: int) -> int:
        earlier = [linear.effective_weight().clone() for linear in method.switching]
        slots = {side: values.copy() for side, values in method.state.slots.items()}
        count = original(step)
        for layer, (linear, before) in enumerate(zip(method.switching, earlier, strict=True)):
            change = (linear.effective_weight() - before).norm() / before.norm()
            seen["function_change"] = max(seen["function_change"], float(change))
            for side, factor in (("A", linear.lora_A), ("B", linear.lora_B)):
                moved = torch.from_numpy(method.state.slots[side][layer] != slots[side][layer])
                if moved.any():
                    rows = full_rows(engine, factor)
                    gap = (rows["master"][moved] - factor.detach().float()[moved]).abs().max()
                    seen["master_gap"] = max(seen["master_gap"], float(gap))
                    partner = full_rows(engine, linear.lora_B if side == "A" else linear.lora_A)
                    for key in ("exp_avg", "exp_avg_sq", "row_step"):
                        seen["reset_left"] = max(seen["reset_left"], float(partner[key][moved].abs().max()))
        return count

    method.before_step = before_step


def watch_restarts(engine: Any, seen: dict[str, float]) -> None:
    """Around every restart: the function stays, masters equal what the forward uses, and of the whole moments, put
    together over all ranks, exactly the largest are left."""
    method = engine.method
    original = method._restart

    def whole(factor: Any) -> dict[str, torch.Tensor]:
        rows = full_rows(engine, factor)
        return {
            key: rows[key] if factor.shard is None else factor.shard.gather(rows[key])
            for key in ("exp_avg", "exp_avg_sq")
        }

    def restart(number: int) -> None:
        earlier = [linear.effective_weight().clone() for linear in method.linears.values()]
        moments = [whole(factor) for factor in method.matrices()]
        original(number)
        for linear, before in zip(method.linears.values(), earlier, strict=True):
            change = (linear.effective_weight() - before).norm() / before.norm()
            seen["function_change"] = max(seen["function_change"], float(change))
        for factor, before in zip(method.matrices(), moments, strict=True):
            rows, after = full_rows(engine, factor), whole(factor)
            seen["master_gap"] = max(seen["master_gap"], float((rows["master"] - factor.detach().float()).abs().max()))
            seen["reset_left"] = max(seen["reset_left"], float(rows["row_step"].max()))
            for key, values in before.items():
                threshold = values.abs().flatten().topk(kept_count(factor, method.config.method.relora.keep)).values[-1]
                if method.config.method.relora.moments == "zero":
                    threshold = torch.inf
                seen["wrongly_pruned"] += int((after[key] != values.masked_fill(values.abs() < threshold, 0.0)).sum())
        seen["restarts"] += 1

    method._restart = restart


def bank_facts(engine: Any) -> dict[str, Any]:
    """Is the bank whole over the ranks, does each hold its part only, how many bytes are here?"""
    method = engine.method
    whole, real, expected = True, 0, 0
    names = [name for name, linear in method.linears.items() if linear in method.switching]
    for (side, layer), held in method.bank.held.items():
        linear, candidates = method.switching[layer], method.schedule.candidates[layer]
        factor = linear.lora_A if side == "A" else linear.lora_B
        rows = held.split.gather(held.rows)
        rows = rows if factor.shard is None else factor.shard.gather(rows)
        whole &= torch.equal(rows, method._draw_vectors(side, names[layer], candidates).to(rows.dtype))
        counted = torch.tensor(held.split.real)
        torch.distributed.all_reduce(counted, group=held.split.axis.group) if held.split.axis.group else None
        real += int(counted) - candidates
        expected += held.split.local * factor.size(1) * rows.element_size()
    return {"whole": whole, "held_twice": real, "bytes": method.bank.num_bytes(), "expected_bytes": expected}


def whole_state(engine: Any) -> dict[str, list[int]]:
    """A fingerprint of each W, whole on this tensor-parallel rank, and of factors, masters, moments, counters, bank."""
    found = {name: fingerprint(param.data) for name, param in engine.model.named_parameters()}
    for name, linear in getattr(engine.method, "linears", {}).items():
        found[name] = fingerprint(linear.whole_weight())
        for side, factor in (("A", linear.lora_A), ("B", linear.lora_B)):
            found |= {f"{name} {side} {key}": fingerprint(rows) for key, rows in full_rows(engine, factor).items()}
    if isinstance(engine.method, SwitchLora):
        found |= {f"{key}": fingerprint(held.split.gather(held.rows)) for key, held in engine.method.bank.held.items()}
    return {name: sums.tolist() for name, sums in found.items()}


def padding_left(engine: Any) -> float:
    """The largest value in the padding of parameters, frozen weights and moments on this rank: must be zero."""
    largest = 0.0
    for param in engine.params:
        if param.shard is not None and param.shard.real < param.shard.local:
            tensors = [param.detach(), *(t for key, t in full_rows(engine, param).items() if key != "row_step")]
            for tensor in tensors:
                pad = tensor.narrow(param.shard.dim, param.shard.real, param.shard.local - param.shard.real)
                largest = max(largest, float(pad.abs().max()))
    for linear in getattr(engine.method, "linears", {}).values():
        weight = linear.whole_weight()
        pad = weight.narrow(linear.split.dim, linear.split.real, linear.split.local - linear.split.real)
        largest = max(largest, float(pad.abs().max()) if pad.numel() else 0.0)
    return largest


def run_case(case: dict[str, Any], mesh: Any) -> dict[str, Any]:
    config = small_config(case["method"], train__precision=case["precision"], train__seed=1, **case.get("changes", {}))
    engine = build_engine(config, case["stage"], mesh)
    seen = dict.fromkeys(
        (
            "function_change",
            "master_gap",
            "reset_left",
            "frozen_rows",
            "frozen_moved",
            "free_stuck",
            "start_gap",
            "wrongly_pruned",
            "restarts",
        ),
        0.0,
    )
    if isinstance(engine.method, SwitchLora) and case.get("watch"):
        seen["start_gap"] = start_gap(engine)
        watch_switches(engine, seen)
        watch_freezes(engine, seen)
    if isinstance(engine.method, Relora):
        watch_restarts(engine, seen)
    bank = bank_facts(engine) if isinstance(engine.method, SwitchLora) else None
    losses, norms, switched, dp_bytes, fetches, gathers = [], [], 0, [], [], []
    for step, batch in enumerate(make_batches(config, case["steps"])):
        result = engine.train_step(step, micro_batches(config, batch, mesh))
        assert result.healthy
        losses.append(result.loss)
        norms.append(result.grad_norm)
        dp_bytes.append(result.dp_bytes)
        fetches.append(sum(n for record, n in engine.recorder.calls.items() if record.phase == "switch"))
        gathers.append(sum(n for record, n in engine.recorder.calls.items() if record.phase == "base"))
        switched += result.switched
    cast_gap = max(
        float((full_rows(engine, p)["master"].to(p.dtype).float() - p.detach().float()).abs().max())
        for p in engine.params
    )
    if "export" in case:
        state = merged_state_dict(engine.model)
        if torch.distributed.get_rank() == 0:
            save_file(state, Path(case["export"]))
    rows = [p for p in engine.params if p.rows]
    layout = engine.optimizer.layout
    return {
        "losses": losses,
        "differing": engine.differing_replicas(),
        "padding": padding_left(engine),
        "bank": bank,
        "norms": norms,
        "switched": switched,
        "dp_bytes": dp_bytes,
        "fetches": fetches,
        "gathers": gathers,
        "state": whole_state(engine),
        "frozen_bytes": sum(buffer.nbytes for buffer in engine.model.buffers()),
        "trainable": sum(p.numel() for p in engine.params),
        "wrapper": type(engine.ds.optimizer).__name__,
        "cast_gap": cast_gap,
        "cut_rows": sum(
            piece.width * piece.row_count() != param.numel()
            for param, pieces in layout.by_param.items()
            for piece in pieces
        ),
        "weight_dtypes": sorted({str(b.dtype) for n, b in engine.model.named_buffers()}),
        "param_dtypes": sorted({str(p.dtype) for p in engine.params}),
        "state_bytes": sum(
            tensor.numel() * tensor.element_size()
            for master, state in engine.optimizer.state.items()
            for tensor in state.values()
        ),
        "row_params": sum(p.numel() for p in rows),
        **seen,
    }


def act(payload: dict[str, Any]) -> list[dict[str, Any]]:
    mesh = start(payload.get("tp", 1))
    # where a case names hosts, one per rank, its mesh is data-parallel and divided by them
    return [
        run_case(case, build_mesh(ParallelConfig(), hosts=case["hosts"]) if "hosts" in case else mesh)
        for case in payload["cases"]
    ]
