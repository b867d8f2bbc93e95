"""The library: a method attached to models that this project did not write, in loops of other people."""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from megatron_switchlora import attach
from megatron_switchlora.config.errors import UserError
from megatron_switchlora.library.attach import Attached
from megatron_switchlora.lowrank.linear import LowRankLinear
from megatron_switchlora.model.llama import model as ours
from megatron_switchlora.model.protocol import initialize_weights
from tests.dist.launch import run_ranks
from tests.plain import VOCAB, PlainRun, make_batches, small_config

SWITCH = {"interval0": 4.0, "freeze_steps": 2, "ratio": 1.0, "total_steps": 2000}
OPTIONS: dict[str, Any] = {"rank": 7, "steps": 60, "warmup_steps": 5, "lr": 0.002}


def llama() -> LlamaForCausalLM:
    """Transformers' class with the weights with which the trainer begins `small_config`."""
    model = small_config().model
    start = ours.LlamaForCausalLM(model, VOCAB)
    initialize_weights(start, 0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=model.hidden_size, intermediate_size=model.intermediate_size,
        num_hidden_layers=model.num_layers, num_attention_heads=model.num_heads, num_key_value_heads=model.kv_heads,
        rms_norm_eps=model.rms_norm_eps, max_position_embeddings=64,
    )  # fmt: skip
    found = LlamaForCausalLM(config)
    found.load_state_dict(start.state_dict())
    return found


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    logits = model(input_ids=batch[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def steps_of(run: Attached, batches: list[Tensor], autocast: bool = False) -> Iterator[float]:
    schedule = run.scheduler()
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = loss_of(run.model, batch)
        loss.backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        schedule.step()
        yield float(loss.detach())


@pytest.mark.parametrize(
    ("method", "changes", "options"),
    [
        ("switchlora", {}, {"switch": SWITCH}),
        ("lora", {"method__init": "pissa"}, {"init": "pissa"}),
        ("relora", {"method__relora__interval": 8, "method__relora__warmup": 2},
         {"relora": {"interval": 8, "warmup": 2}}),
        ("mhlora", {"method__mhlora__heads": 2, "method__alpha": 1.0, "optim__dense_lr": 0.001},
         {"mhlora": {"heads": 2}, "alpha": 1.0}),
    ],
)  # fmt: skip
def test_attached_to_transformers_llama_it_trains_as_the_trainer_does(
    method: str, changes: dict[str, Any], options: dict[str, Any]
) -> None:
    config = small_config(method, optim__clip=0.0, **changes)
    expected = PlainRun(config)
    run = attach(llama(), method, **OPTIONS, **options)
    batches = make_batches(config, 20)
    losses = list(steps_of(run, batches))
    references = [expected.step(step, batch)[0] for step, batch in enumerate(batches)]
    assert losses == pytest.approx(references, abs=1e-5)
    assert losses[-1] < losses[0] - 0.2


def test_a_resumed_loop_is_bit_equal_to_an_uninterrupted_one() -> None:
    batches = make_batches(small_config(), 12)
    whole = attach(llama(), "switchlora", **OPTIONS, switch=SWITCH)
    expected = list(steps_of(whole, batches))
    first = attach(llama(), "switchlora", **OPTIONS, switch=SWITCH)
    list(steps_of(first, batches[:7]))
    file = io.BytesIO()
    torch.save({"model": first.model.state_dict(), "optimizer": first.optimizer.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    model = llama()
    second = attach(model, "switchlora", **OPTIONS, switch=SWITCH)
    model.load_state_dict(state["model"])
    second.optimizer.load_state_dict(state["optimizer"])
    assert second.step == 7
    assert list(steps_of(second, batches[7:])) == expected[7:]
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


class Texts(torch.utils.data.Dataset):
    """The batches' samples one by one, as transformers' Trainer reads them."""

    def __init__(self, batches: list[Tensor]) -> None:
        self.rows = torch.cat(batches)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def test_transformers_trainer_trains_and_resumes_it(tmp_path: Path) -> None:
    texts = Texts(make_batches(small_config(), 10))

    def trained(folder: Path, steps: int, resume: bool) -> tuple[float, nn.Module, int]:
        model = llama()
        run = attach(model, "switchlora", **OPTIONS, switch=SWITCH)
        arguments = TrainingArguments(
            str(folder), max_steps=steps, per_device_train_batch_size=4, gradient_accumulation_steps=2, save_steps=4,
            logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, seed=1,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=texts, optimizers=(run.optimizer, run.scheduler()))
        result = trainer.train(resume_from_checkpoint=resume)
        assert run.step == steps
        return result.training_loss, model, run.step

    _, whole, _ = trained(tmp_path / "whole", 8, False)
    trained(tmp_path / "cut", 4, False)
    _, resumed, _ = trained(tmp_path / "cut", 8, True)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def gpt2() -> tuple[nn.Module, dict[str, Tensor]]:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_positions=32, n_embd=32, n_layer=2, n_head=2))
    return model, {"input_ids": torch.arange(24).view(2, 12), "labels": torch.arange(24).view(2, 12)}


def vit() -> tuple[nn.Module, dict[str, Tensor]]:
    config = ViTConfig(image_size=8, patch_size=4, hidden_size=24, num_hidden_layers=2, num_attention_heads=2,
                       intermediate_size=48, num_channels=1, num_labels=3)  # type: ignore[call-arg]  # fmt: skip
    return ViTForImageClassification(config), {"pixel_values": torch.rand(4, 1, 8, 8), "labels": torch.arange(4) % 3}


def t5() -> tuple[nn.Module, dict[str, Tensor]]:
    config = T5Config(vocab_size=VOCAB, d_model=24, d_kv=12, d_ff=48, num_layers=2, num_heads=2,
                      decoder_start_token_id=0, dropout_rate=0.0)  # type: ignore[call-arg]  # fmt: skip
    return T5ForConditionalGeneration(config), {"input_ids": torch.ones(2, 5).long(), "labels": torch.ones(2, 4).long()}


@pytest.mark.parametrize("build", [gpt2, vit, t5])
@pytest.mark.parametrize("autocast", [False, True])
def test_other_models_keep_their_function_learn_and_merge_to_plain_ones(
    build: Callable[[], tuple[nn.Module, dict[str, Tensor]]], autocast: bool
) -> None:
    torch.manual_seed(0)
    model, inputs = build()
    model.eval()  # no dropout
    kinds = {name: type(module) for name, module in model.named_modules()}
    before = model(**inputs)
    run = attach(model, "switchlora", rank=4, steps=30, lr=0.01, skip_small=True, switch=SWITCH)
    assert sum(isinstance(module, LowRankLinear) for module in model.modules()) >= 8
    assert torch.allclose(model(**inputs).logits, before.logits, atol=1e-5)
    for _ in range(20):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**inputs).loss
        loss.backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
    trained = model(**inputs)
    assert trained.loss < before.loss - 0.3
    state = run.optimizer.state_dict()["switchlora"]
    assert state["step"] == 20 and any(name.endswith("bank_A") for name in state["tensors"])
    merged = run.merge()
    assert {name: type(module) for name, module in merged.named_modules()} == kinds
    assert torch.allclose(merged(**inputs).logits, trained.logits, atol=1e-5)
    with pytest.raises(UserError, match="merged into the model"):
        run.optimizer.step()


def test_a_skipped_step_switches_nothing() -> None:
    """Under a GradScaler a step with an infinite gradient does not happen: no hook runs."""
    run = attach(llama(), "switchlora", **OPTIONS, switch=SWITCH)
    scaler = torch.amp.GradScaler("cpu")
    kept = copy.deepcopy(run.state_dict())
    scaler.scale(loss_of(run.model, make_batches(small_config(), 1)[0])).backward()
    next(iter(run.model.parameters())).grad.view(-1)[0] = torch.inf  # type: ignore[union-attr]
    scaler.step(run.optimizer)
    scaler.update()
    assert run.step == 0
    assert all(torch.equal(tensor, run.state_dict()["tensors"][name]) for name, tensor in kept["tensors"].items())


class Twice(nn.Module):
    """One linear at two places, called at both."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 12)
        self.second = self.first
        self.last = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Scaled(nn.Module):
    """A linear, and a scale of no dimensions, as CLIP has it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(12, 12)
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.scale


def test_what_a_loop_may_do_with_the_optimizer() -> None:
    """Closures, scalars among the parameters, groups added too late, gradients that are not finite."""
    torch.manual_seed(0)
    model, x = Scaled(), torch.randn(5, 12)
    run = attach(model, "lora", rank=3, steps=10, lr=0.01, init="switchlora")

    def closure() -> Tensor:
        run.optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    first = run.optimizer.step(closure)
    assert run.optimizer.step(closure) < first and float(model.scale.detach()) != 1
    with pytest.raises(UserError, match="groups cannot be added"):
        run.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model(x * torch.inf).sum().backward()
    with pytest.warns(RuntimeWarning, match="Step 3 had a gradient that is not finite"):
        run.optimizer.step()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())


