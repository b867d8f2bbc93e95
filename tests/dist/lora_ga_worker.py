"""LoRA-GA's gradients and factors on several meshes of one world, against one process, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_switchlora.config.method import LoraGaConfig
from megatron_switchlora.config.parallel import ParallelConfig
from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.distributed.mesh import Mesh, build_mesh, lone_mesh
from megatron_switchlora.distributed.recorder import CommRecorder
from megatron_switchlora.distributed.shard import Split
from megatron_switchlora.lowrank import lora_ga
from megatron_switchlora.methods import build_method
from megatron_switchlora.methods.ga_gradients import find_factors, mean_gradients
from megatron_switchlora.model.llama.model import LlamaForCausalLM
from megatron_switchlora.model.protocol import initialize_weights
from megatron_switchlora.optim.layout import plain_layout
from tests.plain import VOCAB, make_samples, small_config

CPU = torch.device("cpu")
# 75 is padded on every mesh
SHAPE = {"model__intermediate_size": 75, "model__pad_multiple": 64, "model__num_kv_heads": 4, "model__num_layers": 1}


def configured(rank: int, samples: int = 7, **ga: Any) -> RunConfig:
    fixed = {"method__init": "lora_ga", "method__rslora": True, "method__alpha": 3.0, "method__rank": rank}
    return small_config("lora", **SHAPE, **fixed, method__ga=LoraGaConfig(samples=samples, **ga))


def unpadded(config: RunConfig) -> RunConfig:
    return replace(config, model=replace(config.model, pad_multiple=1))


def model_on(config: RunConfig, mesh: Mesh) -> LlamaForCausalLM:
    model = LlamaForCausalLM(config.model, VOCAB, mesh.axis("tp"))
    initialize_weights(model, config.train.seed)
    return model.double()


def gap(split: Split | None, part: Tensor, whole: Tensor) -> float:
    """How far this rank's part is from its share of the whole, padding included, relative to the largest entry."""
    goal = whole if split is None else split.take(whole)
    assert part.shape == goal.shape
    return float((part - goal).abs().max() / whole.abs().max())


def gradients_on(config: RunConfig, mesh: Mesh) -> dict[str, Tensor]:
    """Averaged over data ranks that have unequal numbers of samples."""
    return mean_gradients(config, model_on(config, mesh), mesh, make_samples(config), CPU)


def gradient_gap(mesh: Mesh, whole: dict[str, Tensor]) -> float:
    config = configured(3)
    part = gradients_on(config, mesh)
    return max(gap(x.split, part[name], whole[name]) for name, _, _, x in model_on(config, mesh).decoder_linears())


def factors_on(config: RunConfig, mesh: Mesh) -> dict[str, tuple[Tensor, Tensor]]:
    return find_factors(config, model_on(config, mesh), mesh, make_samples(config), CPU) or {}


def factor_gap(config: RunConfig, mesh: Mesh, whole: dict[str, tuple[Tensor, Tensor]]) -> float:
    """Of every A and B."""
    part, worst = factors_on(config, mesh), 0.0
    for name, _, _, linear in model_on(config, mesh).decoder_linears():
        along = replace(linear.split, dim=1)
        splits = (None, along) if linear.split_dim == 0 else (along, None)  # of A, of B
        for split, mine, goal in zip(splits, part[name], whole[name], strict=True):
            assert float(goal.abs().max()) > 0
            worst = max(worst, gap(split, mine, goal))
    return worst


class Factors(NamedTuple):
    """What torch.linalg.qr returns."""

    Q: Tensor
    R: Tensor


@contextmanager
def other_libraries(odd: bool) -> Iterator[None]:
    """On some ranks decompositions are others that are as right: each second vector has the other sign."""
    svd, qr = torch.linalg.svd, torch.linalg.qr

    def flipped(columns: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        signs = columns.new_ones(columns.size(1))
        signs[1::2] = -1
        return columns * signs, rows * signs[:, None]

    def other_svd(matrix: Tensor, full_matrices: bool) -> tuple[Tensor, Tensor, Tensor]:
        left, values, right = svd(matrix, full_matrices=full_matrices)
        left, right = flipped(left, right)
        return left, values * (1 + 1e-6), right  # PiSSA makes signs the same

    def other_qr(matrix: Tensor) -> Any:
        return Factors(*flipped(*qr(matrix)))

    if odd:
        torch.linalg.svd, torch.linalg.qr = other_svd, other_qr  # type: ignore[assignment]
    yield
    torch.linalg.svd, torch.linalg.qr = svd, qr  # type: ignore[assignment]


def pissa_on(mesh: Mesh, padding: int = 64) -> dict[str, Tensor]:
    """The factors that PiSSA takes, by name."""
    config = small_config("lora", **SHAPE, method__init="pissa")
    config.model.pad_multiple = padding
    method = build_method(config, model_on(config, mesh), mesh)
    optimizer = method.build_optimizer()
    optimizer.attach(plain_layout(method.matrices()))
    method.start(optimizer)
    return {name: param for name, param in method.model.named_parameters() if ".lora_" in name}


def pissa_gap(mesh: Mesh, whole: dict[str, Tensor]) -> float:
    return max(gap(param.shard, param.detach(), whole[name].detach()) for name, param in pissa_on(mesh).items())


def traffic(config: RunConfig, mesh: Mesh, kind: str) -> list[int]:
    """Of decomposing one layer: the values given to each collective."""
    (_, _, _, linear), *_ = (entry for entry in model_on(config, mesh).decoder_linears() if entry[2] == kind)
    gradient = torch.randn(linear.weight.shape, dtype=torch.float64)
    recorder, given = CommRecorder(), []
    recorder.watch = lambda record, tensor: given.append(tensor.numel())
    with recorder:
        lora_ga.initial_factors(linear, gradient, config.method, kind, 0, CPU)
    return given


def act(payload: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    cases = {str(ga): configured(**ga) for ga in payload["cases"]}
    gradients = gradients_on(unpadded(configured(3)), lone_mesh())
    factors = {case: factors_on(unpadded(config), lone_mesh()) for case, config in cases.items()}
    pissa = pissa_on(lone_mesh(), padding=1)
    result: dict[str, Any] = {}
    for tp in payload["degrees"]:
        mesh = build_mesh(ParallelConfig(tp=tp))
        with other_libraries(mesh.rank("tp") > 0):
            factor_gaps = {case: factor_gap(config, mesh, factors[case]) for case, config in cases.items()}
            pissa_gaps = pissa_gap(mesh, pissa)
        result[str(tp)] = {
            "gradients": gradient_gap(mesh, gradients),
            "factors": factor_gaps,
            "pissa": pissa_gaps,
            "traffic": {kind: traffic(configured(3), mesh, kind) for kind in ("gate_proj", "down_proj")},
        }
    return result
