"""What the package relies on in DeepSpeed's internals, looked at directly; and what it does with bad numbers."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from megatron_switchlora.config.ds_config import resolve_ds_config
from megatron_switchlora.config.errors import UserError
from megatron_switchlora.distributed.replica_check import differing
from megatron_switchlora.methods import SwitchLora
from megatron_switchlora.model.llama.model import LlamaForCausalLM
from megatron_switchlora.model.protocol import initialize_weights
from megatron_switchlora.optim.row_adamw import RowAdamW
from megatron_switchlora.train.diagnose import find_bad_layer
from tests.dist.engines import DS_JSON, build_engine, full_rows, micro_batches, start
from tests.plain import VOCAB, make_batches, small_config

CLASSES = [("fp32", "0"), ("fp32", "1"), ("fp32", "2"), ("bf16", "0"), ("bf16", "1"), ("bf16", "2"), ("bf16", "1f")]
BAD = "model.layers.1.mlp.up_proj"


def internals(engine: Any, stage: str) -> dict[str, Any]:
    """The attributes that optim/layout.py and train/engine.py read."""
    optimizer = engine.ds.optimizer
    groups = engine.optimizer.param_groups
    facts: dict[str, Any] = {
        "client_kept": engine.ds.basic_optimizer is engine.optimizer,
        "group_keys_survive": [group["name"] for group in groups] == ["matrices", "dense", "norms"],
        "params_declared": all(hasattr(param, "shard") for param in engine.params),
        "module_is_the_model": engine.ds.module is engine.model,
    }
    kind = type(optimizer).__name__
    if kind == "FP16_UnfusedOptimizer":
        pairs = [
            p
            for low, high in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
            for p in zip(low, high, strict=True)
        ]
        facts["fp32_copies"] = all(high.dtype == torch.float32 and high.shape == low.shape for low, high in pairs)
        facts["groups_hold_masters"] = groups[0]["params"][0] is optimizer.fp32_groups[0][0]
    if kind in ("DeepSpeedZeroOptimizer", "BF16_Optimizer"):
        name = "single_partition_of_fp32_groups" if kind == "DeepSpeedZeroOptimizer" else "fp32_groups_flat_partition"
        flats = getattr(optimizer, name)
        facts["groups_hold_flats"] = all(g["params"][0] is flat for g, flat in zip(groups, flats, strict=True))
        owned = 0
        exact = True
        for param in engine.params:
            mapping = param._hp_mapping
            if mapping is None:
                continue
            here, there = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
            flat = flats[mapping.param_group_index]
            values = flat[there.start : there.start + there.numel]
            exact &= torch.equal(values, param.detach().flatten()[here.start : here.start + here.numel].float())
            owned += here.numel
        counted = torch.tensor(owned)
        dist.all_reduce(counted, group=engine.mesh.group("dp"))
        facts["mapping_is_exact"] = exact
        facts["every_element_owned_once"] = int(counted) == sum(param.numel() for param in engine.params)
        facts["low_precision_is_a_view"] = (
            engine.params[0].data_ptr()
            == (optimizer.bit16_groups_flat if kind == "DeepSpeedZeroOptimizer" else optimizer.bf16_groups_flat)[
                0
            ].data_ptr()
        )
    return facts


def poisoned_step(engine: Any, config: Any, mesh: Any, where: str) -> dict[str, Any]:
    """A step whose forward or backward goes bad in one layer on rank 0; nothing may be written."""
    batches = micro_batches(config, make_batches(config, 3)[2], mesh)
    module = dict(engine.model.named_modules())[BAD]

    def forward_hook(_m: Any, _i: Any, output: torch.Tensor) -> torch.Tensor:
        poison = float("inf") if where == "output" else 1.0
        if where == "gradient" and output.requires_grad:
            output.register_hook(lambda grad: grad * float("nan"))
        return output * poison

    handle = module.register_forward_hook(forward_hook) if dist.get_rank() == 0 else None
    before = {n: b.clone() for n, b in engine.model.state_dict().items()}
    masters = [full_rows(engine, p)["master"] for p in engine.params]
    engine.method.before_step = lambda step: 0
    result = engine.train_step(2, batches)
    same = all(torch.equal(before[n], b) for n, b in engine.model.state_dict().items())
    same &= all(torch.equal(m, full_rows(engine, p)["master"]) for m, p in zip(masters, engine.params, strict=True))
    found = find_bad_layer(engine.model, batches, engine.device)
    if handle is not None:
        handle.remove()
    return {"healthy": result.healthy, "unchanged": same, "found": found}


def norm_gaps(precision: str, stage: str, mesh: Any) -> dict[str, float]:
    """How far losses and gradient norms are from those of DeepSpeed's own norm, check and clip; relative, largest."""
    config = small_config(train__precision=precision, optim__clip=0.3, optim__lr=0.0005)
    from megatron_switchlora.train import engine as engine_module

    ours = build_engine(config, stage, mesh)
    with (
        mock.patch.object(engine_module, "leaves_norm_to_us", lambda _: False),
        mock.patch.object(engine_module, "for_deepspeed", lambda resolved: resolved),
    ):
        theirs = build_engine(config, stage, mesh)
    assert ours.optimizer.head_clip is not None and theirs.optimizer.head_clip is None
    gaps, least = {"loss": 0.0, "norm": 0.0, "first norm": 0.0}, float("inf")
    for step, batch in enumerate(make_batches(config, 4)):
        mine, other = (e.train_step(step, micro_batches(config, batch, mesh)) for e in (ours, theirs))
        gaps["loss"] = max(gaps["loss"], abs(mine.loss / other.loss - 1))
        gaps["norm"] = max(gaps["norm"], abs(mine.grad_norm / other.grad_norm - 1))
        gaps["first norm"] = gaps["norm"] if step == 0 else gaps["first norm"]
        least = min(least, other.grad_norm)
    assert least > config.optim.clip  # every step was clipped
    return gaps


