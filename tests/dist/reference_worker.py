"""Through DeepSpeed against the reference, one step at a time: each step starts from the reference's state."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from megatron_switchlora.methods import SwitchLora
from megatron_switchlora.optim.schedules import lr_factor
from tests.dist.engines import build_engine, full_rows, micro_batches, start
from tests.numerics.pairing import make_reference, parameter_states
from tests.plain import make_batches, small_config


def load_reference(engine: Any, reference: Any) -> None:
    """Write the reference's whole state into the engine: weights, masters, moments, counters, bank, slots."""
    method = engine.method
    assert isinstance(method, SwitchLora)
    method.forget_plan()
    for layer, (name, linear) in enumerate(method.linears.items()):
        linear.weight.copy_(reference.W[name])
        method.bank.held["A", layer].rows.copy_(reference.bank_A[name])
        method.bank.held["B", layer].rows.copy_(reference.bank_B[name])
        state = method.state
        state.slots["A"][layer], state.slots["B"][layer] = reference.slot_of_A[name], reference.slot_of_B[name]
        state.frozen["A"][layer] = np.array(reference.frozen_left_A[name])
        state.frozen["B"][layer] = np.array(reference.frozen_left_B[name])
        state.pointer["A"][layer], state.pointer["B"][layer] = reference.pointer_A[name], reference.pointer_B[name]
    with torch.no_grad():
        for param, values in parameter_states(reference, method).values():
            param.copy_(values["master"])
            engine.optimizer.load_rows(param, values)


def compare(engine: Any, reference: Any) -> dict[str, float]:
    """Difference by kind, in the Frobenius norm relative to the reference's tensor; the largest over the tensors."""
    worst: dict[str, float] = {}
    for param, values in parameter_states(reference, engine.method).values():
        ours = full_rows(engine, param)
        for kind, theirs in values.items():
            scale = float(theirs.double().norm()) or 1.0
            gap = float((ours[kind].double() - theirs.double()).norm()) / scale
            worst[kind] = max(worst.get(kind, 0.0), gap)
    for layer, (name, linear) in enumerate(engine.method.linears.items()):
        gap = float((linear.weight.double() - reference.W[name]).norm() / reference.W[name].norm())
        worst["W"] = max(worst.get("W", 0.0), gap)
        same = list(engine.method.state.slots["A"][layer]) == list(reference.slot_of_A[name])
        same &= list(engine.method.state.frozen["B"][layer]) == list(reference.frozen_left_B[name])
        worst["integers"] = worst.get("integers", 0.0) if same else float("inf")
    return worst


def act(payload: dict[str, Any]) -> list[dict[str, float]]:
    mesh = start()
    results = []
    for case in payload["cases"]:
        config = small_config(
            method__switch__selection=case["selection"], optim__weight_decay=case["weight_decay"], optim__dense_lr=0.005
        )
        engine = build_engine(config, case["stage"], mesh)
        reference = make_reference(config, engine.method)
        worst: dict[str, float] = {"switched": 0.0}
        for step, batch in enumerate(make_batches(config, case["steps"])):
            load_reference(engine, reference)
            factor = lr_factor(step, config.train.warmup_steps, config.train.steps)
            rates = config.optim.lr * factor, config.optim.dense_lr * factor
            theirs = reference.step(step, list(batch.split(config.train.micro_batch_size)), *rates)
            result = engine.train_step(step, micro_batches(config, batch, mesh))
            assert result.switched == theirs["switched"]
            found = compare(engine, reference)
            found["loss"] = abs(result.loss / theirs["loss"] - 1)
            found["grad_norm"] = abs(result.grad_norm / theirs["grad_norm"] - 1)
            worst = {
                **{key: max(worst.get(key, 0.0), value) for key, value in found.items()},
                "switched": worst["switched"],
            }
            worst["switched"] += result.switched
        results.append(worst)
    return results
