"""Build the independent reference from a run of the package, and compare the two states.

The only thing shared is the definition of the random draws; everything computed is the reference's own.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.lowrank import schedule as draws
from megatron_switchlora.methods import SwitchLora
from megatron_switchlora.methods.base import Method
from megatron_switchlora.optim.row_adamw import RowAdamW
from tests.numerics.reference import RefConfig, Reference
from tests.plain import VOCAB

STREAMS = {
    "slots_A": draws.SLOTS_A,
    "slots_B": draws.SLOTS_B,
    "positions_A": draws.POSITIONS_A,
    "positions_B": draws.POSITIONS_B,
}


def reference_config(config: RunConfig) -> RefConfig:
    model, method, optim = config.model, config.method, config.optim
    return RefConfig(
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_layers=model.num_layers,
        num_heads=model.num_heads,
        num_kv_heads=model.kv_heads,
        vocab_size=VOCAB,
        rope_theta=model.rope_theta,
        rms_norm_eps=model.rms_norm_eps,
        rank=method.rank,
        scaling=method.scaling,
        interval0=method.switch.interval0,
        switch_ratio=method.switch.ratio,
        switch_total_steps=method.switch.total_steps or config.train.steps,
        freeze_steps=method.switch.freeze_steps,
        selection=method.switch.selection,
        beta1=optim.beta1,
        beta2=optim.beta2,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        clip=optim.clip,
        switching=method.facts.switches,
    )


def make_reference(config: RunConfig, method: Method) -> Reference:
    """A reference that starts from the method's present weights, factors and bank."""
    assert isinstance(method, SwitchLora)
    names, layers, seed = list(method.linears), len(method.linears), method.schedule.seed

    def uniform(step: int, layer: int, side: str) -> float:
        words = draws.raw_draws(seed, draws.COUNT_STREAM[side], step, 0, layers)
        return float((words >> np.uint64(11))[layer]) * 2.0**-53

    def sample(step: int, layer: int, what: str, eligible: list[int], count: int) -> list[int]:
        keys = draws.raw_draws(seed, STREAMS[what], step, layer, len(eligible))
        return [eligible[i] for i in np.argsort(keys, kind="stable")[:count]]

    adapted = {id(p) for p in method.matrices()}
    dense = {n: p.detach() for n, p in method.model.named_parameters() if id(p) not in adapted}
    return Reference(
        reference_config(config),
        dense=dense,
        frozen={n: x.weight for n, x in method.linears.items()},
        A={n: x.lora_A.detach() for n, x in method.linears.items()},
        B={n: x.lora_B.detach().t() for n, x in method.linears.items()},
        bank_A={n: method.bank.held["A", i].rows for i, n in enumerate(names)},
        bank_B={n: method.bank.held["B", i].rows for i, n in enumerate(names)},
        uniform=uniform,
        sample=sample,
    )


def parameter_states(
    reference: Reference, method: SwitchLora
) -> dict[str, tuple[torch.nn.Parameter, dict[str, Tensor]]]:
    """For each trainable tensor: the package's parameter and the reference's state, in the package's layout."""
    found = {}
    for name, linear in method.linears.items():
        for side, param in (("A", linear.lora_A), ("B", linear.lora_B)):
            key = (side, name)
            turn = (lambda t: t) if side == "A" else (lambda t: t.t().contiguous())
            values = (reference.A if side == "A" else reference.B)[name]
            found[f"{name}.lora_{side}"] = (
                param,
                {
                    "master": turn(values.detach()),
                    "exp_avg": turn(reference.m[key]),
                    "exp_avg_sq": turn(reference.v[key]),
                    "row_step": torch.tensor(reference.t[key], dtype=torch.float32),
                },
            )
    named = dict(method.model.named_parameters())
    for name, values in reference.dense.items():
        key = ("dense", name)
        state = {"master": values.detach(), "exp_avg": reference.m[key], "exp_avg_sq": reference.v[key]}
        found[name] = (named[name], {**state, "row_step": torch.tensor([float(reference.t[key])])})
    return found


def differences(reference: Reference, method: SwitchLora, optimizer: RowAdamW) -> dict[str, float]:
    """Largest absolute difference by kind of state; integer state must be equal, else it counts as infinite."""
    worst = {"W": 0.0, "bank": 0.0, "master": 0.0, "exp_avg": 0.0, "exp_avg_sq": 0.0, "row_step": 0.0, "integers": 0.0}

    def note(kind: str, ours: Tensor, theirs: Tensor) -> None:
        worst[kind] = max(worst[kind], float((ours.double() - theirs.double()).abs().max()))

    for layer, (name, linear) in enumerate(method.linears.items()):
        note("W", linear.weight, reference.W[name])
        note("bank", method.bank.held["A", layer].rows, reference.bank_A[name])
        note("bank", method.bank.held["B", layer].rows, reference.bank_B[name])
        for side, slots, frozen, pointer in (
            ("A", reference.slot_of_A, reference.frozen_left_A, reference.pointer_A),
            ("B", reference.slot_of_B, reference.frozen_left_B, reference.pointer_B),
        ):
            same = (
                list(method.state.slots[side][layer]) == list(slots[name])
                and list(method.state.frozen[side][layer]) == list(frozen[name])
                and method.state.pointer[side][layer] == pointer[name]
            )
            worst["integers"] = worst["integers"] if same else float("inf")
    for param, state in parameter_states(reference, method).values():
        ours = optimizer.read_rows(param)
        for kind, theirs in state.items():
            note(kind, ours[kind], theirs)
    return worst
