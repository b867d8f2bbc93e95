"""On a GPU: the same steps as on the CPU, and the bank in pinned host memory."""

from __future__ import annotations

import pytest
import torch

from tests.plain import PlainRun, make_batches, small_config

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def moved_run(**changes: object) -> PlainRun:
    return PlainRun(small_config(**changes), torch.float64, device="cuda")


def test_steps_equal_the_cpu() -> None:
    config = small_config()
    cpu, gpu = PlainRun(config, torch.float64), moved_run()
    for step, batch in enumerate(make_batches(config, 20)):
        mine, theirs = gpu.step(step, batch.cuda()), cpu.step(step, batch)
        assert mine[2] == theirs[2]
        assert mine[0] == pytest.approx(theirs[0], rel=1e-9)


def test_host_bank_is_pinned_and_changes_nothing() -> None:
    host, device = moved_run(method__bank_device="host"), moved_run()
    assert all(rows.is_pinned() for _, rows in host.method.bank.tensors())
    for step, batch in enumerate(make_batches(host.config, 10)):
        assert host.step(step, batch.cuda()) == device.step(step, batch.cuda())
