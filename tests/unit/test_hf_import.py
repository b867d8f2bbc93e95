"""Folders that transformers saved, read here: the same function, to the last bit or a stated tolerance."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from megatron_switchlora.config.errors import UserError
from megatron_switchlora.config.model import ModelConfig
from megatron_switchlora.distributed.shard import shard_of, without_padding
from megatron_switchlora.hf.folders import export_model
from megatron_switchlora.hf.import_ import hf_tensors, read_hf_config
from megatron_switchlora.model.llama.model import LlamaForCausalLM
from megatron_switchlora.model.llama.rope import scaled_frequencies
from tests.hf_folders import LLAMA3, ROPES, VOCAB, YARN, edit, rewrite, save, tokens

MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gqa": {"num_key_value_heads": 2},
    "tied": {"tie_word_embeddings": True},
    "odd_sizes": {"rms_norm_eps": 1e-4, "num_key_value_heads": 1, "num_hidden_layers": 1},
    **{name: {"rope_parameters": {"rope_theta": 500.0, **scaling}} for name, scaling in ROPES.items()},
}


def theirs(folder: Path) -> transformers.LlamaForCausalLM:
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def ours(folder: Path) -> LlamaForCausalLM:
    """The folder in our model, whose parameters must come in order."""
    config, vocab_size = read_hf_config(folder)
    model = LlamaForCausalLM(config, vocab_size)
    params = dict(model.named_parameters())
    names = []
    for name, tensor in hf_tensors(folder, config, vocab_size):
        assert tensor.dtype == torch.float32 and tensor.device.type == "cpu"
        params[name].data.copy_(shard_of(params[name], tensor))
        names.append(name)
    assert names == list(params)
    return model


@torch.no_grad()
def gap(mine: LlamaForCausalLM, other: transformers.LlamaForCausalLM, dtype: torch.dtype = torch.float32) -> float:
    return float((mine.to(dtype)(tokens()) - other.to(dtype)(tokens()).logits).abs().max())


@pytest.mark.parametrize("shard", ["1GB", "40KB"])
@pytest.mark.parametrize("name", MODELS)
def test_the_function_is_that_of_transformers(name: str, shard: str, tmp_path: Path) -> None:
    save(tmp_path, shard=shard, **MODELS[name])
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "40KB")
    model, other = ours(tmp_path), theirs(tmp_path)
    low, high = gap(model, other), gap(model, other, torch.float64)
    print(f"{name}: logits within {low:.1e} in fp32, {high:.1e} in float64 (their norms and rope stay fp32)")
    assert low < 1e-5 and high < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_stored_otherwise(dtype: torch.dtype, tmp_path: Path) -> None:
    save(tmp_path, dtype, shard="20KB", num_key_value_heads=2)
    model, other = ours(tmp_path), theirs(tmp_path)
    for name, param in model.named_parameters():
        assert torch.equal(without_padding(param, param), other.get_parameter(name))
    assert gap(model, other) < 1e-5


@pytest.mark.parametrize("name", ["tied", "linear", "llama3", "yarn_slopes"])
def test_import_and_export_agree(name: str, tmp_path: Path) -> None:
    """The exported folder has the function (to the last bit), the scaling and the context of the imported one."""
    first, second = tmp_path / "first", tmp_path / "second"
    save(first, num_key_value_heads=2, **MODELS[name])
    second.mkdir()
    export_model(ours(first), second, seq_len=8)
    before, after = theirs(first), theirs(second)
    assert after.config.rope_parameters == before.config.rope_parameters
    for key in ("max_position_embeddings", "tie_word_embeddings", "rms_norm_eps", "num_key_value_heads"):
        assert getattr(after.config, key) == getattr(before.config, key)
    with torch.no_grad():
        assert torch.equal(before(tokens()).logits, after(tokens()).logits)
    assert read_hf_config(first) == read_hf_config(second)


STYLES = {
    "version 4": {"rope_theta": 500.0},
    "version 4, null": {"rope_theta": 500.0, "rope_scaling": "null"},
    "version 4, legacy key": {"rope_theta": 500, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "version 4, both keys": {"rope_scaling": {"type": "linear", "rope_type": "llama3", **LLAMA3}},
    "version 4, context as original": {
        "rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": None},
        "max_position_embeddings": 128,
    },
    "no max_position_embeddings": {
        "rope_scaling": {"rope_type": "yarn", "factor": 2.0},
        "max_position_embeddings": None,
    },
    "original outside": {"rope_parameters": {**YARN, "rope_theta": 7.0}, "original_max_position_embeddings": 32},
    "original outside, unused": {"rope_parameters": ROPES["linear"], "original_max_position_embeddings": 32},
    "theta in and outside": {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}, "rope_theta": 9.0},
    "theta outside": {"rope_parameters": {"rope_type": "default"}, "rope_theta": 9.0},
    "scaling before parameters": {"rope_scaling": ROPES["linear"], "rope_parameters": {**YARN, "rope_theta": 7.0}},
    "rotated whole": {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1.0}},
    "nothing": {},
}


@pytest.mark.parametrize("name", STYLES)
def test_rope_is_read_as_transformers_reads_it(name: str, tmp_path: Path) -> None:
    save(tmp_path)
    edit(tmp_path, **{"rope_parameters": None, **STYLES[name]})
    config, _ = read_hf_config(tmp_path)
    rotary = theirs(tmp_path).model.rotary_emb
    if config.rope_scaling is None:
        frequencies, factor = config.rope_theta ** -(torch.arange(0, 16, 2) / 16), 1.0
        torch.testing.assert_close(frequencies, rotary.inv_freq)
        assert rotary.rope_type == "default"
    else:
        frequencies, factor = scaled_frequencies(config)
        assert torch.equal(frequencies, rotary.inv_freq)
    assert factor == rotary.attention_scaling
    assert gap(ours(tmp_path), theirs(tmp_path)) < 1e-5


def test_configuration_arrives(tmp_path: Path) -> None:
    save(tmp_path, num_key_value_heads=2, rope_parameters={"rope_theta": 500.0, **LLAMA3}, tie_word_embeddings=True)
    assert read_hf_config(tmp_path) == (
        ModelConfig(
            vocab_size=VOCAB, hidden_size=64, intermediate_size=100, num_layers=2, num_heads=4, num_kv_heads=2,
            rope_theta=500.0, rope_scaling=LLAMA3, max_position_embeddings=256, rms_norm_eps=1e-6,
            initializer_range=0.1, tie_embeddings=True,
        ),
        VOCAB,
    )  # fmt: skip


def test_what_an_old_config_leaves_out_is_the_default_of_transformers(tmp_path: Path) -> None:
    save(tmp_path)
    optional = (
        "num_key_value_heads", "rope_parameters", "rms_norm_eps", "initializer_range", "tie_word_embeddings",
        "head_dim", "max_position_embeddings", "attention_bias", "mlp_bias", "hidden_act", "architectures",
    )  # fmt: skip
    edit(tmp_path, **dict.fromkeys(optional))
    config, read = read_hf_config(tmp_path)[0], transformers.LlamaConfig.from_pretrained(tmp_path)
    assert (config.kv_heads, config.head_dim) == (read.num_key_value_heads, read.head_dim)
    assert (config.rms_norm_eps, config.initializer_range) == (read.rms_norm_eps, read.initializer_range)
    assert config.rope_theta == read.rope_parameters["rope_theta"] and config.rope_scaling is None
    assert config.max_position_embeddings == read.max_position_embeddings
    assert config.tie_embeddings == read.tie_word_embeddings
    assert gap(ours(tmp_path), theirs(tmp_path)) < 1e-5


def test_the_base_model_of_tied_embeddings(tmp_path: Path) -> None:
    """LlamaModel is saved without the prefix; transformers' LlamaForCausalLM reads that, and so do we."""
    save(tmp_path / "whole", tie_word_embeddings=True)
    theirs(tmp_path / "whole").model.save_pretrained(tmp_path / "base")
    assert "embed_tokens.weight" in load_file(tmp_path / "base" / "model.safetensors")
    assert gap(ours(tmp_path / "base"), theirs(tmp_path / "whole")) < 1e-5


