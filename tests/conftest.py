"""One thread in the tests' own process, as in those it starts: small tensors gain nothing from more, and threads that
wait for a busy core make a second into a minute."""

from __future__ import annotations

import torch

import megatron_switchlora.methods  # noqa: F401  # registers them

pytest_plugins = ["tests.lanes", "tests.selection", "tests.timing"]


def pytest_configure() -> None:
    torch.set_num_threads(1)
