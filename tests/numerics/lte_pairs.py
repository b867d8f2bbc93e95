"""Reference runs that start where LTE heads of the package start, and the comparison of the two."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, Optional

import torch
from torch import Tensor

from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.distributed.mesh import AXES, Mesh
from megatron_switchlora.lowrank.heads import HeadsLinear
from megatron_switchlora.methods import Lora
from megatron_switchlora.methods.lte.heads import Merging
from megatron_switchlora.optim.row_adamw import RowAdamW
from tests.numerics.lte_reference import LteReference, QuantisedLteReference
from tests.numerics.pairing import make_reference, reference_config
from tests.numerics.reference import Reference
from tests.plain import PlainRun, make_batches, small_config


def lte_config(**changes: object) -> RunConfig:
    """Two heads by default, s = 2; the rate suits it."""
    start: dict[str, Any] = {
        "method__alpha": 14.0, "method__lte__merge_interval": 3, "optim__lr": 0.002, "method__compute": "split",
    }  # fmt: skip
    return small_config("lte", **{**start, **changes})


def head_alone(config: RunConfig, head: int) -> PlainRun:
    """A run of method lora or switchlora that draws what the head draws, without process groups."""
    alone = copy.deepcopy(config)
    alpha = config.method.scaling * config.method.rank
    lte = type(config.method.lte)()
    sections: dict[str, Any] = {"lte": lte}  # which `MethodConfig` itself does not declare
    alone.method = replace(
        config.method, name=config.method.lte.inner, init=config.method.initial, alpha=alpha, **sections
    )
    alone.parallel.lte_heads = 1
    alone.optim.dense_lr = config.dense_lr
    mesh = Mesh(dict.fromkeys(AXES, 1), {"lte": head, "dp": 0, "tp": 0}, {})
    return PlainRun(alone, torch.float64, mesh=mesh)


def make_lte_reference(config: RunConfig) -> LteReference:
    """All heads from their starts."""
    heads = []
    for head in range(config.heads):
        run = head_alone(config, head)
        method: Any = run.method
        if config.method.facts.switches:
            heads.append(make_reference(run.config, method))
            continue
        assert isinstance(method, Lora)
        adapted = {id(p) for p in method.matrices()}
        A = {name: linear.lora_A.detach() for name, linear in method.linears.items()}
        B = {name: linear.lora_B.detach().t() for name, linear in method.linears.items()}
        empty = {name: torch.zeros(min(x.weight.shape), 1) for name, x in method.linears.items()}
        heads.append(
            Reference(
                replace(reference_config(run.config), switching=False),
                dense={n: p.detach() for n, p in run.model.named_parameters() if id(p) not in adapted},
                frozen={name: linear.weight for name, linear in method.linears.items()},
                A=A,
                B=B,
                bank_A={n: e.expand(-1, A[n].size(1)) for n, e in empty.items()},
                bank_B={n: e.expand(-1, B[n].size(0)) for n, e in empty.items()},
                uniform=lambda *a: 0.0,
                sample=lambda *a: [],
            )
        )
    interval = config.method.lte.merge_interval
    kind = QuantisedLteReference if config.method.lte.base == "nf4" else LteReference
    return kind(heads, None if isinstance(interval, str) else interval, config.method.lte.merge_form == "reset")


def exact_weight(linear: Any, head: int) -> Tensor:
    """What a head here computes, W + s B A or W + s (B A - B' A'), primed: remembered, from fp32 in float64."""
    shared = isinstance(linear, HeadsLinear)
    A, B = (linear.lora_A[head], linear.lora_B[head]) if shared else (linear.lora_A, linear.lora_B)
    product = B.detach().double().t() @ A.detach().double()
    if shared and linear.resetless:
        product -= linear.merged_B[head].double().t() @ linear.merged_A[head].double()
    return linear.weight.double() + linear.scaling * product


def exact_mean(linear: Any, heads: int) -> Tensor:
    """The mean of what the heads here compute."""
    return torch.stack([exact_weight(linear, head) for head in range(heads)]).mean(0)


def head_batches(config: RunConfig, batch: Tensor) -> list[list[Tensor]]:
    """Every head's micro-batches of a global batch."""
    micro = config.train.micro_batch_size // config.method.facts.heads_here
    return [list(share.split(micro)) for share in batch.chunk(config.heads)]


def equal_runs(
    a: RunConfig, b: RunConfig, steps: int = 12, dtype: torch.dtype = torch.float32, mesh: Optional[Mesh] = None
) -> float:
    """Largest difference of losses, norms, parameters, moments and frozen weights, from the same factors."""
    first, second = PlainRun(a, dtype, mesh=mesh), PlainRun(b, dtype, mesh=mesh)
    if dtype == torch.float64:
        start_alike(first, second)
    worst = 0.0
    for step, batch in enumerate(make_batches(a, steps)):
        x, y = first.step(step, batch), second.step(step, batch)
        worst = max(worst, *(abs(p - q) for p, q in zip(x, y, strict=True)))
    for p, q in zip(first.params, second.params, strict=True):
        mine, theirs = first.optimizer.read_rows(p), second.optimizer.read_rows(q)
        worst = max(worst, *(float((mine[key] - theirs[key]).abs().max()) for key in mine))
    for p, q in zip(first.model.buffers(), second.model.buffers(), strict=True):
        worst = max(worst, float((p - q).abs().max()))
    return worst


@torch.no_grad()
def start_alike(first: PlainRun, second: PlainRun) -> None:
    """Start the second run anew with the first one's factors: a bank's live vectors are other draws."""
    pairs = zip(first.method.linears.values(), second.method.linears.values(), strict=True)  # type: ignore[attr-defined]
    for theirs, mine in pairs:
        mine.add_product(1.0)
        mine.lora_A.copy_(theirs.lora_A)
        mine.lora_B.copy_(theirs.lora_B)
    second.method.start(second.optimizer)


def lte_differences(reference: LteReference, method: Merging, optimizer: RowAdamW) -> dict[str, float]:
    """Largest absolute difference of the heads here from the reference's, by kind of state."""
    worst = dict.fromkeys(("mean", "factor", "dense", "exp_avg", "exp_avg_sq", "row_step"), 0.0)

    def note(kind: str, ours: Tensor, theirs: Tensor) -> None:
        worst[kind] = max(worst[kind], float((ours.detach().double() - theirs.detach().double()).abs().max()))

    def note_state(param: Any, key: tuple[str, str], head: Reference) -> None:
        state = optimizer.read_rows(param)
        turn = (lambda t: t.t()) if key[0] == "B" else (lambda t: t)
        for kind, theirs in (("exp_avg", head.m[key]), ("exp_avg_sq", head.v[key])):
            note(kind, state[kind], turn(theirs))
        note("row_step", state["row_step"], torch.as_tensor(head.t[key], dtype=torch.float64).reshape(-1))

    for (name, linear), mean in zip(method.linears.items(), method.mean_weights(), strict=True):
        note("mean", mean, reference.mean_weight(name))
        for number, (A, B) in enumerate(method._pairs(linear)):
            head = reference.heads[method.first_head + number]
            note("factor", A, head.A[name])
            note("factor", B, head.B[name].t())
            note_state(A, ("A", name), head)
            note_state(B, ("B", name), head)
    for name, params in method.dense().items():
        for number, param in enumerate(params):
            head = reference.heads[method.first_head + number]
            note("dense", param, head.dense[name])
            note_state(param, ("dense", name), head)
    return worst
