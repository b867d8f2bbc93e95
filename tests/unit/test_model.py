"""The LLaMA against transformers, its export and its options."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_switchlora.config.errors import UserError
from megatron_switchlora.config.model import ModelConfig
from megatron_switchlora.distributed.shard import without_padding
from megatron_switchlora.hf.folders import export_model, load_merged
from megatron_switchlora.methods import build_method
from megatron_switchlora.model.llama.model import LlamaForCausalLM
from megatron_switchlora.model.protocol import initialize_weights
from megatron_switchlora.optim.layout import plain_layout
from megatron_switchlora.optim.row_adamw import RowAdamW
from megatron_switchlora.planning.counts import count_run, model_flops_per_token
from tests.plain import VOCAB, PlainRun, make_batches, small_config

SHAPES = {
    "plain": {},
    "gqa": {"num_kv_heads": 2},
    "tied": {"tie_embeddings": True},
    "theta": {"rope_theta": 500.0, "rms_norm_eps": 1e-4, "num_kv_heads": 1},
}


def make_model(**changes: object) -> LlamaForCausalLM:
    config = ModelConfig(
        hidden_size=64, intermediate_size=100, num_layers=3, num_heads=4, initializer_range=0.1, **changes
    )
    model = LlamaForCausalLM(config, VOCAB)
    initialize_weights(model, seed=3)
    return model


def tokens(count: int = 2, length: int = 40) -> torch.Tensor:
    return torch.randint(0, VOCAB, (count, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_transformers(shape: str, tmp_path: Path) -> None:
    model = make_model(**SHAPES[shape])
    export_model(model, tmp_path, seq_len=40)
    theirs, info = transformers.LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        ours_logits, their_logits = model(tokens()), theirs(tokens()).logits
    gap = float((ours_logits - their_logits).abs().max())
    print(f"{shape}: logits within {gap:.1e} of size {float(their_logits.abs().max()):.1f}")
    assert gap < 1e-5


def test_gradients_equal_transformers(tmp_path: Path) -> None:
    model = make_model(num_kv_heads=2)
    export_model(model, tmp_path, seq_len=40)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    data = tokens()
    model(data[:, :-1], data[:, 1:]).backward()
    theirs(input_ids=data, labels=data).loss.backward()
    for name, param in theirs.named_parameters():
        mine = dict(model.named_parameters())[name]
        assert mine.grad is not None
        torch.testing.assert_close(without_padding(mine, mine.grad), param.grad, rtol=1e-4, atol=1e-6)


def test_export_of_an_adapted_model_is_its_function(tmp_path: Path) -> None:
    """After some steps with switches: transformers' logits on the exported weights are the training model's."""
    config = small_config()
    run = PlainRun(config)
    for step, batch in enumerate(make_batches(config, 10)):
        run.step(step, batch)
    export_model(run.model, tmp_path, seq_len=16)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(run.model(tokens(2, 16)), theirs(tokens(2, 16)).logits, rtol=0, atol=1e-5)
    plain = LlamaForCausalLM(config.model, VOCAB)
    load_merged(plain, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(plain(tokens(2, 16)), run.model(tokens(2, 16)), rtol=0, atol=1e-5)


def test_loading_a_misfit_names_the_tensor(tmp_path: Path) -> None:
    export_model(make_model(), tmp_path, seq_len=16)
    with pytest.raises(UserError, match=r"does not fit.*k_proj"):
        load_merged(make_model(num_kv_heads=2), tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        load_merged(make_model(), tmp_path / "absent")


@pytest.mark.parametrize("name", ["full", "switchlora"])
def test_activation_checkpointing_changes_nothing(name: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        run = PlainRun(small_config(name))
        run.model.checkpointing = checkpointing
        data = make_batches(run.config, 1)[0]
        run.model(data[:, :-1], data[:, 1:]).backward()
        gradients.append([p.grad.clone() for p in run.params])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_initial_values_depend_on_seed_and_name_alone() -> None:
    one, two, other = make_model(), make_model(), make_model(num_kv_heads=2)
    for name, param in one.named_parameters():
        assert torch.equal(param, dict(two.named_parameters())[name])
    assert torch.equal(one.model.layers[2].mlp.up_proj.weight, other.model.layers[2].mlp.up_proj.weight)
    assert not torch.equal(one.model.layers[1].mlp.up_proj.weight, one.model.layers[2].mlp.up_proj.weight)
    assert one.lm_head.weight.std().item() == pytest.approx(0.1, rel=0.05)


def test_start_computes_the_dense_initialisation() -> None:
    """W <- W0 - sBA: at step 0 the adapted model is the full-rank model."""
    full, adapted = PlainRun(small_config("full")), PlainRun(small_config("switchlora"))
    with torch.no_grad():
        torch.testing.assert_close(full.model(tokens(2, 16)), adapted.model(tokens(2, 16)), rtol=0, atol=2e-6)
    assert any(float(x.lora_B.detach().abs().max()) > 0.1 for x in adapted.method.linears.values())


def test_counts_are_those_of_the_model() -> None:
    for name in ("full", "lora", "switchlora"):
        for tied in (False, True):
            config = small_config(name, model__tie_embeddings=tied)
            model = LlamaForCausalLM(config.model, VOCAB)
            total = sum(p.numel() for p in model.parameters())
            method = build_method(config, model)
            optimizer = RowAdamW(method.param_groups(), beta1=0.9, beta2=0.999, eps=1e-8)
            trained = [p for group in optimizer.param_groups for p in group["params"]]
            assert len(trained) == len({id(p) for p in trained}) == len(plain_layout(trained).by_param)
            counts = count_run(config, VOCAB)
            assert counts.trainable == sum(p.numel() for p in trained)
            assert counts.full_total == total


def test_paper_counts() -> None:
    """Table 4 of the SwitchLoRA paper."""
    shapes = {"250M": (768, 2560, 24, 16), "350M": (1024, 2736, 24, 16), "1.3B": (2048, 5461, 24, 32)}
    published = {
        ("250M", "full", 0): 247.5, ("250M", "switchlora", 128): 98.9, ("250M", "switchlora", 256): 148.4,
        ("350M", "full", 0): 368.2, ("350M", "switchlora", 128): 125.6, ("350M", "switchlora", 256): 185.4,
        ("1.3B", "full", 0): 1339.5, ("1.3B", "switchlora", 256): 370.7, ("1.3B", "switchlora", 512): 609.7,
    }  # fmt: skip
    for (size, method, rank), millions in published.items():
        hidden, ffn, layers, heads = shapes[size]
        config = small_config(method, method__rank=rank)
        config.model = ModelConfig(hidden_size=hidden, intermediate_size=ffn, num_layers=layers, num_heads=heads)
        assert round(count_run(config, 32100).trainable / 1e6, 1) == millions


def test_flops_are_those_counted_by_torch() -> None:
    """Forward and backward of the full model; torch counts a full attention square, the formula the causal half."""
    run = PlainRun(small_config("full"))
    data = make_batches(run.config, 1)[0]
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run.model(data[:, :-1], data[:, 1:]).backward()
    model, samples = run.config.model, data.size(0)
    square = 12 * model.num_layers * model.num_heads * model.head_dim * 16
    causal = model_flops_per_token(model, VOCAB, 16)
    assert counter.get_total_flops() / (samples * 16) == pytest.approx(causal + square / 2, rel=1e-3)
