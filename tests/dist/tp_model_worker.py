"""The split model, without DeepSpeed, against transformers: logits, gradients, and what goes over the wire."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from megatron_switchlora.config.method import MethodConfig, make_method
from megatron_switchlora.config.model import ModelConfig
from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.distributed.mesh import Mesh, lone_mesh
from megatron_switchlora.distributed.recorder import CommRecorder
from megatron_switchlora.hf.folders import export_model, load_merged, merged_state_dict
from megatron_switchlora.methods import build_method
from megatron_switchlora.model.llama.model import LlamaForCausalLM
from megatron_switchlora.model.protocol import initialize_weights
from megatron_switchlora.optim.layout import plain_layout
from megatron_switchlora.optim.row_adamw import RowAdamW
from tests.dist.engines import start

BATCH, LENGTH, SEED = 2, 24, 3


def model_config(shape: dict[str, Any]) -> ModelConfig:
    return ModelConfig(**{"hidden_size": 48, "num_layers": 2, "initializer_range": 0.1, **shape})


def gather(param: torch.nn.Parameter, value: torch.Tensor) -> torch.Tensor:
    return value if param.shard is None else param.shard.gather(value)


def against_transformers(shape: dict[str, Any], vocab: int, mesh: Mesh) -> dict[str, float]:
    """Largest differences of logits and gradients; transformers has the weights of a model of one process."""
    config = model_config(shape)
    whole = LlamaForCausalLM(config, vocab)
    initialize_weights(whole, SEED)
    with tempfile.TemporaryDirectory() as name:
        export_model(whole, Path(name), LENGTH)
        theirs = transformers.LlamaForCausalLM.from_pretrained(name)
        loaded = LlamaForCausalLM(config, vocab, mesh.axis("tp"))
        load_merged(loaded, Path(name))
    drawn = LlamaForCausalLM(config, vocab, mesh.axis("tp"))
    initialize_weights(drawn, SEED)
    same = all(torch.equal(a, b) for a, b in zip(loaded.parameters(), drawn.parameters(), strict=True))
    exported = merged_state_dict(drawn)
    same &= all(torch.equal(tensor, exported[key]) for key, tensor in merged_state_dict(whole).items())
    tokens = torch.randint(0, vocab, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, expected = drawn(tokens), theirs(tokens).logits
    loss = drawn(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    their_loss = theirs(input_ids=tokens, labels=tokens).loss
    their_loss.backward()
    gradients = dict(theirs.named_parameters())
    worst = 0.0
    for key, param in drawn.named_parameters():
        goal = gradients[key].grad
        worst = max(worst, float((gather(param, param.grad) - goal).abs().max() / goal.abs().max()))
    return {
        "shapes_equal": float(logits.shape == expected.shape),
        "initial_equal": float(same),
        "logits": float((logits - expected).abs().max()),
        "loss": abs(float(loss.detach() / their_loss.detach()) - 1),
        "gradients": worst,
    }


def traffic(method: MethodConfig, heads: int, mesh: Mesh) -> dict[str, Any]:
    """All-reduces of one forward and backward: calls and values handed over."""
    config = RunConfig(model=model_config({"intermediate_size": 77, "num_heads": heads}), method=method)
    model = LlamaForCausalLM(config.model, 61, mesh.axis("tp"))
    initialize_weights(model, SEED)
    built = build_method(config, model, mesh)
    optimizer = RowAdamW(built.param_groups(), beta1=0.9, beta2=0.999, eps=1e-8)
    optimizer.attach(plain_layout([p for group in optimizer.param_groups for p in group["params"]]))
    built.start(optimizer)
    tokens = torch.randint(0, 61, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    recorder = CommRecorder()
    with recorder:
        with recorder.phase("forward"):
            loss = model(tokens[:, :-1], tokens[:, 1:])
        with recorder.phase("backward"):
            loss.backward()
    found: dict[str, Any] = {}
    for phase in ("forward", "backward"):
        records = [record for record in recorder.bytes if record.phase == phase]
        assert all(record.op == "allreduce" and record.dtype == "float32" for record in records)
        found[phase] = {
            "calls": sum(recorder.calls[record] for record in records),
            "values": sum(recorder.bytes[record] for record in records) // 4,
        }
    replicated = [p for linear in getattr(built, "linears", {}).values() for p in linear.partial_parameters()]
    found["replicated_factors"] = sum(param.numel() for param in replicated)
    return found


def adapter_gradients(method: MethodConfig, heads: int, mesh: Mesh) -> float:
    """Largest difference of an adapted model's gradients from those of one process, relative to the largest."""
    config = RunConfig(model=model_config({"intermediate_size": 77, "num_heads": heads}), method=method)
    tokens = torch.randint(0, 61, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    found = []
    for place in (lone_mesh(), mesh):
        model = LlamaForCausalLM(config.model, 61, place.axis("tp"))
        initialize_weights(model, SEED)
        built = build_method(config, model, place)
        for linear in built.linears.values():  # type: ignore[attr-defined]
            linear.add_product(-1.0)
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        found.append({name: gather(p, p.grad) for name, p in model.named_parameters() if p.grad is not None})
    whole, split = found
    assert whole.keys() == split.keys() and any("lora_A" in name for name in whole)
    return max(float((split[name] - goal).abs().max() / goal.abs().max()) for name, goal in whole.items())


def act(payload: dict[str, Any]) -> dict[str, Any]:
    mesh = start(payload["tp"])
    return {
        "parity": {
            name: against_transformers(case["shape"], case["vocab"], mesh) for name, case in payload["shapes"].items()
        },
        "adapters": [
            adapter_gradients(make_method(**method), payload["heads"], mesh)
            for method in payload["methods"]
            if method["name"] != "full"
        ],
        "traffic": [traffic(make_method(**method), payload["heads"], mesh) for method in payload["methods"]],
    }