def sum_gap(stage: str, mesh: Any, count: int = 16) -> float:
    """How far a bf16 gradient of `count` micro-batches is from their exact sum, averaged over ranks; relative."""
    config = small_config("lora", train__precision="bf16", train__micro_batch_size=1, optim__clip=0.0)
    config.train.global_batch_size = count * mesh.size("dp")
    engine = build_engine(config, stage, mesh)
    exact = {param: torch.zeros(param.shape, dtype=torch.float64) for param in engine.params}
    handles = [param.register_hook(partial(_add_exactly, exact[param])) for param in engine.params]
    squares, step = torch.zeros(2, dtype=torch.float64), engine.optimizer.step

    def observed_step() -> None:
        for group in engine.optimizer.param_groups:
            for master in group["params"]:
                for piece in engine.optimizer.layout.by_master[master] if master.grad is not None else ():
                    wanted = piece.source(exact[piece.param]) / mesh.size("dp")
                    squares.add_(torch.stack([(piece.block(master.grad) - wanted).pow(2).sum(), wanted.pow(2).sum()]))
        step()

    def reduced_step(step: int) -> int:
        for total in exact.values():
            dist.all_reduce(total, group=mesh.group("dp"))
        return 0

    engine.optimizer.step, engine.method.before_step = observed_step, reduced_step
    assert engine.train_step(0, micro_batches(config, make_batches(config, 1)[0], mesh)).healthy
    for handle in handles:
        handle.remove()
    dist.all_reduce(squares, group=mesh.group("dp"))
    return float((squares[0] / squares[1]).sqrt())


def _add_exactly(total: torch.Tensor, gradient: torch.Tensor) -> None:
    total.add_(gradient.double())


def refused_start(mesh: Any) -> str:
    """What the engine says when one rank starts from another candidate bank."""

    class Odd(SwitchLora):
        def start(self, optimizer: RowAdamW) -> None:
            super().start(optimizer)
            self.bank.held["A", 2].rows[0, 0] += mesh.rank("dp")

    config = small_config()
    model = LlamaForCausalLM(config.model, VOCAB)
    initialize_weights(model, 0)
    ds_config = resolve_ds_config(DS_JSON["1"], config, mesh.size("dp"))
    from megatron_switchlora.train.engine import Engine

    try:
        Engine(model, Odd(config, model, mesh), config, ds_config, mesh, torch.device("cpu"))
    except UserError as error:
        return str(error)
    return "accepted"


def act(payload: dict[str, Any]) -> dict[str, Any]:
    mesh = start(payload.get("tp", 1))
    results: dict[str, Any] = {"contract": {}, "poison": {}}
    assert set(DS_JSON) >= {stage for _, stage in CLASSES}
    for precision, stage in CLASSES:
        config = small_config("switchlora", train__precision=precision)
        engine = build_engine(config, stage, mesh)
        key = f"{precision} {stage}"
        results["contract"][key] = internals(engine, stage)
        for step, batch in enumerate(make_batches(config, 2)):
            assert engine.train_step(step, micro_batches(config, batch, mesh)).healthy
        if key == "fp32 0":
            unclipped = small_config("full", optim__clip=0.0, train__activation_checkpointing=True)
            bare = build_engine(unclipped, stage, mesh)
            results["checkpointing"] = bare.model.checkpointing
            assert bare.train_step(0, micro_batches(unclipped, make_batches(unclipped, 1)[0], mesh)).healthy
            results["poison"]["fp32 0 without clip output"] = poisoned_step(bare, unclipped, mesh, "output")
        for where in ("output", "gradient"):
            results["poison"][f"{key} {where}"] = poisoned_step(engine, config, mesh, where)
    cases = [("fp32", "1"), ("bf16", "2")]
    results["norm_gaps"] = {f"{precision} {stage}": norm_gaps(precision, stage, mesh) for precision, stage in cases}
    if mesh.size("tp") > 1:
        return results
    results["sum_gaps"] = {stage: sum_gap(stage, mesh) for stage in ("1", "2", "1f")}
    named = [(replica.name, replica.tensor) for replica in engine.method.replicas()]
    results["equal"] = differing(named, mesh.group("dp"), engine.device)
    if mesh.rank("dp") == 1:
        engine.method.linears[BAD].weight[3, 5] += 1e-6
        engine.method.bank.held["B", 4].rows.view(-1)[7] *= -1
    results["corrupted"] = differing(named, mesh.group("dp"), engine.device)
    results["refused"] = refused_start(mesh)
    return results
