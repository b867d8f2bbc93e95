"""The model of a step's time: its FLOPs against those torch counts in a real step, its links by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from torch.utils.flop_counter import FlopCounterMode

from megatron_switchlora.config.ds_config import Zero
from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.distributed.mesh import lone_mesh
from megatron_switchlora.methods import build_method
from megatron_switchlora.methods.base import Flow
from megatron_switchlora.model.llama.model import LlamaForCausalLM
from megatron_switchlora.model.protocol import initialize_weights
from megatron_switchlora.planning.counts import model_flops_per_token
from megatron_switchlora.planning.step_time import GPUS, Machine, flops_per_token, flow_time, rings_of_a_node, step_time
from tests.plain import VOCAB, make_batches, small_config

CASES = {
    "full": {},
    "lora merged": {"method__compute": "merged"},
    "lora merged, formed again": {"method__compute": "merged", "method__merged_cache": "recompute"},
    "lora split": {"method__compute": "split"},
    "lora by FLOPs": {},
    "lora over 4 bits": {"method__base_precision": "nf4"},
    "lte resetless": {"method__lte__local_heads": 2},
    "lte reset": {"method__lte__local_heads": 2, "method__lte__merge_form": "reset"},
}


def counted(config: RunConfig) -> float:
    """FLOPs of products in a forward and backward pass of one micro-batch, as torch counts them, without attention's
    scores."""
    model = LlamaForCausalLM(config.model, VOCAB)
    initialize_weights(model, 0)
    build_method(config, model, lone_mesh())
    model.checkpointing = config.train.activation_checkpointing
    tokens = make_batches(config, 1)[0][: config.train.micro_batch_size]
    with FlopCounterMode(display=False) as counter:
        model(tokens[:, :-1], tokens[:, 1:]).sum().backward()
    return sum(
        count for op, count in counter.get_flop_counts()["Global"].items() if "attention" not in str(op)
    ) / tokens[:, 1:].numel()  # fmt: skip


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_flops_are_those_of_a_real_step(name: str, again: bool) -> None:
    config = small_config(name.split()[0], train__activation_checkpointing=again, **CASES[name])
    config.train.micro_batch_size = 4
    predicted = flops_per_token(config, VOCAB, 1, 1)
    layers, width = config.model.num_layers, config.model.num_heads * config.model.head_dim
    scores = layers * (8 if again else 6) * width * config.train.seq_len
    assert predicted - scores == pytest.approx(counted(config), rel=1e-6)


def test_full_rank_flops_are_those_of_mfu() -> None:
    config = small_config("full")
    assert flops_per_token(config, VOCAB, 1, 1) == model_flops_per_token(config.model, VOCAB, config.train.seq_len)


def test_links() -> None:
    """Two nodes of 8 GPUs. At tp 4 a node has 4 lines of dp, each with 2 of its 4 ranks there."""
    machine, mesh = Machine(GPUS["h100"], 2, 8, 50e9), {"lte": 1, "dp": 4, "tp": 4}
    activations, gradients = (Flow("gradients", "", axis, "all_reduce", 1e9) for axis in ("tp", "dp"))
    assert flow_time(activations, mesh, machine) == ({"within nodes": 1.5e9, "between nodes": 0}, 1.5e9 / 450e9)
    assert flow_time(gradients, mesh, machine) == ({"within nodes": 1.5e9, "between nodes": 6e9}, 6e9 / 50e9)
    alone = {"lte": 1, "dp": 16, "tp": 1}  # one ring through both nodes
    both = {"within nodes": 1.875e9, "between nodes": 1.875e9}
    assert flow_time(gradients, alone, machine) == (both, 1.875e9 / 50e9)
    cards = Machine(GPUS["rtx4090"], 2, 8, 400e9)  # whose own links are slower than what joins the nodes
    assert flow_time(gradients, alone, cards) == (both, 1.875e9 / 32e9)
    heads = {"lte": 2, "dp": 8, "tp": 1}  # a head a node: 8 lines across
    assert flow_time(gradients, heads, machine)[0] == {"within nodes": 1.75e9, "between nodes": 0}
    merge = Flow("merges", "", "lte", "all_reduce", 1e9)
    assert flow_time(merge, heads, machine) == ({"within nodes": 0, "between nodes": 8e9}, 8e9 / 50e9)


def test_overlap_hides_gradients_behind_the_backward_pass() -> None:
    config, mesh = small_config("full", train__global_batch_size=128), {"lte": 1, "dp": 16, "tp": 1}  # 4 micro-batches
    slow = Machine(GPUS["h100"], 2, 8, 1e6)
    plain, overlapped = (step_time(config, VOCAB, mesh, Zero(1), slow, overlap) for overlap in (False, True))
    assert plain.hidden == 0
    assert 0 < overlapped.hidden <= plain.compute * 2 / 3 / 4
    every = step_time(config, VOCAB, mesh, Zero(2), slow, True)  # reduces at each of them
    assert every.hidden == pytest.approx(4 * overlapped.hidden)
    assert plain.seconds - overlapped.seconds == pytest.approx(overlapped.hidden)
    near = replace(GPUS["h100"], peers=1e15)
    fast = step_time(config, VOCAB, mesh, Zero(1), Machine(near, 2, 8, 1e15), True)
    assert fast.exposed["gradients"] == 0 and fast.exposed["parameters"] > 0


def test_nothing_is_sent_by_one_rank() -> None:
    config = small_config("switchlora")
    alone = step_time(config, VOCAB, {"lte": 1, "dp": 1, "tp": 1}, Zero(1), Machine(GPUS["a100"], 1, 1, 1e9), False)
    assert alone.exposed == {} and alone.seconds == alone.compute > 0


def test_switching_traffic_is_hidden() -> None:
    config = small_config("switchlora", method__switch__bank_spread="dp")
    mesh = {"lte": 1, "dp": 2, "tp": 1}
    fast = step_time(config, VOCAB, mesh, Zero(1), Machine(GPUS["a100"], 2, 1, 1e15), False)
    assert fast.exposed["bank"] == 0 < fast.hidden
    slow = step_time(config, VOCAB, mesh, Zero(1), Machine(GPUS["a100"], 2, 1, 1e3), False)
    assert slow.exposed["bank"] > 0 and slow.hidden == pytest.approx(slow.compute)


def test_precision_decides_the_peak() -> None:
    mesh, machine = {"lte": 1, "dp": 1, "tp": 1}, Machine(GPUS["h100"], 1, 1, 1e9)
    times = {}
    for precision in ("bf16", "fp32"):
        config = small_config("full", train__precision=precision, train__micro_batch_size=8)
        config.model.hidden_size, config.model.intermediate_size = 4096, 11008  # products dominate
        config.train.seq_len = 4096
        times[precision] = step_time(config, VOCAB, mesh, Zero(0), machine, False).compute
    assert times["fp32"] / times["bf16"] == pytest.approx(989 / 67, rel=0.1)


@pytest.mark.parametrize(
    ("axis", "mesh", "gpus", "rings"),
    [
        ("tp", {"lte": 1, "dp": 3, "tp": 4}, 6, 1),  # ranks 4 to 7 are on two nodes
        ("tp", {"lte": 1, "dp": 4, "tp": 6}, 8, 2),  # the middle node has parts of two
        ("tp", {"lte": 1, "dp": 2, "tp": 12}, 8, 2),
        ("dp", {"lte": 4, "dp": 3, "tp": 1}, 4, 2),
        ("dp", {"lte": 1, "dp": 16, "tp": 1}, 8, 1),
        ("dp", {"lte": 1, "dp": 4, "tp": 4}, 8, 4),
        ("head", {"lte": 2, "dp": 4, "tp": 2}, 8, 0),
        ("data", {"lte": 2, "dp": 4, "tp": 2}, 8, 2),
        ("lte", {"lte": 2, "dp": 4, "tp": 2}, 8, 8),
    ],
)
def test_rings_of_a_node(axis: str, mesh: dict[str, int], gpus: int, rings: int) -> None:
    stays, leaves = rings_of_a_node(axis, mesh, gpus)
    assert (stays, leaves) == (axis != "lte", rings)