def test_attach_leaves_the_users_tensors_and_ddps_list_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model._ddp_params_and_buffers_to_ignore = ["1.bias"]  # type: ignore[assignment]
    weights = model.state_dict()
    copies = copy.deepcopy(weights)
    run = attach(model, "lora", rank=2, steps=5, init="switchlora")
    assert model._ddp_params_and_buffers_to_ignore == ["1.bias", "0.weight", "1.weight"]
    assert all(torch.equal(weights[name], copies[name]) for name in weights)
    run.merge()
    assert model._ddp_params_and_buffers_to_ignore == ["1.bias"]
    with pytest.raises(UserError, match="merged into the model already"):
        run.merge()


def test_a_refused_state_changes_nothing() -> None:
    states = [attach(llama(), "switchlora", **OPTIONS, switch=switch).optimizer.state_dict()
              for switch in (SWITCH, {**SWITCH, "interval0": 8.0})]  # fmt: skip
    run = attach(llama(), "switchlora", **OPTIONS, switch=SWITCH)
    list(steps_of(run, make_batches(small_config(), 2)))
    with pytest.raises(UserError, match=r"another run \(method.switch.interval0 8.0 there, 4.0 here\)"):
        run.optimizer.load_state_dict(states[1])
    assert run.step == 2
    run.optimizer.load_state_dict(states[0])
    assert run.step == 0


