"""LTE heads on ranks of their own: against the plain reference without DeepSpeed, and under it."""

from __future__ import annotations

import copy
import math
from typing import Any, cast

import torch
import torch.distributed as dist

from megatron_switchlora.config.parallel import ParallelConfig
from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.distributed.mesh import Mesh, build_mesh
from megatron_switchlora.distributed.recorder import CommRecorder
from megatron_switchlora.distributed.shard import shard_of
from megatron_switchlora.methods.lte import merging
from megatron_switchlora.methods.lte.heads import Merging
from megatron_switchlora.methods.lte.merging import merge_sends_factors
from megatron_switchlora.optim.schedules import lr_factor
from megatron_switchlora.planning.traffic import merge_bytes
from tests.dist.engines import build_engine, full_rows, start
from tests.numerics.lte_pairs import (
    equal_runs,
    exact_mean,
    exact_weight,
    head_batches,
    lte_config,
    lte_differences,
    make_lte_reference,
)
from tests.numerics.lte_reference import LteReference
from tests.plain import VOCAB, PlainRun, by_heads, make_batches

BUCKET_BYTES = merging.BUCKET_BYTES


def against_reference(config: RunConfig, steps: int, mesh: Mesh) -> dict[str, Any]:
    """Float64, no DeepSpeed: this rank's heads after `steps` steps, every rank running the whole reference beside."""
    run, reference = PlainRun(config, torch.float64, mesh=mesh), make_lte_reference(config)
    layers, recorder = len(run.method.linears), CommRecorder()  # type: ignore[attr-defined]
    here = slice(run.method.first_head, run.method.first_head + config.method.facts.heads_here)  # type: ignore[attr-defined]
    loss_gap = 0.0
    for step, batch in enumerate(make_batches(config, steps)):
        factor = lr_factor(step, config.train.warmup_steps, config.train.steps)
        losses, _ = reference.step(
            step, head_batches(config, batch), config.optim.lr * factor, config.dense_lr * factor
        )
        with recorder:
            loss, *_ = run.step(step, batch)
        loss_gap = max(loss_gap, abs(loss - sum(losses[here])))
    gaps = lte_differences(reference, run.method, run.optimizer)  # type: ignore[arg-type]
    return {"gaps": {"loss": loss_gap, **gaps}, "calls": sum(recorder.calls.values()), "layers": layers}


def merged_in_fp32(config: RunConfig, steps: int, mesh: Mesh) -> dict[str, Any]:
    """How far from the mean of what the heads computed, as formed in float64, is what one computes after a merge; and
    how far from each other they were. Relative to the largest entry."""
    run, lte = PlainRun(config, mesh=mesh), mesh.axis("lte")
    method: Any = run.method
    found = {"gap": 0.0, "spread": 0.0}
    for step, batch in enumerate(make_batches(config, steps)):
        run.step(step, batch)
        if step % 3 < 2:
            continue
        local = config.method.facts.heads_here
        before = [exact_mean(linear, local) for linear in method.linears.values()]
        means = [mean / lte.size for mean in before]
        for mean in means:
            dist.all_reduce(mean, group=lte.group)
        method.merge(step)
        for own, mean, linear in zip(before, means, method.linears.values(), strict=True):
            largest = mean.abs().max()
            found["spread"] = max(found["spread"], float((own - mean).abs().max() / largest))
            found["gap"] = max(
                found["gap"], *(float((exact_weight(linear, n) - mean).abs().max() / largest) for n in range(local))
            )
    return found


def without_switches(config: RunConfig, steps: int, mesh: Mesh) -> dict[str, Any]:
    """LTE over SwitchLoRA that never switches, and as it is, beside LTE from the same factors, float64."""
    found = {}
    for name, interval in (("gap", math.inf), ("switching", config.method.switch.interval0)):
        inner, plain = copy.deepcopy(config), copy.deepcopy(config)
        inner.method.lte.inner, inner.method.switch.interval0 = "switchlora", interval
        found[name] = equal_runs(inner, plain, steps, torch.float64, mesh)
    return found


def against_one_process(config: RunConfig, steps: int, mesh: Mesh) -> dict[str, Any]:
    """Float64, no DeepSpeed: all heads in this process beside those here, from the same start."""
    together = copy.deepcopy(config)
    together.parallel.lte_heads, together.method.lte.local_heads = 1, config.heads
    together.train.micro_batch_size *= config.parallel.lte_heads
    run, twin = PlainRun(config, torch.float64, mesh=mesh), PlainRun(together, torch.float64)
    mine, theirs = cast(Merging, run.method), cast(Merging, twin.method)
    for step, batch in enumerate(make_batches(config, steps)):
        run.step(step, batch)
        twin.step(step, batch)
    gaps = [float((a - b).abs().max()) for a, b in zip(mine.mean_weights(), theirs.mean_weights(), strict=True)]
    for linear, other in zip(mine.linears.values(), theirs.linears.values(), strict=True):
        pairs = zip(mine._pairs(linear), theirs._pairs(other)[mine.first_head :], strict=False)
        gaps += [float((a - b).detach().abs().max()) for here, there in pairs for a, b in zip(here, there, strict=True)]
        gaps.append(
            float(
                (linear.quantised.dequantised(torch.float64) - other.quantised.dequantised(torch.float64)).abs().max()
            )
        )
    return {"gap": max(gaps)}


