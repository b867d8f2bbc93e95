"""Parts whose copies and waits matter on a GPU, on the pretend one, in a process of its own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from megatron_switchlora.config.method import LoraGaConfig
from megatron_switchlora.distributed.mesh import lone_mesh
from megatron_switchlora.lowrank.nf4 import Nf4Matrix, bitsandbytes_works
from megatron_switchlora.methods.ga_gradients import find_factors
from megatron_switchlora.model.llama.model import LlamaForCausalLM, attend
from megatron_switchlora.model.protocol import initialize_weights
from tests.plain import VOCAB, PlainRun, make_batches, make_samples, small_config
from tests.pretend.gpu import PretendGpu, register


def act(payload: dict[str, Any]) -> Any:
    register()
    return globals()[payload["part"]]()


def nf4() -> dict[str, Any]:
    """Counts of a forward and a backward pass, by bitsandbytes where it works and in plain torch."""
    counts = {}
    with PretendGpu() as gpu:
        for kernels in (False, *([True] if bitsandbytes_works(gpu.device) else [])):
            matrix = Nf4Matrix(torch.randn(8, 100).to(gpu.device), kernels)
            x = torch.randn(5, 100).to(gpu.device).requires_grad_()
            seen = gpu.fresh()
            matrix.linear(x).sum().backward()
            counts[str(kernels)] = seen.totals()
    return counts


def merge() -> dict[str, Any]:
    """Counts of a merge of two local heads, after two steps, and whether origins lie in pinned memory."""
    config = small_config("lte", method__lte__local_heads=2, method__lte__merge_interval=2, optim__lr=1e-5)
    with PretendGpu() as gpu:
        run = PlainRun(config, device=str(gpu.device))
        run.step(0, make_batches(config, 1)[0].to(gpu.device))
        seen = gpu.fresh()
        run.method.merge(0)  # type: ignore[attr-defined]
        pinned = [origin.rows.is_pinned() for origin in run.method.origins.values()]  # type: ignore[attr-defined]
    return {"counts": seen.totals(), "layers": len(pinned), "pinned": all(pinned)}


def attention() -> dict[str, Any]:
    """The key heads that torch's attention is given, and how far the result is from the CPU's."""
    given, torchs = [], F.scaled_dot_product_attention

    def watched(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        given.append([k.size(1), options["enable_gqa"]])
        return torchs(q, k, v, **options)

    F.scaled_dot_product_attention = watched
    q, k, v = (torch.randn(2, heads, 5, 8) for heads in (4, 2, 2))
    with PretendGpu() as gpu:
        found = attend(q.to(gpu.device), k.to(gpu.device), v.to(gpu.device)).cpu()
        attend(*(x.to(gpu.device, torch.bfloat16) for x in (q, k, v)))
    return {"given": given, "error": float((found - attend(q, k, v)).abs().max())}


def gradient_pass() -> dict[str, Any]:
    """LoRA-GA's factors from gradients on the GPU, against those from the CPU; with activation checkpointing."""
    config = small_config("lora", method__init="lora_ga", model__num_layers=1, train__activation_checkpointing=True)
    config.method.ga = LoraGaConfig(samples=6)
    model = LlamaForCausalLM(config.model, VOCAB)
    initialize_weights(model, config.train.seed)
    given = (lone_mesh(), make_samples(config))
    wanted = find_factors(config, model.double(), *given, torch.device("cpu"))
    with PretendGpu() as gpu:
        found = find_factors(config, model, *given, gpu.device)
    assert found is not None and wanted is not None
    products = {name: (found[name][1].t() @ found[name][0], B.t() @ A) for name, (A, B) in wanted.items()}
    errors = [float((mine - theirs).norm() / theirs.norm()) for mine, theirs in products.values()]
    places = {A.device.type for A, _ in found.values()}
    return {"matrices": len(errors), "error": max(errors), "places": sorted(places)}
