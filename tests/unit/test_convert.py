"""Out to Hugging Face and PEFT, in from Hugging Face, and on as the start of a run: the function stays."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from megatron_switchlora.checkpoint.archive import write_slices
from megatron_switchlora.checkpoint.engine_state import own_share, state_slices
from megatron_switchlora.checkpoint.files import Checkpoint, seal, verified
from megatron_switchlora.checkpoint.weights import Weights, find_folder, load_initial
from megatron_switchlora.config.errors import UserError
from megatron_switchlora.config.model import ModelConfig
from megatron_switchlora.distributed.mesh import lone_mesh
from megatron_switchlora.distributed.shard import Axis, shard_of
from megatron_switchlora.hf.export import export_dense, export_peft
from megatron_switchlora.hf.start import import_model
from megatron_switchlora.methods import build_method
from megatron_switchlora.model.llama.model import LlamaForCausalLM
from megatron_switchlora.model.protocol import initialize_weights
from megatron_switchlora.optim.layout import plain_layout
from megatron_switchlora.optim.row_adamw import RowAdamW
from megatron_switchlora.planning.memory import checkpoint_bytes
from tests.plain import VOCAB, PlainRun, make_batches, small_config

METHODS = ("full", "lora", "switchlora")
LORA_GA = {"method__init": "lora_ga", "method__rslora": True, "method__alpha": 3.0}
TOKENS = torch.randint(VOCAB, (3, 21), generator=torch.Generator().manual_seed(5))


def trained(method: str, **changes: Any) -> PlainRun:
    run = PlainRun(small_config(method, optim__lr=0.01, **changes))
    for step, batch in enumerate(make_batches(run.config, 6)):
        run.step(step, batch)
    return run


def save(run: PlainRun, folder: Path) -> Checkpoint:
    """A checkpoint of a run without DeepSpeed."""
    folder.mkdir(parents=True)
    plain = SimpleNamespace(
        model=run.model,
        optimizer=run.optimizer,
        method=run.method,
        ds=SimpleNamespace(zero_optimization_stage=lambda: 0),
    )
    held = own_share(state_slices(plain), lone_mesh())  # type: ignore[arg-type]
    write_slices(folder / "tensors-00000.safetensors", [replace(x, tensor=x.tensor.contiguous()) for x in held])
    state = {"step": 6, "config": run.config.to_dict(), "vocab_size": VOCAB}
    (folder / "state.json").write_text(json.dumps(state))
    seal(folder, 6)
    return verified(folder)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    model.eval()
    out = model(TOKENS)
    return (out if isinstance(out, Tensor) else out.logits).float()


def started(method: str, model: ModelConfig, vocab_size: int, weights: Weights) -> LlamaForCausalLM:
    """A run's model just before its first step."""
    config = small_config(method)
    config.model = model
    network = LlamaForCausalLM(model, vocab_size)
    initialize_weights(network, seed=3)
    load_initial(network, weights)
    driver = build_method(config, network)
    optimizer = RowAdamW(driver.param_groups(), beta1=0.9, beta2=0.999, eps=1e-8)
    optimizer.attach(plain_layout([p for group in optimizer.param_groups for p in group["params"]]))
    driver.start(optimizer)
    return network


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tied", [False, True])
def test_an_export_computes_what_the_model_does(tmp_path: Path, method: str, tied: bool) -> None:
    run = trained(method, model__tie_embeddings=tied)
    checkpoint = save(run, tmp_path / "step")
    export_dense(checkpoint, tmp_path / "one", "fp32")
    export_dense(checkpoint, tmp_path / "many", "fp32", limit=20_000)
    export_dense(checkpoint, tmp_path / "small")
    wanted = logits(run.model)
    one, many, small = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("one", "many", "small")
    )
    assert float((logits(one) - wanted).abs().max()) < 1e-5
    assert torch.equal(logits(one), logits(many))
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 5
    assert small.dtype == torch.bfloat16
    for name, value in small.state_dict().items():
        assert torch.equal(value, one.state_dict()[name].bfloat16()), name
    assert one.generate(TOKENS[:1, :5], max_new_tokens=4, pad_token_id=0).shape == (1, 9)


def test_an_export_of_bf16_training_has_its_rounded_factors(tmp_path: Path) -> None:
    """The forward pass reads bf16 factors, whatever the masters hold."""
    run = trained("lora")
    run.config.train.precision = "bf16"
    weights = Weights(save(run, tmp_path / "step"))
    name = "model.layers.0.mlp.up_proj.weight"
    linear = run.method.linears[name.removesuffix(".weight")]  # type: ignore[attr-defined]
    A, B = (factor.detach().bfloat16().float() for factor in (linear.lora_A, linear.lora_B))
    assert torch.equal(weights.read(name), torch.addmm(linear.weight, B.t(), A, alpha=linear.scaling))
    assert torch.equal(weights.read("lm_head.weight"), run.model.lm_head.weight.detach().bfloat16().float())


