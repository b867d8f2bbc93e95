"""Scaled rotary embeddings against transformers, past the length that the scaling stretches, and their rules."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
import yaml

from megatron_switchlora.config.command_line import parse_arguments
from megatron_switchlora.config.errors import UserError
from megatron_switchlora.config.family import check_model
from megatron_switchlora.config.model import ModelConfig
from megatron_switchlora.config.rules import validate
from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.distributed.shard import without_padding
from megatron_switchlora.hf.folders import export_model, merged_state_dict
from megatron_switchlora.model.llama.model import LlamaForCausalLM
from megatron_switchlora.model.protocol import initialize_weights
from tests.hf_folders import LENGTH, LLAMA3, ROPES, VOCAB, YARN, tokens


def make_model(scaling: dict | None, **changes: object) -> LlamaForCausalLM:
    config = ModelConfig(
        hidden_size=64, intermediate_size=100, num_layers=3, num_heads=2, num_kv_heads=1, initializer_range=0.1,
        rope_theta=500.0, rope_scaling=scaling, **changes,
    )  # fmt: skip
    check_model(config)
    model = LlamaForCausalLM(config, VOCAB)
    initialize_weights(model, seed=3)
    return model


def make_theirs(model: LlamaForCausalLM, scaling: dict) -> transformers.LlamaForCausalLM:
    """transformers' model with the same weights, its configuration written here and not by our export."""
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=100, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, rms_norm_eps=1e-6, max_position_embeddings=256,
        rope_parameters={**scaling, "rope_theta": 500.0},
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config)
    theirs.load_state_dict(merged_state_dict(model))
    return theirs


@pytest.mark.parametrize("name", ROPES)
def test_logits_equal_transformers(name: str) -> None:
    model = make_model(ROPES[name])
    theirs = make_theirs(model, ROPES[name])
    with torch.no_grad():
        for dtype, bar in ((torch.float32, 1e-5), (torch.float64, 1e-5)):  # their norms stay fp32
            ours_logits, their_logits = model.to(dtype)(tokens()), theirs.to(dtype)(tokens()).logits
            gap = float((ours_logits - their_logits).abs().max())
            print(f"{name} {dtype}: logits within {gap:.1e} of size {float(their_logits.abs().max()):.1f}")
            assert gap < bar
        plain = make_model(None)
        assert float((plain(tokens()) - theirs.float()(tokens()).logits).abs().max()) > 1e-2  # the scaling matters


@pytest.mark.parametrize("name", ROPES)
def test_gradients_equal_transformers(name: str) -> None:
    model, data = make_model(ROPES[name]), tokens()
    theirs = make_theirs(model, ROPES[name])
    model(data[:, :-1], data[:, 1:]).backward()
    theirs(input_ids=data, labels=data).loss.backward()
    own, worst = dict(model.named_parameters()), 0.0
    for key, param in theirs.named_parameters():
        assert own[key].grad is not None and param.grad is not None
        mine = without_padding(own[key], own[key].grad)
        worst = max(worst, float((mine - param.grad).abs().max() / param.grad.abs().max()))
    print(f"{name}: gradients within {worst:.1e} of the largest of a tensor")
    assert worst < 1e-5


@pytest.mark.parametrize("name", ROPES)
def test_tables_are_those_of_transformers_to_the_last_bit(name: str) -> None:
    """In fp32, under float64 activations too, and when the model is cast to bf16."""
    model = make_model(ROPES[name])
    rotary = make_theirs(model, ROPES[name]).model.rotary_emb
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x = torch.zeros(1, LENGTH, 64, dtype=dtype)
        for ours, theirs in zip(model.to(dtype).model.rotary(x), rotary(x, torch.arange(LENGTH)[None]), strict=True):
            assert ours.dtype == dtype and torch.equal(torch.cat((ours, ours), -1), theirs[0])


def test_factor_one_is_the_plain_embedding() -> None:
    x = torch.zeros(1, LENGTH, 64)
    plain, scaled = make_model(None), make_model({"rope_type": "linear", "factor": 1})
    assert all(torch.equal(a, b) for a, b in zip(plain.model.rotary(x), scaled.model.rotary(x), strict=True))


@pytest.mark.parametrize("name", ROPES)
def test_export_keeps_scaling_and_context(name: str, tmp_path: Path) -> None:
    """Exported after training on shorter sequences than the scaling is made for."""
    model = make_model(ROPES[name], max_position_embeddings=512)
    export_model(model, tmp_path, seq_len=40)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert theirs.config.rope_parameters == {**ROPES[name], "rope_theta": 500.0}
    assert theirs.config.max_position_embeddings == 512
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["rope_parameters"] == {**ROPES[name], "rope_theta": 500.0}
    assert (written["rope_scaling"], written["rope_theta"]) == (ROPES[name], 500.0)  # transformers 4 reads these
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()), theirs(tokens()).logits, rtol=0, atol=1e-5)


