"""Padding of the feed-forward and the vocabulary is exact: every method trains the same with and without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_switchlora.checkpoint.weights import Weights
from megatron_switchlora.config.ds_config import Zero
from megatron_switchlora.config.model import ModelConfig
from megatron_switchlora.distributed.linear import ColumnParallelLinear, RowParallelLinear
from megatron_switchlora.distributed.shard import Axis, Split, full_shape, without_padding
from megatron_switchlora.hf.folders import export_model, load_merged
from megatron_switchlora.lowrank.heads import HeadsLinear
from megatron_switchlora.methods import galore
from megatron_switchlora.model.protocol import build_model
from megatron_switchlora.planning.counts import count_run
from megatron_switchlora.planning.memory import checkpoint_bytes, memory_items
from tests.plain import VOCAB, PlainRun, make_batches, small_config
from tests.unit.test_convert import save
from tests.unit.test_galore import StandIn

DEFAULT = ModelConfig().pad_multiple
LTE = {"method__lte__local_heads": 2, "method__lte__merge_interval": 3, "method__alpha": 4.0}
CASES: dict[str, dict[str, Any]] = {
    "full": {"name": "full"},
    "full, tied": {"name": "full", "model__tie_embeddings": True, "optim__weight_decay": 0.1},
    "lora": {"name": "lora"},
    "pissa": {"name": "lora", "method__init": "pissa"},
    "lora_ga": {"name": "lora", "method__init": "lora_ga", "method__ga__samples": 8},
    "relora, pruned": {"name": "relora", "method__relora__interval": 5, "method__relora__moments": "prune"},
    "mhlora": {"name": "mhlora", "method__mhlora__heads": 2, "method__alpha": 4.0},
    "switchlora": {"name": "switchlora", "optim__weight_decay": 0.1},
    "lte": {"name": "lte", **LTE},
    "lte, reset": {"name": "lte", **LTE, "method__lte__merge_form": "reset"},
    "lte, 4 bits": {"name": "lte", **LTE, "method__lte__base": "nf4"},
    "galore": {"name": "galore", "method__galore__update_gap": 3, "model__hidden_size": 96, "optim__weight_decay": 0.1},
}
STEPS = 6


class OfOneSign(StandIn):
    """Makes the largest entry of each singular vector positive: else rounding decides between two projectors."""

    def project(self, full_rank_grad: Tensor, iter: int) -> Tensor:
        low = super().project(full_rank_grad, iter)
        if iter % self.gap:
            return low
        assert self.ortho_matrix is not None
        dim = 1 if full_rank_grad.size(0) >= full_rank_grad.size(1) else 0
        signs = self.ortho_matrix.gather(dim, self.ortho_matrix.abs().argmax(dim, keepdim=True)).sign()
        self.ortho_matrix = self.ortho_matrix * signs
        return low * signs.t()


def train(case: dict[str, Any], multiple: int) -> tuple[PlainRun, list[tuple[float, float, int]]]:
    run = PlainRun(small_config(**case, model__num_layers=2, model__pad_multiple=multiple), torch.float64)
    return run, [run.step(step, batch) for step, batch in enumerate(make_batches(run.config, STEPS))]


def real_values(run: PlainRun) -> dict[str, Tensor]:
    return {name: without_padding(param, param.detach()) for name, param in run.model.named_parameters()}


@pytest.mark.parametrize("name", CASES)
def test_training_is_the_same(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses, norms, switches, parameters, exports and checkpoints; what is padded stays zero."""
    monkeypatch.setattr(galore, "load_projector", lambda: OfOneSign)
    (plain, expected), (padded, found) = train(CASES[name], 1), train(CASES[name], DEFAULT)
    assert [step[2] for step in found] == [step[2] for step in expected]
    pairs = zip((x for step in found for x in step[:2]), (x for step in expected for x in step[:2]), strict=True)
    gaps = [abs(ours - theirs) / theirs for ours, theirs in pairs]
    values, wanted = real_values(padded), real_values(plain)
    gaps += [float((values[key] - wanted[key]).abs().max() / wanted[key].abs().max()) for key in wanted]
    print(f"\n{name}: losses, norms, parameters within {max(gaps):.1e}")
    assert max(gaps) < 1e-12 and values.keys() == wanted.keys()
    shapes = {key: list(value.shape) for key, value in wanted.items()}
    assert {key: full_shape(param) for key, param in padded.model.named_parameters()} == shapes
    for param in padded.model.parameters():
        assert int(param.count_nonzero()) == int(without_padding(param, param).count_nonzero())
    folders = [save(run, tmp_path / str(number)) for number, run in enumerate((plain, padded))]
    archives = [folder.archive() for folder in folders]
    assert archives[0].shapes == archives[1].shapes
    for tensor in Weights(folders[0]).names():
        read = [Weights(folder).read(tensor) for folder in folders]
        assert torch.allclose(*read, rtol=0, atol=1e-6)