def test_a_stored_tied_head_is_passed_over(tmp_path: Path) -> None:
    save(tmp_path, tie_word_embeddings=True)
    other = theirs(tmp_path)
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert gap(ours(tmp_path), other) < 1e-5


def test_stored_frequencies_are_passed_over(tmp_path: Path) -> None:
    save(tmp_path)
    rewrite(tmp_path, lambda t: t.update({"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    assert gap(ours(tmp_path), theirs(tmp_path)) < 1e-5


def test_links_into_a_cache_are_followed(tmp_path: Path) -> None:
    """As the cache of the Hugging Face hub lays its files out; the same links anywhere else are refused."""
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "abc"
    save(blobs, shard="40KB")
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert gap(ours(snapshot), theirs(blobs)) < 1e-5
    (tmp_path / "models--a--b").rename(tmp_path / "b")
    with pytest.raises(UserError, match=r"config.json is a link to .*blobs/config.json, out of its folder, and is not"):
        read_hf_config(tmp_path / "b" / "snapshots" / "abc")


def test_a_tensor_is_read_when_asked_for_and_owns_its_memory(tmp_path: Path) -> None:
    save(tmp_path, shard="40KB")
    config, vocab_size = read_hf_config(tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    reading = hf_tensors(tmp_path, config, vocab_size)
    name, tensor = next(reading)
    before = tensor.clone()
    with (tmp_path / index[name]).open("r+b") as file:  # in place: a view of the mapped file would change with it
        header = int.from_bytes(file.read(8), "little")
        content = file.seek(8 + header) and file.read()
        file.seek(8 + header)
        file.write(bytes(len(content)))
    assert torch.equal(tensor, before) and float(before.abs().max()) > 0
    last = tmp_path / index["lm_head.weight"]
    last.write_bytes(b"")
    with pytest.raises(UserError, match=rf"{last.name} cannot be read"):
        list(reading)