def test_a_shared_module_gets_one_adapter_at_all_its_places() -> None:
    torch.manual_seed(0)
    model, x = Twice(), torch.randn(5, 12)
    y = model(x)
    run = attach(model, "lora", rank=3, steps=10, targets=["first"], init="switchlora")
    assert model.first is model.second and isinstance(model.second, LowRankLinear)  # type: ignore[unreachable]
    assert torch.allclose(model(x), y, atol=1e-6)
    run.merge()
    assert model.first is model.second and type(model.first) is nn.Linear


def refusals() -> Iterator[tuple[str, Callable[[], Any]]]:
    """The beginning of each message, and what it answers."""
    small = {"rank": 2, "steps": 5}
    half = nn.Sequential(nn.Linear(8, 8)).half()
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(8, 8))
    tied = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    tied[1].weight = tied[0].weight
    twice = nn.Sequential(nn.Linear(8, 8))
    attach(twice, "lora", **small)
    encoder = nn.TransformerEncoderLayer(8, 2, 8)
    plain = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1), nn.Embedding(3, 8))
    pruned = nn.Sequential(nn.Linear(8, 8))
    prune.random_unstructured(pruned[0], "weight", 0.5)
    heard = nn.Sequential(nn.Linear(8, 8))
    heard[0].register_forward_hook(lambda *_: None)
    alike = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    alike[1].weight = nn.Parameter(alike[0].weight.data)
    ok = nn.Sequential(nn.Linear(8, 8))
    yield "0 has hooks", lambda: attach(pruned, "lora", **small)
    yield "0 has hooks", lambda: attach(heard, "lora", **small)
    yield "The weights of 0, 1 belong", lambda: attach(alike, "lora", **small)
    yield "rank must be a whole number", lambda: attach(ok, "lora", rank=2.0, steps=5)  # type: ignore[arg-type]
    yield "method.switch.selection", lambda: attach(ok, **small, switch={"selection": "rings"})
    yield "optim.lr must be positive", lambda: attach(ok, "lora", **small, lr=-0.1)
    yield "method.relora.interval belongs to", lambda: attach(ok, "lora", **small, relora={"interval": 3})
    yield "relora takes a dict", lambda: attach(ok, "relora", **small, relora=5)
    yield "attach has no option 'merged_cache'", lambda: attach(ok, "lora", **small, merged_cache="auto")
    yield "targets ['q_proj'] match no linear of the model: its linears are 0, 1.", (
        lambda: attach(plain, "lora", **small, targets=["q_proj"]))  # fmt: skip
    yield "targets match 2, a Embedding", lambda: attach(plain, "lora", **small, targets="2")
    yield "rank 2 is above min(m, n) of 1: lower it", lambda: attach(plain, "lora", **small)
    yield "0 has an adapter already", lambda: attach(twice, "lora", **small)
    yield "0.weight is in fp16", lambda: attach(half, "lora", **small)
    yield "0.weight is on the meta device", lambda: attach(empty, "lora", **small)
    yield "The weights of 0, 1 belong to other modules too", lambda: attach(tied, "lora", **small)
    yield "targets match self_attn.out_proj, a NonDyn", (
        lambda: attach(encoder, "lora", **small, targets=["out_proj"]))  # fmt: skip
    yield "targets match linear1, but TransformerEncoderLayer reads", (
        lambda: attach(encoder, "lora", **small, targets=["linear*"]))  # fmt: skip
    yield "method must be one of lora, mhlora, relora, switchlora", lambda: attach(plain, "lte", **small)
    yield "attach has no option 'ranks'", lambda: attach(plain, "lora", **small, ranks=3)
    yield "attach has no option 'base_precision'", lambda: attach(plain, "lora", **small, base_precision="nf4")
    yield "switch has no option 'interval'", lambda: attach(plain, **small, switch={"interval": 3})
    yield "method.rank 1 cannot switch", lambda: attach(plain, rank=1, steps=5, skip_small=True)


def test_bad_input_is_refused_in_a_sentence() -> None:
    for message, act in refusals():
        with pytest.raises(UserError, match="^" + re.escape(message)):
            act()


def test_the_output_layer_of_a_wrapped_model_is_left_out() -> None:
    wrapper = nn.Module()
    wrapper.lm = llama()
    attach(wrapper, "lora", rank=2, steps=5)
    assert type(wrapper.lm.lm_head) is nn.Linear and isinstance(wrapper.lm.model.layers[0].mlp.up_proj, LowRankLinear)


def test_small_linears_are_left_as_they_are_if_asked() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))
    attach(model, "lora", rank=2, steps=5, skip_small=True)
    assert [type(module) for module in model] == [LowRankLinear, nn.Linear]


def test_under_ddp_ranks_stay_equal_and_train_as_one_process() -> None:
    ranks = run_ranks(2, "tests.library.ddp_worker", {"steps": 12})
    assert ranks[0] == ranks[1]
    assert ranks[0]["refused"].startswith("Ranks attach to models with different weights: 0.weight")
    run = attach(llama(), "switchlora", **OPTIONS, switch=SWITCH)
    assert ranks[0]["losses"] == pytest.approx(list(steps_of(run, make_batches(small_config(), 12))), abs=1e-5)