def test_a_padded_model_has_aligned_shapes_and_no_other() -> None:
    run = PlainRun(small_config("lora", model__pad_multiple=DEFAULT))
    names = {name: list(param.shape) for name, param in run.model.named_parameters() if "layers.1" not in name}
    assert names["model.embed_tokens.weight"] == names["lm_head.weight"] == [64, 48] and VOCAB == 61
    mlp = run.model.model.layers[0].mlp
    assert mlp.gate_proj.weight.shape == mlp.up_proj.weight.shape == (128, 48) and mlp.down_proj.weight.shape[1] == 128
    assert mlp.gate_proj.lora_B.shape == mlp.down_proj.lora_A.shape == (7, 128)
    assert run.model.model.layers[0].self_attn.q_proj.weight.shape == (48, 48)
    assert run.model(torch.zeros(1, 3, dtype=torch.long)).shape == (1, 3, VOCAB)


@pytest.mark.parametrize("tp", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("multiple", [1, 8, 64])
def test_a_split_cuts_where_it_did(tp: int, multiple: int) -> None:
    """Ranks hold the same entries whatever the padding, and their blocks make up the whole."""
    full = torch.arange(1.0, 24 * 61 + 1).view(61, 24)
    splits = [Split(0, 61, Axis(tp, rank), multiple) for rank in range(tp)]
    bare = [Split(0, 61, Axis(tp, rank)) for rank in range(tp)]
    assert [(x.start, x.real) for x in splits] == [(x.start, x.real) for x in bare]
    blocks = [split.take(full) for split in splits]
    assert {len(block) for block in blocks} == {splits[0].local} and splits[0].local % multiple == 0
    assert torch.equal(torch.cat([split.unpadded(b) for split, b in zip(splits, blocks, strict=True)]), full)
    assert sum(int(block.count_nonzero()) for block in blocks) == full.numel()
    for split in splits:
        local, here = split.locate(torch.arange(61))
        assert torch.equal(torch.arange(61)[here], split.start + local[here])


def test_an_export_is_that_of_the_unpadded_model(tmp_path: Path) -> None:
    """The bits of real entries; a folder of either loads into both."""
    runs = [PlainRun(small_config("switchlora", model__pad_multiple=multiple)) for multiple in (1, DEFAULT)]
    for run, name in zip(runs, ("plain", "padded"), strict=True):
        (tmp_path / name).mkdir()
        export_model(run.model, tmp_path / name, 16)
    plain, padded = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "padded"))
    assert plain.keys() == padded.keys() and all(torch.equal(plain[key], padded[key]) for key in plain)
    for config in (small_config("full", model__pad_multiple=multiple) for multiple in (1, DEFAULT)):
        model = build_model(config.model, VOCAB)
        load_merged(model, tmp_path / "padded")
        named = {name: without_padding(param, param.detach()) for name, param in model.named_parameters()}
        assert all(torch.equal(named[key], plain[key]) for key in plain)


@pytest.mark.parametrize("multiple", [1, 64, 256])
@pytest.mark.parametrize("kind", [ColumnParallelLinear, RowParallelLinear])
def test_four_bits_are_stored_without_padding(kind: type, multiple: int) -> None:
    for tp in (1, 2):
        shapes = []
        for padding in (1, multiple):
            base = kind(200, 200, Axis(tp), padding)
            base.weight.data.normal_()
            linear = HeadsLinear(base, 2, 4, 1.0, True)
            linear.quantise(kernels=False)
            splits = {name: (tensor, linear.base_split(tensor)) for name, tensor in linear.base_tensors().items()}
            assert all(tensor.size(split.dim) == split.local for tensor, split in splits.values())
            shapes.append({name: split.size for name, (_, split) in splits.items()})
        assert shapes[0] == shapes[1]


@pytest.mark.parametrize("name", ["full", "switchlora", "lora"])
def test_reported_counts_have_no_padding_and_bytes_have(name: str) -> None:
    """Memory and traffic are those of what the ranks hold."""
    plain, padded = (small_config(name, model__pad_multiple=multiple) for multiple in (1, DEFAULT))
    assert count_run(plain, VOCAB) == count_run(padded, VOCAB)
    assert checkpoint_bytes(plain, VOCAB) == checkpoint_bytes(padded, VOCAB)
    run = PlainRun(padded)
    items = {item.kind: item.bytes for item in memory_items(padded, VOCAB, 1, 1, Zero(0))}
    assert items["trainable parameters, fp32"] == sum(param.nbytes for param in run.params)
    kept = [buffer.nbytes for buffer in run.model.buffers()]
    assert items.get("frozen W, fp32", 0) == sum(kept)
    if name == "switchlora":
        assert items["candidate bank, fp32"] == run.method.bank.num_bytes()
    assert count_run(padded, VOCAB, 1).trainable == sum(param.numel() for param in run.params)
    assert count_run(padded, VOCAB, 1).trainable > count_run(padded, VOCAB).trainable