@pytest.mark.parametrize(
    ("method", "changes"),
    [("lora", {}), ("lora", {"method__rslora": True}), ("switchlora", {}), ("lora", LORA_GA), ("switchlora", LORA_GA)],
)
def test_peft_loads_the_adapters(tmp_path: Path, method: str, changes: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    run = trained(method, **{"method__alpha": 3.0, **changes})
    assert run.config.method.scaling == pytest.approx(3 / 7**0.5 if changes else 3 / 7)
    export_peft(save(run, tmp_path / "step"), tmp_path / "out", "fp32")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "base")
    assert float((logits(base) - logits(run.model)).abs().max()) > 1e-3  # the adapters do something
    model = peft.PeftModel.from_pretrained(base, tmp_path / "out" / "adapter")
    assert float((logits(model) - logits(run.model)).abs().max()) < 1e-5
    adapters = [name for name, _ in model.named_parameters() if "lora_" in name]
    assert len(adapters) == 2 * 7 * run.config.model.num_layers


def test_an_adapter_finds_its_base_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exported to a relative path; and imported again it is the model."""
    peft = pytest.importorskip("peft")
    run = trained("lora", method__alpha=3.0)
    monkeypatch.chdir(tmp_path)
    export_peft(save(run, tmp_path / "step"), Path("out"), "fp32")
    (tmp_path / "away").mkdir()
    monkeypatch.chdir(tmp_path / "away")
    model = peft.AutoPeftModelForCausalLM.from_pretrained("../out/adapter")
    assert float((logits(model) - logits(run.model)).abs().max()) < 1e-5
    import_model(tmp_path / "out" / "adapter", tmp_path / "start")
    weights = Weights(verified(tmp_path / "start"))
    network = started("full", weights.model, weights.vocab_size, weights)
    assert float((logits(network) - logits(run.model)).abs().max()) < 1e-5


@pytest.mark.parametrize("tied", [False, True])
def test_peft_loads_an_adapter_of_twice_the_rank_over_the_original_base(tmp_path: Path, tied: bool) -> None:
    """LoRA-GA's base is the matrices that the run began from, to rounding, not the shifted W."""
    peft = pytest.importorskip("peft")
    run = trained("lora", **LORA_GA, model__tie_embeddings=tied)
    export_peft(save(run, tmp_path / "step"), tmp_path / "out", "fp32", original=True)
    began = LlamaForCausalLM(run.config.model, VOCAB)
    initialize_weights(began, run.config.train.seed)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "base")
    exported, shifted = dict(base.named_parameters()), run.method.linears  # type: ignore[attr-defined]
    for name, linear in shifted.items():
        weight = began.get_parameter(f"{name}.weight").detach()
        assert float((exported[f"{name}.weight"].detach() - weight).norm() / weight.norm()) < 1e-6, name
        assert float((linear.weight - weight).norm() / weight.norm()) > 0.1, name
    model = peft.PeftModel.from_pretrained(base, tmp_path / "out" / "adapter")
    assert float((logits(model) - logits(run.model)).abs().max()) < 1e-5
    ranks = {min(p.shape) for name, p in model.named_parameters() if "lora_" in name}
    assert ranks == {2 * run.config.method.rank}


