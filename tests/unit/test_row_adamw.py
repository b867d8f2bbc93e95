"""Row-step AdamW: torch's AdamW bit for bit without resets; resets, freezes and refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from megatron_switchlora.distributed.shard import Axis, declare
from megatron_switchlora.lowrank.indices import Indices
from megatron_switchlora.optim.head_clip import HeadClip
from megatron_switchlora.optim.layout import RowLayout, plain_layout
from megatron_switchlora.optim.row_adamw import RowAdamW
from megatron_switchlora.optim.schedules import lr_factor

HYPER = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8}


def set_frozen(optimizer: RowAdamW, frozen: dict[nn.Parameter, Tensor]) -> None:
    """Set the rows that must not move in the next step."""
    nothing, indices = np.zeros(0, dtype=np.int64), Indices()
    numbers = [optimizer.numbers.start[param] + rows.numpy() for param, rows in frozen.items()]
    changes = optimizer.rows.plan(nothing, nothing, np.sort(np.concatenate([nothing, *numbers])), indices)
    indices.send(torch.device("cpu"))
    optimizer.freeze(changes, indices)


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(5)
    shapes = [(7, 33), (12, 8), (40,), (5, 6)]
    return [
        declare(nn.Parameter(torch.randn(*shape, generator=generator)), shard=None, rows=index < 2)
        for index, shape in enumerate(shapes)
    ]


def make(params: list[nn.Parameter], lr: float = 0.02, weight_decay: float = 0.0) -> RowAdamW:
    optimizer = RowAdamW([{"params": params, "lr": lr, "weight_decay": weight_decay}], **HYPER)
    optimizer.attach(plain_layout(params))
    return optimizer


def random_gradients(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator) * 10.0 ** torch.randint(
            -9, 3, (1,), generator=generator
        )


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_equals_torch_adamw_bit_for_bit(weight_decay: float) -> None:
    ours, theirs = parameters(), [nn.Parameter(p.detach().clone()) for p in parameters()]
    optimizer = make(ours, weight_decay=weight_decay)
    reference = torch.optim.AdamW(
        theirs, lr=0.02, betas=(0.9, 0.999), eps=1e-8, weight_decay=weight_decay, foreach=True
    )
    for step in range(300):
        lr = 0.02 * lr_factor(step, 20, 300)
        optimizer.param_groups[0]["lr"] = reference.param_groups[0]["lr"] = lr
        random_gradients(ours, step)
        for mine, other in zip(ours, theirs, strict=True):
            other.grad = mine.grad.clone()
        optimizer.step()
        reference.step()
        for mine, other in zip(ours, theirs, strict=True):
            assert torch.equal(mine, other), step
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(optimizer.state[mine]["exp_avg"], reference.state[other]["exp_avg"])
        assert torch.equal(optimizer.state[mine]["exp_avg_sq"], reference.state[other]["exp_avg_sq"])


def test_a_reset_row_behaves_as_a_fresh_row() -> None:
    params = parameters()
    optimizer = make(params)
    for step in range(10):
        random_gradients(params, step)
        optimizer.step()
    rows = torch.tensor([2, 5])
    optimizer.reset_rows(params[0], rows)
    fresh = nn.Parameter(params[0].detach()[rows].clone())
    other = torch.optim.AdamW([fresh], lr=0.02, weight_decay=0.0, foreach=True)
    untouched = optimizer.state[params[0]]["row_step"].clone()
    for step in range(10, 20):
        random_gradients(params, step)
        fresh.grad = params[0].grad[rows].clone()
        optimizer.step()
        other.step()
        assert torch.equal(params[0][rows], fresh)
    steps = optimizer.state[params[0]]["row_step"]
    assert steps[rows].tolist() == [10.0, 10.0]
    assert (steps[[0, 1, 3, 4, 6]] == untouched[[0, 1, 3, 4, 6]] + 10).all()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_frozen_rows_stay_and_wake_with_a_warm_up(weight_decay: float) -> None:
    params = parameters()
    optimizer = make(params, weight_decay=weight_decay)
    for step in range(10):
        random_gradients(params, step)
        optimizer.step()
    rows = torch.tensor([1, 4])
    optimizer.reset_rows(params[1], rows)
    held = params[1].detach()[rows].clone()
    set_frozen(optimizer, {params[1]: rows})
    for _ in range(5):
        random_gradients(params, 10)
        optimizer.step()
        assert torch.equal(params[1][rows], held)
        assert not torch.equal(params[1][0], held[0])
    assert optimizer.state[params[1]]["row_step"][rows].tolist() == [5.0, 5.0]
    set_frozen(optimizer, {})
    params[1].grad = torch.full_like(params[1], 3.0)
    optimizer.step()
    move = (params[1].detach()[rows] - held * (1 - 0.02 * weight_decay)).abs() / 0.02
    assert move.mean().item() == pytest.approx(0.522, abs=5e-4)


@pytest.mark.parametrize(("freeze", "size"), [(0, 1.0), (1, 0.744), (3, 0.581), (5, 0.522), (10, 0.482)])
def test_first_update_after_a_freeze(freeze: int, size: float) -> None:
    param = declare(nn.Parameter(torch.zeros(1, 4)), shard=None, rows=True)
    optimizer = make([param], lr=1.0)
    for step in range(freeze + 1):
        set_frozen(optimizer, {param: torch.tensor([0])} if step < freeze else {})
        param.grad = torch.full_like(param, 7.0)
        optimizer.step()
    assert -float(param.detach()[0, 0]) == pytest.approx(size, abs=5e-4)


def test_a_cut_row_equals_a_whole_one() -> None:
    """Two partitions, cut in the middle of a row, step as one: values, resets, freezes and rewrites."""
    whole = declare(nn.Parameter(torch.randn(6, 10, generator=torch.Generator().manual_seed(0))), shard=None, rows=True)
    reference = make([whole])
    split = declare(nn.Parameter(whole.detach().clone()), shard=None, rows=True)
    for cut in (1, 10, 25, 37, 59):
        flat = split.detach().flatten().clone()
        halves = [flat[:cut].clone(), flat[cut:].clone()]
        optimizers = []
        for master, start in zip(halves, (0, cut), strict=True):
            master.requires_grad_()
            optimizer = RowAdamW([{"params": [split], "lr": 0.02}], **HYPER)
            optimizer.param_groups[0]["params"] = [master]  # as DeepSpeed does
            layout = RowLayout()
            layout.add(split, master, 0, start, master.numel())
            optimizer.attach(layout)
            optimizers.append(optimizer)
        one = nn.Parameter(split.detach().clone())
        declare(one, shard=None, rows=True)
        reference = make([one])
        for step in range(8):
            random_gradients([one], step)
            rows = torch.tensor([cut // 10 % 6, (cut // 10 + 3) % 6])
            if step == 3:
                reference.reset_rows(one, rows)
            set_frozen(reference, {one: rows} if 3 <= step < 6 else {})
            for optimizer, master, (lo, hi) in zip(optimizers, halves, ((0, cut), (cut, 60)), strict=True):
                if step == 3:
                    optimizer.reset_rows(split, rows)
                set_frozen(optimizer, {split: rows} if 3 <= step < 6 else {})
                master.grad = one.grad.flatten()[lo:hi].clone()
            for optimizer in (reference, *optimizers):
                optimizer.step()
            assert torch.equal(torch.cat([h.detach() for h in halves]), one.detach().flatten()), (cut, step)
        with torch.no_grad():
            split[rows] = 9.0
        for optimizer in optimizers:
            optimizer.rows_rewritten(split, rows)
        assert (torch.cat([h.detach() for h in halves]).view(6, 10)[rows] == 9.0).all()
        together = {key: sum(o.read_rows(split)[key] for o in optimizers) for key in ("master", "exp_avg")}
        assert torch.equal(together["exp_avg"], reference.read_rows(one)["exp_avg"])


def test_nonfinite_gradients_change_nothing() -> None:
    params = parameters()
    optimizer = make(params)
    random_gradients(params, 0)
    optimizer.step()
    before = [p.detach().clone() for p in params]
    params[0].grad[3, 3] = float("nan")
    params[1].grad[0, 0] = float("inf")
    params[2].grad = params[3].grad = None
    optimizer.step()
    assert optimizer.found_nonfinite
    assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))
    assert (optimizer.state[params[0]]["row_step"] == 1).all()


@pytest.mark.parametrize("limit", [0.0, 1.0])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_flag_on_the_device_refuses_as_the_host_does(
    limit: float, weight_decay: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where reading it would wait: good steps are the same to the bit, bad ones (the first too) change nothing."""
    runs = []
    for on_host in (True, False):
        params = parameters()
        optimizer = make(params, weight_decay=weight_decay)
        optimizer.head_clip = HeadClip(limit, 1, Axis(), Axis(), torch.device("cpu"))
        if not on_host:
            monkeypatch.setattr(HeadClip, "known_refusal", lambda self: None)
        for step in range(8):
            random_gradients(params, step)
            if step in (0, 5):
                params[step % 4].grad.view(-1)[7] = float("nan" if step else "inf")
            set_frozen(optimizer, {params[1]: torch.tensor([2])} if step == 6 else {})
            optimizer.step()
            assert bool(optimizer.head_clip.refused) == (step in (0, 5))
        runs.append((params, optimizer))
    for mine, theirs in zip(*(params for params, _ in runs), strict=True):
        assert torch.equal(mine, theirs)
        states = [optimizer.state[param] for (_, optimizer), param in zip(runs, (mine, theirs), strict=True)]
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
        assert (states[0]["row_step"] == 6).all()


def test_steps_before_attach_are_ignored() -> None:
    params = parameters()
    optimizer = RowAdamW([{"params": params, "lr": 0.1}], **HYPER)
    random_gradients(params, 0)
    before = [p.detach().clone() for p in params]
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))


def test_state_is_eight_bytes_and_a_row_counter() -> None:
    params = parameters()
    state = make(params).state
    size = sum(t.numel() * t.element_size() for t in state[params[0]].values())
    assert size == 8 * 7 * 33 + 4 * 7
    assert state[params[2]]["row_step"].numel() == 1


def test_learning_rate() -> None:
    assert [lr_factor(k, 4, 12) for k in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert lr_factor(4, 4, 12) == 1.0
    assert lr_factor(8, 4, 12) == pytest.approx(0.5)
    assert lr_factor(12, 4, 12) == pytest.approx(0.0)
    assert lr_factor(0, 0, 1) == 1.0