def under_deepspeed(config: RunConfig, stage: str, steps: int, mesh: Mesh) -> dict[str, Any]:
    """Losses, recorded bytes, and the distance of the mean model from the reference's, in float64 beside it."""
    engine, reference = build_engine(config, stage, mesh), make_lte_reference(config)
    method: Any = engine.method
    found: dict[str, Any] = {"losses": [], "norms": [], "merge_bytes": [], "control_bytes": []}
    here = slice(method.first_head, method.first_head + config.method.facts.heads_here)
    gaps = {"loss_gap": 0.0, "norm_gap": 0.0}
    for step, batch in enumerate(make_batches(config, steps)):
        result = engine.train_step(step, by_heads(config, batch, mesh), lambda: (False, True))
        assert result.healthy
        assert result.votes == (0, dist.get_world_size())
        factor = lr_factor(step, config.train.warmup_steps, config.train.steps)
        losses, norms = reference.step(
            step, head_batches(config, batch), config.optim.lr * factor, config.dense_lr * factor
        )
        for key, mine, theirs in (("loss_gap", result.head_losses, losses), ("norm_gap", result.head_norms, norms)):
            gaps[key] = max(gaps[key], *(abs(a / b - 1) for a, b in zip(mine, theirs[here], strict=True)))
        found["losses"].append(result.loss)
        found["norms"].append(result.head_norms)
        found["merge_bytes"].append(result.merge_bytes)
        found["control_bytes"].append(result.control_bytes)
    engine.recorder.clear()
    with engine.recorder:
        found["differing"] = engine.differing_replicas()
    found["check_bytes"] = engine._across_heads(None)
    found["cast_gap"] = max(
        float((full_rows(engine, p)["master"].to(p.dtype).float() - p.detach().float()).abs().max())
        for p in engine.params
    )
    found["gap"] = max(
        float((param.double() - shard_of(param, true_mean(reference, name))).abs().max() / param.abs().max())
        for name, param in method.evaluated().named_parameters()
    )
    found |= origin_facts(engine)
    matrices = [linear.factors() for linear in method.linears.values()]
    found["ways"] = sorted({merge_sends_factors(config, B.size(1), A.size(1)) for A, B in matrices})
    found["sent"] = merge_bytes(config, VOCAB, mesh.size("tp"))
    found["odd_origin"] = named_when_odd(engine, method.origins)
    return found | gaps


def origin_facts(engine: Any) -> dict[str, Any]:
    """Of all that this rank holds of the matrices: fp32 entries of origins, in host memory, and entries of frozen W."""
    origins = engine.method.origins
    assert all(origin.rows.device.type == "cpu" and origin.rows.dtype == torch.float32 for origin in origins.values())
    frozen = [linear.weight for linear in engine.method.linears.values() if hasattr(linear, "weight")]
    return {
        "origin_entries": sum(origin.rows.numel() for origin in origins.values()),
        "frozen_entries": sum(weight.numel() for weight in frozen),
        "entries": sum(A.size(1) * B.size(1) for A, B in (x.factors() for x in engine.method.linears.values())),
    }


def named_when_odd(engine: Any, origins: dict[str, Any]) -> bool | None:
    """Whether one element of an origin that is another on one rank is told; without origins, None. The last act."""
    if not origins:
        return None
    name, origin = next(iter(origins.items()))
    if dist.get_rank() == dist.get_world_size() - 1:
        origin.rows.view(-1)[3] += 1e-6
    said = engine.differing_replicas()
    return len(said) == 1 and said[0].startswith(f"{name}.origin differs between rank ")


def as_lora(config: RunConfig, stage: str, steps: int) -> dict[str, Any]:
    """One head on all ranks, never merged, beside LoRA with the same compute path, initial values and scaling."""
    mesh, losses, states = build_mesh(ParallelConfig(tp=config.parallel.tp)), [], []
    for name in ("lte", "lora"):
        mine = copy.deepcopy(config)
        mine.parallel.lte_heads, mine.method.name = 1, name  # type: ignore[assignment]
        mine.method.lte.merge_interval = "never" if name == "lte" else 10
        mine.optim.dense_lr = config.dense_lr
        mine.method.init = config.method.initial  # type: ignore[assignment]
        engine = build_engine(mine, stage, mesh)
        results = [
            engine.train_step(step, by_heads(mine, batch, mesh)) for step, batch in enumerate(make_batches(mine, steps))
        ]
        losses.append([(result.loss, result.grad_norm) for result in results])
        states.append([full_rows(engine, p) for p in engine.params])
        assert float(states[-1][0]["exp_avg_sq"].abs().max()) > 0
    alike = all(torch.equal(a[key], b[key]) for a, b in zip(*states, strict=True) for key in a)
    return {"alike": alike and losses[0] == losses[1]}


def true_mean(reference: LteReference, name: str) -> torch.Tensor:
    stem = name.removesuffix(".weight")
    return reference.mean_weight(stem) if stem in reference.heads[0].names else reference.mean_dense(name)


def act(payload: dict[str, Any]) -> list[dict[str, Any]]:
    mesh = start(payload.get("tp", 1), payload["heads"])
    found = []
    for case in payload["cases"]:
        config = lte_config(parallel__lte_heads=payload["heads"], parallel__tp=payload.get("tp", 1), **case["changes"])
        merging.BUCKET_BYTES = case.get("bucket", BUCKET_BYTES)
        if case.get("as_lora"):
            found.append(as_lora(config, case["stage"], case["steps"]))
        elif case.get("twin"):
            found.append(against_one_process(config, case["steps"], mesh))
        elif case.get("ends"):
            found.append(without_switches(config, case["steps"], mesh))
        elif case.get("fp32"):
            found.append(merged_in_fp32(config, case["steps"], mesh))
        elif case.get("stage"):
            found.append(under_deepspeed(config, case["stage"], case["steps"], mesh))
        else:
            found.append(against_reference(config, case["steps"], mesh))
    return found
