"""Folders that an import refuses, each with the rule, the values and what to change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from megatron_switchlora.config.errors import UserError
from megatron_switchlora.hf.import_ import hf_tensors, read_hf_config
from tests.hf_folders import VOCAB, YARN, change_index, edit, rewrite, save

NORM, UP = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"


def refused(folder: Path, message: str) -> None:
    config, vocab_size = read_hf_config(folder)
    with pytest.raises(UserError, match=message):
        hf_tensors(folder, config, vocab_size)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral", "architectures": ["MistralForCausalLM"]}, r"'mistral'.*'MistralForCausalLM'"),
        ({"model_type": "qwen2"}, r"model_type 'qwen2'.*no model family here computes.*give .* model_type llama"),
        ({"model_type": None}, r"model_type None"),
        ({"architectures": ["LlamaForSequenceClassification"]}, r"LlamaForSequenceClassification"),
        ({"architectures": "LlamaForCausalLM"}, r"architectures 'LlamaForCausalLM'"),
        ({"architectures": 3}, r"architectures 3"),
        ({"attention_bias": True}, r"attention_bias true, but linears here have no biases"),
        ({"mlp_bias": True}, r"mlp_bias true"),
        ({"mlp_bias": "no"}, r"mlp_bias as true or false, not 'no'"),
        ({"hidden_act": "gelu"}, r"hidden_act 'gelu', but .* silu"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantization_config, .* dequantize"),
        ({"head_dim": 32}, r"head_dim 32, but .* hidden_size 64 / num_attention_heads 4 = 16"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor 0.5, but heads here are rotated whole"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, r"partial_rotary_factor 0.5"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, r"config.json describes .*'dynamic', whose"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, r"'dynamic', whose frequencies change"),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}}, r"'longrope', whose"),
        ({"rope_scaling": {"rope_type": "proportional"}}, r"of linear, llama3, yarn, not 'proportional'"),
        ({"rope_scaling": {"factor": 2.0}}, r"not 'default'"),
        ({"rope_scaling": {**YARN, "finetuned": True}}, r"it has .*finetuned"),
        ({"rope_scaling": {"type": "linear"}}, r"linear must have factor"),
        ({"rope_scaling": {"type": "linear", "factor": float("inf")}}, r"factor must be a number above 0 .* not inf"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, r"llama3 must have factor, high_freq_factor"),
        ({"rope_scaling": "linear"}, r"rope parameters as an object, not 'linear'"),
        ({"rope_parameters": {"rope_theta": "big"}}, r"rope_theta as a finite number, not 'big'"),
        ({"rope_parameters": {"rope_theta": float("nan")}}, r"rope_theta as a finite number, not nan"),
        ({"num_hidden_layers": None}, r"num_hidden_layers as a whole number, not None"),
        ({"vocab_size": "61"}, r"vocab_size as a whole number, not '61'"),
        ({"hidden_size": 64.0}, r"hidden_size as a whole number, not 64.0"),
        ({"num_attention_heads": True}, r"num_attention_heads as a whole number, not True"),
        ({"rms_norm_eps": 0}, r"config.json describes a model that cannot be trained here. model.rms_norm_eps must be"),
        ({"num_attention_heads": 5}, r"hidden_size 64 must be a multiple of model.num_heads 5"),
        ({"num_key_value_heads": 3}, r"num_heads 4 must be a multiple of model.num_kv_heads 3"),
        ({"hidden_size": 12, "head_dim": 3}, r"head size 3 .* must be even"),
        ({"vocab_size": 0}, r"vocab_size must be positive"),
        ({"max_position_embeddings": 0}, r"max_position_embeddings must be at least 1"),
    ],
)  # fmt: skip
def test_configurations_that_are_refused(changes: dict, message: str, tmp_path: Path) -> None:
    config = transformers.LlamaConfig(vocab_size=VOCAB, hidden_size=64, num_attention_heads=4)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    read_hf_config(tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(UserError, match=message):
        read_hf_config(tmp_path)


def test_folders_without_a_readable_config(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent is not a folder: give the one that holds config.json"):
        read_hf_config(tmp_path / "absent")
    with pytest.raises(UserError, match=r"config.json cannot be read: No such file.* save_pretrained"):
        read_hf_config(tmp_path)
    for text, message in (("{", "not valid JSON"), ("[1]", "JSON object, not list"), ("[" * 10**5, "not valid JSON")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=message):
            read_hf_config(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(UserError, match="not valid JSON"):
        read_hf_config(tmp_path)


def test_pickles_are_not_read(tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    refused(tmp_path, r"holds neither model.safetensors nor model.safetensors.index.json")
    for name in ("pytorch_model.bin", "consolidated.00.pth", "weights.pt"):
        (tmp_path / name).write_bytes(b"cos\nsystem\n")
        refused(tmp_path, rf"holds .*{name}.* but no safetensors.*run code.*from_pretrained.*safe_serialization=True")


def test_the_head_of_a_base_model(tmp_path: Path) -> None:
    """LlamaModel is saved without a head, which is known only if it is the embedding."""
    save(tmp_path / "whole")
    transformers.LlamaModel.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "base")
    refused(tmp_path / "base", r"base lacks lm_head.weight, which its config.json needs")


def test_a_tied_head_that_is_another(tmp_path: Path) -> None:
    save(tmp_path, tie_word_embeddings=True)
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    rewrite(tmp_path, lambda t: t["lm_head.weight"][3, 5].add_(1e-3))
    refused(tmp_path, r"lm_head.weight that differs from its model.embed_tokens.weight.*tie_word_embeddings true")
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": torch.zeros(60, 64)}))
    refused(tmp_path, r"lm_head.weight that differs from its")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(UP), rf"lacks {UP}, which its config.json needs"),
        (lambda t: [t.pop(name) for name in list(t) if "layers.1" in name], r"lacks .*, .*, .* and 6 more, which"),
        (lambda t: t.update({"model.layers.1.mlp.up_proj.bias": torch.ones(9)}), r"holds .*up_proj.bias, which"),
        (lambda t: t.update({UP: t[UP][:99]}), rf"tensors holds {UP} of shape \[99, 64\], but .* \[100, 64\]"),
        (lambda t: t.update({NORM: t[NORM].to(torch.int8)}), rf"holds {NORM} as I8, but weights must be one of F64"),
        (lambda t: t.update({NORM: t[NORM].to(torch.float8_e4m3fn)}), rf"holds {NORM} as F8_E4M3, .*before quantiz"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(change: Callable, message: str, tmp_path: Path) -> None:
    save(tmp_path)
    rewrite(tmp_path, change)
    refused(tmp_path, message)


def test_sizes_are_compared_before_memory_is_taken_for_them(tmp_path: Path) -> None:
    save(tmp_path)
    edit(tmp_path, hidden_size=2**20, head_dim=2**18)  # a matrix of 4 TB
    refused(tmp_path, r"embed_tokens.weight of shape \[61, 64\], but .* \[61, 1048576\]")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_values_that_are_not_finite(value: float, tmp_path: Path) -> None:
    save(tmp_path, torch.float64)
    rewrite(tmp_path, lambda t: t[UP][7, 7].fill_(value))
    with pytest.raises(UserError, match=rf"has values in {UP} that are not finite in fp32"):
        list(hf_tensors(tmp_path, *read_hf_config(tmp_path)))


@pytest.mark.parametrize("kind", ["empty", "short", "cut", "pointer", "absent"])
@pytest.mark.parametrize("shard", ["1GB", "40KB"])
def test_damaged_files_are_named(kind: str, shard: str, tmp_path: Path) -> None:
    save(tmp_path, shard=shard)
    path = sorted(tmp_path.glob("*.safetensors"))[-1]
    content = path.read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 34\n"
    path.write_bytes({"empty": b"", "short": b"abc", "cut": content[:-1], "pointer": pointer}.get(kind, b""))
    if kind == "absent":
        path.unlink()
    alone = kind == "absent" and shard == "1GB"
    refused(tmp_path, "holds neither" if alone else rf"{path.name} cannot be read as safetensors .*fetch it again")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c["weight_map"].update({NORM: "../away/model.safetensors"}),
            r"'../away/model.safetensors', but its",
        ),
        (
            lambda c: c["weight_map"].update({NORM: "/tmp/model.safetensors"}),
            r"'/tmp/model.safetensors', but its files",
        ),
        (lambda c: c["weight_map"].update({NORM: "..\\model.safetensors"}), r"safetensors in its own folder"),
        (
            lambda c: c["weight_map"].update({NORM: "pytorch_model.bin"}),
            r"'pytorch_model.bin', but its files must be saf",
        ),
        (
            lambda c: c["weight_map"].update({"x": "model-7.safetensors"}),
            r"model-7.safetensors cannot be read .*missing",
        ),
        (lambda c: c["weight_map"].pop(NORM), rf"does not match model-.* differ in {NORM}"),
        (lambda c: c["weight_map"].update({"x": c["weight_map"][NORM]}), r"does not match model-.* differ in x"),
        (lambda c: c.update({"weight_map": {}}), r"must hold a weight_map"),
        (lambda c: c.update({"weight_map": {NORM: 3}}), r"must hold a weight_map"),
        (lambda c: c.clear(), r"must hold a weight_map"),
    ],
)
def test_indices_that_do_not_fit(change: Callable, message: str, tmp_path: Path) -> None:
    save(tmp_path, shard="40KB")
    change_index(tmp_path, change)
    refused(tmp_path, message)
