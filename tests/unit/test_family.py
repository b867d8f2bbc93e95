"""What every model family must fulfil, asked of LLaMA and of the toy family; and that nothing outside knows LLaMA's."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from megatron_switchlora.config.errors import UserError
from megatron_switchlora.config.family import FAMILIES, check_model
from megatron_switchlora.config.method import make_method
from megatron_switchlora.config.model import ModelConfig
from megatron_switchlora.config.plugins import load_plugins
from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.distributed.shard import Axis, full_shape, without_padding
from megatron_switchlora.methods import build_method
from megatron_switchlora.model.protocol import (
    LanguageModel,
    build_model,
    build_on_meta,
    family_of,
    initial_value,
    initialize_weights,
    projections,
)
from megatron_switchlora.planning.counts import count_run

ROOT = Path(__file__).resolve().parents[2]
load_plugins(["tests.toy_family"])
VOCAB = 61


def shape(family: str, **changes: Any) -> ModelConfig:
    config = ModelConfig(
        family=family, hidden_size=32, intermediate_size=50, num_layers=3, num_heads=4, max_position_embeddings=20
    )
    check_model(replace(config, **changes))
    return replace(config, **changes)


@pytest.mark.parametrize("family", ["llama", "toy"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_counts_are_those_of_the_model(family: str, tied: bool, tp: int) -> None:
    config = shape(family, tie_embeddings=tied)
    model = build_on_meta(config, VOCAB, Axis(tp))
    shapes = [tuple(each.linear.weight.shape) for each in model.decoder_linears()]
    assert shapes == [projection.shard(tp) for projection in projections(config)] * config.num_layers
    counts = count_run(RunConfig(model=config, method=make_method("full")), VOCAB, tp)
    assert counts.full_total == sum(param.numel() for param in model.parameters())
    assert counts["matrices"] == sum(m * n for m, n in shapes)
    assert counts["head"] == (0 if tied else model.lm_head.weight.numel())
    assert model.tied_names().keys() == ({"lm_head.weight"} if tied else set())


@pytest.mark.parametrize("family", ["llama", "toy"])
def test_models_keep_the_protocol(family: str) -> None:
    config = shape(family)
    model = build_model(config, VOCAB)
    initialize_weights(model, seed=3)
    assert isinstance(model, LanguageModel) and family_of(config).name == family
    for name, param in model.named_parameters():
        assert name.endswith(".weight")
        assert torch.equal(without_padding(param, param), initial_value(name, full_shape(param), config, 3))
    for name, parent, attribute, linear in model.decoder_linears():
        assert getattr(parent, attribute) is linear is model.get_submodule(name)
    tokens = torch.randint(0, VOCAB, (4, 20))
    loss = model(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    wanted = {name: param.grad.clone() for name, param in model.named_parameters()}  # type: ignore[union-attr]
    model.zero_grad()
    model.checkpointing = True
    calls = []
    layers = model.get_submodule("model.layers" if family == "llama" else "layers")
    layers[0].register_forward_pre_hook(lambda *_: calls.append(1))  # type: ignore[operator, union-attr]
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    assert len(calls) == 2, "the layer is computed again in backward"
    assert all(torch.equal(param.grad, wanted[name]) for name, param in model.named_parameters())


def heads_of(model: LanguageModel, count: int) -> None:
    """Give the model LTE heads in this process, whose B is zero."""
    method = make_method("lte", rank=4, lte__local_heads=count)
    build_method(RunConfig(model=model.config, method=method), model)


@pytest.mark.parametrize("family", ["llama", "toy"])
def test_several_heads_compute_what_one_does(family: str) -> None:
    model = build_model(shape(family), VOCAB)
    initialize_weights(model, seed=3)
    tokens = torch.randint(0, VOCAB, (4, 20))
    losses = [model(part[:, :-1], part[:, 1:]) for part in tokens.chunk(2)]
    names = {name for name, _ in model.named_parameters()} - {f"{each.name}.weight" for each in model.decoder_linears()}
    heads_of(model, 2)
    dense = {name for name, _ in model.named_parameters() if "lora_" not in name}
    assert dense == {f"{name}.{head}" for name in names for head in (0, 1)}
    torch.testing.assert_close(model(tokens[:, :-1], tokens[:, 1:]), torch.stack(losses))


def test_a_module_that_has_no_form_for_heads_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(shape("toy"), VOCAB)
    monkeypatch.delattr(type(model.get_submodule("positions")), "for_heads")
    with pytest.raises(UserError, match=r"model.family toy has no Positions for several LTE heads"):
        heads_of(model, 2)


def test_the_toy_estimates_its_activations() -> None:
    config, size, samples, length = shape("toy"), 2, 4, 20
    model = build_model(config, VOCAB).bfloat16()
    layer = model.layers[0]  # type: ignore[index, union-attr]
    x = torch.randn(samples, length, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    known = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in known and tensor.numel() > length:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    assert sum(kept.values()) == samples * length * family_of(config).kept_bytes(config, 1, size, compiled=False)


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(UserError, match=r"model.family must be one of llama, .*not 'gpt': choose one of them, or name"):
        check_model(ModelConfig(family="gpt"))
    assert {"llama", "toy"} <= FAMILIES.keys()


def test_only_its_folder_knows_llama() -> None:
    """Everything else asks `model/protocol.py`; `model/__init__.py` registers it."""
    own = ROOT / "megatron_switchlora" / "model"
    users, calls = set(), []
    for folder in ("megatron_switchlora", "launch", "tools"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            for node in ast.walk(tree):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if any("model.llama" in name for name in names) and own / "llama" not in path.parents:
                    users.add(path)
                if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("LlamaForCausalLM"):
                    calls.append(path)
    assert users == {own / "__init__.py"}
    assert calls == [own / "llama" / "family.py"]
