"""optim.dense_lr 0: embedding, head and norms have no gradient, no moments, no part in the clip and in no count."""

from __future__ import annotations

import pytest
import torch

from megatron_switchlora.checkpoint.resume_rules import compare
from megatron_switchlora.config.command_line import parse_arguments
from megatron_switchlora.config.ds_config import Zero
from megatron_switchlora.config.errors import UserError
from megatron_switchlora.config.run import RunConfig, full_rank_config
from megatron_switchlora.planning.counts import rank_tensors
from megatron_switchlora.planning.memory import checkpoint_bytes, memory_items, peak_bytes
from megatron_switchlora.planning.traffic import gradient_bytes
from tests.plain import VOCAB, PlainRun, make_batches, peak_of, small_config

METHODS = ["full", "lora", "relora", "switchlora", "mhlora", "lte", "lte of 2", "galore"]


def frozen(name: str, **changes: object) -> RunConfig:
    if name == "galore":
        pytest.importorskip("galore_torch")
    heads = {"method__lte__local_heads": 2, "method__lte__merge_interval": 3, "method__alpha": 7.0}
    own = heads if name == "lte of 2" else {}
    return small_config(name.split()[0], **{"optim__dense_lr": 0.0, "optim__clip": 0.0, **own, **changes})


@pytest.mark.parametrize("name", METHODS)
def test_only_matrices_or_adapters_train(name: str) -> None:
    config = frozen(name, method__switch__interval0=1e9)  # a switch masks stale gradients after the norm
    run = PlainRun(config)
    dense = {n: p for n, p in run.model.named_parameters() if not p.requires_grad}
    before = {n: p.detach().clone() for n, p in dense.items()}
    assert len(dense) == 3 + 2 * config.model.num_layers
    assert {id(p) for p in run.params} == {id(p) for p in run.method.matrices()}
    for step, batch in enumerate(make_batches(config, 4)):
        loss, norm, _ = run.step(step, batch)
        own = torch.nn.utils.get_total_norm([p.grad for p in run.method.matrices() if p.grad is not None])
        assert norm == float(own) > 0 and loss > 0
    for n, param in dense.items():
        assert param.grad is None and torch.equal(param, before[n]), n
    assert {id(master) for master in run.optimizer.state} == {id(p) for p in run.params}


@pytest.mark.parametrize("name", METHODS)
def test_counts_and_plans_leave_them_out(name: str) -> None:
    config = frozen(name)
    run, tensors = PlainRun(config), rank_tensors(config, VOCAB)
    trainable, dense = tensors.trained.total(), tensors.fixed.total() - tensors.fixed["matrices"]
    assert trainable == sum(p.numel() for p in run.params)
    assert trainable + dense == sum(p.numel() for p in run.model.parameters())
    state = [t for held in run.optimizer.state.values() for key, t in held.items() if key == "row_step"]
    assert tensors.state["Adam step counters", "row_step"] == sum(t.numel() for t in state)
    assert gradient_bytes(config, VOCAB, 1, 2, Zero(0))[0] == 4 * trainable
    trained = frozen(name, optim__dense_lr=0.01)
    saved = checkpoint_bytes(trained, VOCAB) - checkpoint_bytes(config, VOCAB)
    assert saved == 4 * (config.heads * (3 * dense + 3 + 2 * config.model.num_layers) - dense)


def test_the_loss_of_a_head_that_shares_them_is_that_of_one_that_owns_them() -> None:
    """In a rate that moves them by nothing."""
    share, own = (PlainRun(frozen("lte of 2", optim__dense_lr=rate)) for rate in (0.0, 1e-300))
    for step, batch in enumerate(make_batches(share.config, 7)):
        assert share.step(step, batch)[0] == pytest.approx(own.step(step, batch)[0], rel=1e-5)
    ours, theirs = (run.method.evaluated().state_dict() for run in (share, own))
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-5) for name in theirs)


def test_the_peak_of_a_step_is_as_planned() -> None:
    config = frozen("lora", train__seq_len=64, train__micro_batch_size=8, train__compile="off")
    run = PlainRun(config)
    batches = make_batches(config, 2)
    run.step(0, batches[0])
    held = sum(p.nbytes for p in [*run.model.parameters(), *run.model.buffers()])
    held += sum(t.nbytes for state in run.optimizer.state.values() for t in state.values())
    run.optimizer.zero_grad()
    peak = held + peak_of(lambda: run.model(batches[1][:, :-1], batches[1][:, 1:]).mean().backward())
    assert peak == pytest.approx(peak_bytes(memory_items(config, VOCAB, 1, 1, Zero(0))), rel=0.1)


def test_full_rank_steps_before_them_train_every_weight() -> None:
    config = frozen("lora", method__full_rank_steps=5, method__full_rank_lr=0.003)
    first = full_rank_config(config)
    assert config.freezes_dense and not first.freezes_dense
    assert (first.lr, first.dense_lr) == (0.003, 0.003)


def test_a_resume_neither_freezes_nor_thaws() -> None:
    words = ["--checkpoint.allow_changes", '["optim.*"]']
    still, moving = (parse_arguments([*words, "--optim.dense_lr", rate]).config for rate in ("0", "0.1"))
    compare(still, still.to_dict(), "it")
    for ours, theirs in ((still, moving), (moving, still)):
        with pytest.raises(UserError, match=r"optim.dense_lr is .* there and .* here, and 0 freezes embedding"):
            compare(ours, theirs.to_dict(), "it")