def test_export_announces_the_longer_length(tmp_path: Path) -> None:
    for given, expected in ((None, 40), (8, 40), (64, 64)):
        export_model(make_model(None, max_position_embeddings=given), tmp_path, seq_len=40)
        written = json.loads((tmp_path / "config.json").read_text())
        assert written["max_position_embeddings"] == expected and "rope_scaling" not in written


def test_a_meta_model_has_real_frequencies() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(make_model(LLAMA3).config, VOCAB)
    frequencies, _ = model.model.scaled_rotary
    assert torch.equal(frequencies, make_model(LLAMA3).model.scaled_rotary[0])


def test_transformers_is_imported_where_a_scaling_is_computed() -> None:
    script = (
        "import sys; import torch; from megatron_switchlora.config.model import ModelConfig; "
        "from megatron_switchlora.model.llama.model import LlamaForCausalLM\n"
        "for scaling in (None, {'rope_type': 'linear', 'factor': 2.0}):\n"
        "    model = LlamaForCausalLM(ModelConfig(rope_scaling=scaling), 7); print('transformers' in sys.modules)\n"
        "    model.model.rotary(torch.zeros(1, 3, 144)); print('transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["False", "False", "False", "True"]


def test_scaling_survives_options_and_yaml(tmp_path: Path) -> None:
    config = parse_arguments(
        ["--model.rope_scaling", json.dumps(LLAMA3), "--model.max_position_embeddings", "9"]
    ).config
    assert config.model.rope_scaling == LLAMA3
    path, other = tmp_path / "config.yaml", tmp_path / "other.yaml"
    path.write_text(yaml.safe_dump(config.to_dict(), sort_keys=False))
    assert parse_arguments(["--config", str(path)]).config == config
    other.write_text("model:\n  rope_scaling:\n    rope_type: linear\n    factor: 2\n")
    both = parse_arguments(["--config", str(path), "--config", str(other)]).config
    assert both.model.rope_scaling == {"rope_type": "linear", "factor": 2}
    assert parse_arguments(["--config", str(path), "--model.rope_scaling", "null"]).config.model.rope_scaling is None


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({}, r"must name a rope_type of linear, llama3, yarn, not None"),
        ({"rope_type": "default"}, r"not 'default': give one of them, or null for none"),
        ({"rope_type": ["yarn"]}, r"not \['yarn'\]"),
        ({"rope_type": "dynamic", "factor": 2.0}, r"'dynamic', whose frequencies change with the length.*leave it out"),
        ({"rope_type": "longrope"}, r"'longrope', whose .* start from a model with another scaling"),
        ({"rope_type": "linear"}, r"linear must have factor; it has nothing else: add what is missing"),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 3}, r"must have factor; it has beta_fast, factor"),
        (
            {**YARN, "finetuned": True},
            r"yarn must have factor, original_max_position_embeddings and may have .*finetun",
        ),
        ({**YARN, "rope_theta": 5.0}, r"it has .*rope_theta"),
        ({"rope_type": "linear", "factor": 0.5}, r"factor .* must be at least 1, it is 0.5"),
        ({"rope_type": "linear", "factor": float("inf")}, r"factor must be a number above 0 and below 1e9, not inf"),
        ({"rope_type": "linear", "factor": float("nan")}, r"factor must be a number above 0 and below 1e9, not nan"),
        ({"rope_type": "linear", "factor": "2"}, r"factor must be a number above 0 and below 1e9, not '2'"),
        ({"rope_type": "linear", "factor": True}, r"factor must be a number above 0 and below 1e9, not True"),
        ({**LLAMA3, "low_freq_factor": 4.0}, r"low_freq_factor 4.0 must be below high_freq_factor 4.0"),
        ({**LLAMA3, "low_freq_factor": 0}, r"low_freq_factor must be a number above 0 and below 1e9, not 0"),
        (
            {**LLAMA3, "original_max_position_embeddings": 64.0},
            r"must be a whole number from 1 and below 1e9, not 64.0",
        ),
        ({**YARN, "original_max_position_embeddings": 0}, r"must be a whole number from 1 and below 1e9, not 0"),
        ({**YARN, "truncate": 1}, r"truncate must be true or false, not 1"),
        ({**YARN, "beta_fast": 0.5}, r"beta_slow 1 must not be above beta_fast 0.5"),
        ({**YARN, "attention_factor": None}, r"attention_factor must be a number above 0 and below 1e9, not None"),
    ],
)
def test_scalings_that_are_refused(scaling: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        validate(RunConfig(model=ModelConfig(rope_scaling=scaling)))


def test_other_rules() -> None:
    with pytest.raises(UserError, match=r"rope_theta must be above 1 for rope_type yarn, it is 1.0"):
        parse_arguments(["--model.rope_scaling", json.dumps(YARN), "--model.rope_theta", "1"])
    with pytest.raises(UserError, match=r"max_position_embeddings must be at least 1, not 0"):
        parse_arguments(["--model.max_position_embeddings", "0"])
    with pytest.raises(UserError, match=r"model.rope_scaling"):
        parse_arguments(["--model.rope_scaling", "linear"])
