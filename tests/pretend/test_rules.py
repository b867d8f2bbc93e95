"""The pretend GPU itself: it refuses to mix devices where CUDA does, and counts launches, copies and waits."""

from __future__ import annotations

from typing import Any

import torch

from tests.dist.launch import run_ranks

LAUNCH, WAIT = {"launches": 1}, {"waits": 1}
UPLOAD, DOWNLOAD = {"uploads": 1}, {"downloads": 1}
EXPECTED: dict[str, Any] = {
    "sum with a matrix of the host": "refused",
    "product with a matrix of the host": "refused",
    "cat with a vector of the host": "refused",
    "cat with a number of the host": "refused",
    "rows by the host's index_select": "refused",
    "rows written by the host's index": "refused",
    "the host's rows by an index of the GPU": "refused",
    "sum into a matrix of the host": "refused",
    "where with a vector of the host": "refused",
    "times a number of the host": LAUNCH,
    "rows by an index of the GPU": LAUNCH,
    "rows by an index of the host": LAUNCH | UPLOAD | WAIT,
    "rows by a mask": LAUNCH | WAIT,
    "view": {},
    "empty": {},
    "list": UPLOAD | WAIT,
    "item": WAIT,
    "truth": LAUNCH | WAIT,
    "tolist": DOWNLOAD | WAIT,
    "equal": WAIT,
    "nonzero": WAIT,
    "masked_select": WAIT,
    "upload": UPLOAD | WAIT,
    "upload from pinned memory": UPLOAD,
    "upload from a view of pinned memory": UPLOAD,
    "blocking upload from pinned memory": UPLOAD | WAIT,
    "download": DOWNLOAD | WAIT,
    "download that may run on": DOWNLOAD,
    "download to pinned memory": DOWNLOAD,
    "download to other memory": DOWNLOAD | WAIT,
    "on the host": {},
}


def test_it_refuses_and_counts_as_cuda() -> None:
    (found,) = run_ranks(1, "tests.pretend.rules_worker", {})
    assert found == EXPECTED


def test_the_tests_own_process_has_no_such_device() -> None:
    """A registered device stays: other tests of the process would see an accelerator."""
    assert torch._C._get_privateuse1_backend_name() == "privateuseone"
    assert not torch.accelerator.is_available() or torch.accelerator.current_accelerator() != torch.device("gpu")