@pytest.mark.parametrize(("method", "changes"), [("lora", {}), ("switchlora", LORA_GA)])
def test_without_the_first_factors_there_is_no_original_base(tmp_path: Path, method: str, changes: dict) -> None:
    checkpoint = save(trained(method, **changes), tmp_path / "step")
    with pytest.raises(UserError, match=f"does not hold the initial factors of its run.*this is {method}, "):
        export_peft(checkpoint, tmp_path / "out", original=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"method__lte__merge_interval": 4},
        {"method__lte__merge_interval": 4, "method__lte__merge_form": "reset", "method__lte__base": "nf4"},
        {"method__lte__merge_interval": "never", "method__init": "lora_ga", "method__rslora": True},
    ],
    ids=["resetless", "reset nf4", "lora_ga"],
)
def test_heads_export_their_mean(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Saved two steps after a merge: dense, as one adapter of rank N r, and as the start of another run."""
    peft = pytest.importorskip("peft")
    run = trained("lte", method__lte__local_heads=2, method__alpha=7.0, **changes)
    mean = run.method.evaluated()
    checkpoint = save(run, tmp_path / "step")
    export_dense(checkpoint, tmp_path / "dense", "fp32")
    dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert float((logits(dense) - logits(mean)).abs().max()) < 1e-5
    export_peft(checkpoint, tmp_path / "out", "fp32")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "base")
    assert float((logits(base) - logits(mean)).abs().max()) > 1e-4  # the adapters do something
    model = peft.PeftModel.from_pretrained(base, tmp_path / "out" / "adapter")
    assert model.peft_config["default"].r == 14
    assert float((logits(model) - logits(mean)).abs().max()) < 1e-5
    again = started("lora", run.config.model, VOCAB, Weights(checkpoint))
    assert float((logits(again) - logits(mean)).abs().max()) < 1e-5


def test_heads_begin_from_gradients_of_their_own() -> None:
    config = small_config("lte", method__lte__local_heads=2, method__init="lora_ga", method__rslora=True)
    method = PlainRun(config).method
    for linear in method.linears.values():  # type: ignore[attr-defined]
        first, second = linear.lora_A
        assert float((first - second).abs().max()) > 1e-3
    plain = LlamaForCausalLM(config.model, VOCAB)
    initialize_weights(plain, config.train.seed)
    # large factors are taken out of W and put back
    assert float((logits(method.evaluated()) - logits(plain)).abs().max()) < 1e-4


def test_full_rank_has_no_adapters_to_export(tmp_path: Path) -> None:
    checkpoint = save(trained("full"), tmp_path / "step")
    with pytest.raises(UserError, match="method full and has no adapters"):
        export_peft(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", METHODS)
def test_an_imported_model_starts_a_run_unchanged(tmp_path: Path, method: str) -> None:
    torch.manual_seed(0)
    scaling = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 16}  # fmt: skip
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=48, intermediate_size=76, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, rope_parameters={"rope_theta": 10000.0, **scaling},
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="40KB")
    import_model(tmp_path / "hf", tmp_path / "imported", limit=30_000)
    weights = Weights(verified(find_folder(tmp_path / "imported")))
    assert len(list((tmp_path / "imported").glob("*.safetensors"))) > 2
    network = started(method, weights.model, weights.vocab_size, weights)
    assert float((logits(network) - logits(theirs)).abs().max()) < 1e-5
    export_dense(verified(tmp_path / "imported"), tmp_path / "back", "fp32")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert torch.equal(logits(back), logits(theirs))


@pytest.mark.parametrize("source", METHODS)
def test_any_checkpoint_starts_any_method_on_any_mesh(tmp_path: Path, source: str) -> None:
    run = trained(source, model__intermediate_size=75, model__num_kv_heads=4)
    weights = Weights(save(run, tmp_path / "step"))
    for method in METHODS:
        network = started(method, run.config.model, VOCAB, weights)
        assert float((logits(network) - logits(run.model)).abs().max()) < 2e-5
    whole = LlamaForCausalLM(run.config.model, VOCAB)
    load_initial(whole, weights)
    for rank in range(4):
        part = LlamaForCausalLM(run.config.model, VOCAB, Axis(4, rank))
        initialize_weights(part, seed=9)
        load_initial(part, weights)
        for (name, mine), full in zip(part.named_parameters(), whole.parameters(), strict=True):
            assert torch.allclose(mine, shard_of(mine, full.detach()), atol=1e-7), name


def test_another_model_is_named(tmp_path: Path) -> None:
    run = trained("full")
    weights = Weights(save(run, tmp_path / "step"))
    other = small_config("full", model__num_kv_heads=4, model__rope_theta=500.0).model
    with pytest.raises(
        UserError, match=r"model.vocab_size is 61 there and 62 here; model.num_kv_heads is 2 there and 4"
    ):
        load_initial(LlamaForCausalLM(small_config("full", model__num_kv_heads=4).model, VOCAB + 1), weights)
    with pytest.raises(UserError, match=r"model.rope_theta is 10000.0 there and 500.0 here"):
        load_initial(LlamaForCausalLM(other, VOCAB), weights)


@pytest.mark.parametrize(
    "changes", [{}, {"model__tie_embeddings": True, "model__num_kv_heads": 1, "method__rank": 12}, LORA_GA]
)
@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_has_the_bytes_of_the_formula(tmp_path: Path, method: str, changes: dict[str, Any]) -> None:
    """With one key/value head of 12, rank 12 leaves k and v nothing to switch; LoRA-GA keeps A_0 and B_0."""
    run = trained(method, **changes)
    archive = save(run, tmp_path / "step").archive()
    total = sum(tensor.nbytes for tensor in map(archive.read, archive.names()))
    assert total == checkpoint_bytes(run.config, VOCAB)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method__lte__local_heads": 2},
        {"method__lte__local_heads": 2, "method__lte__merge_form": "reset", "model__tie_embeddings": True},
        {"method__lte__base": "nf4"},
        {"method__lte__base": "nf4", "method__lte__merge_form": "reset", "method__lte__local_heads": 2},
        {"method__lte__inner": "switchlora", "method__alpha": 1.0},
    ],
)
def test_a_checkpoint_of_heads_has_the_bytes_of_the_formula(tmp_path: Path, changes: dict[str, Any]) -> None:
    test_a_checkpoint_has_the_bytes_of_the_formula(tmp_path, "lte", changes)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    checkpoint = save(trained("lora"), tmp_path / "step")
    (tmp_path / "mine").mkdir()
    for write in (export_dense, export_peft):
        with pytest.raises(UserError, match="exists already and is not overwritten"):
            write(checkpoint, tmp_path / "mine")
    with pytest.raises(UserError, match="exists already"):
        export_dense(checkpoint, tmp_path / "out", "fp32")
        import_model(tmp_path / "out", tmp_path / "mine")
    assert list((tmp_path / "mine").iterdir()) == []
