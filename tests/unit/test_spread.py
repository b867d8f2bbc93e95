"""Rows of a frozen W over data ranks: blocks, the bits of products over them, rules, plans."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_switchlora.config.ds_config import Zero
from megatron_switchlora.config.errors import UserError
from megatron_switchlora.config.rules import validate
from megatron_switchlora.distributed.shard import Axis
from megatron_switchlora.lowrank.merged import Form, choose_form, merge
from megatron_switchlora.lowrank.spread import TILE, GatheredMatrix, spread_rows
from megatron_switchlora.planning.memory import memory_items, peak_bytes
from megatron_switchlora.planning.step_time import GPUS, Machine, step_time
from megatron_switchlora.planning.traffic import flows
from tests.plain import VOCAB, small_config
from tests.unit.test_dry_run import shipped

PAPER = 32100  # the vocabulary of its models


@pytest.mark.parametrize("rows", [1, 16, 24, 75, 128, 2048, 5504])
@pytest.mark.parametrize("ranks", [2, 3, 8, 32])
def test_blocks_are_the_matrix_with_padding_at_its_end(rows: int, ranks: int) -> None:
    end = 0
    for rank in range(ranks):
        blocks = spread_rows(rows, Axis(ranks, rank))
        assert blocks.local % TILE == 0 and blocks.start == rank * blocks.local
        assert blocks.real == 0 or blocks.start == end
        end += blocks.real
        matrix = GatheredMatrix(blocks, 3, torch.zeros(()))
        assert matrix.whole.shape == (rows, 3) and matrix.own.shape == (blocks.local, 3)
        matrix.own.fill_(1.0)
        assert int(matrix.whole.sum()) == 3 * blocks.real
        assert torch.equal(blocks.take(torch.arange(rows))[: blocks.real], torch.arange(rows)[blocks.start : end])
    assert end == rows


@pytest.mark.parametrize(("rows", "columns", "rank"), [(48, 76, 7), (75, 48, 24), (512, 1376, 128), (1376, 512, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_over_blocks_have_the_bits_of_the_whole(
    rows: int, columns: int, rank: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(rows)
    W, A, B = (torch.randn(shape, generator=generator) for shape in ((rows, columns), (rank, columns), (rank, rows)))
    whole, A, B = merge(W, A.to(dtype), B.to(dtype), 0.3), A.to(dtype), B.to(dtype)
    folded = W.unsqueeze(0).baddbmm(B.float().t().unsqueeze(0), A.float().unsqueeze(0), alpha=0.3)[0]
    for ranks in (2, 3, 8):
        for number in range(ranks):
            own = spread_rows(rows, Axis(ranks, number))
            of_B, block = replace(own, dim=1).take(B), own.take(W)
            here = slice(own.start, own.start + own.real)
            assert torch.equal(own.unpadded(merge(block, A, of_B, 0.3)), whole[here]), (ranks, number)
            fold = block.unsqueeze(0).baddbmm(of_B.float().t().unsqueeze(0), A.float().unsqueeze(0), alpha=0.3)[0]
            assert torch.equal(own.unpadded(fold), folded[here]), (ranks, number)


def test_what_a_spread_base_refuses() -> None:
    for changes in ({"method__compute": "split"}, {"method__merged_cache": "recompute"}):
        with pytest.raises(UserError, match=r"method\.base_spread dp gathers W \+ sBA once per step"):
            validate(small_config("lora", method__base_spread="dp", **changes))
    with pytest.raises(UserError, match=r"method\.base_spread dp .* method\.name lte does not support"):
        validate(small_config("lte", method__base_spread="dp"))
    for name in ("lora", "relora", "switchlora", "mhlora"):
        validate(small_config(name, method__base_spread="dp", method__merged_cache="accumulation"))


def test_layers_compute_with_what_is_gathered() -> None:
    """However few tokens there are, and with activation checkpointing."""
    config = small_config("lora", method__base_spread="node", train__activation_checkpointing=True)
    assert choose_form(config) == Form("merged", "accumulation")


@pytest.mark.parametrize("dp", [8, 32])
def test_bank_and_base_spread_need_less_than_full_rank(dp: int) -> None:
    """The paper's 1.3B at rank 512, ZeRO 1."""
    spread = shipped("1.3b", "switchlora_r512", "--method.switch.bank_spread=dp", "--method.base_spread=dp")
    peaks = [peak_bytes(memory_items(config, PAPER, 1, dp, Zero(1))) for config in (spread, shipped("1.3b", "full"))]
    print(f"\n{dp} ranks: {peaks[0] / 1e9:.3f} GB, full-rank {peaks[1] / 1e9:.3f} GB, ratio {peaks[0] / peaks[1]:.3f}")
    assert peaks[0] < 0.98 * peaks[1]


def test_what_is_gathered() -> None:
    """All of W + sBA in bf16 once per step, whatever the micro-batches: each rank gives its block."""
    config = shipped("1.3b", "lora_r512", "--method.base_spread=dp")
    mesh = {"lte": 1, "dp": 8, "tp": 1}
    (flow,) = [flow for flow in flows(config, PAPER, mesh, Zero(1)) if flow.kind == "base"]
    assert (flow.axis, flow.op) == ("dp", "all_gather")
    assert 8 * flow.bytes == 24 * 2 * (4 * 2048 * 2048 + 3 * 2048 * 5504)
    config.method.base_spread = "node"
    (flow,) = [flow for flow in flows(config, PAPER, {**mesh, "dp": 32}, Zero(1)) if flow.kind == "base"]
    assert flow.axis == "node" and 8 * flow.bytes == 24 * 2 * (4 * 2048 * 2048 + 3 * 2048 * 5504)
    alone = flows(config, PAPER, {"lte": 1, "dp": 1, "tp": 1}, Zero(1))
    assert not [flow for flow in alone if flow.kind == "base"]


def test_the_gather_takes_time_and_forming_less() -> None:
    mesh, machine = {"lte": 1, "dp": 2, "tp": 1}, Machine(GPUS["a100"], 2, 1, 1e6)
    whole, spread = (
        step_time(small_config("lora", method__base_spread=where), VOCAB, mesh, Zero(1), machine, False)
        for where in ("none", "dp")
    )
    assert spread.exposed["base"] > 0 and "base" not in whole.exposed
    assert spread.compute < whole.compute


def test_nothing_is_gathered_between_hosts() -> None:
    mesh, machine = {"lte": 1, "dp": 16, "tp": 1}, Machine(GPUS["a100"], 2, 8, 1e9)
    links, peaks = {}, {}
    for where in ("none", "dp", "node"):
        config = shipped("1.3b", "lora_r512", f"--method.base_spread={where}")
        links[where] = step_time(config, PAPER, mesh, Zero(1), machine, False).by_link
        peaks[where] = peak_bytes(memory_items(config, PAPER, 1, 16, Zero(1), 8))
    assert links["none"]["between nodes"] == links["node"]["between nodes"] < links["dp"]["between nodes"]
    assert links["none"]["within nodes"] < links["node"]["within nodes"] < links["dp"]["within nodes"]
    assert peaks["dp"] < peaks["node"] < peaks["none"]
