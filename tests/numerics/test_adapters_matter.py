"""The quick start's learning is the adapters' too: with their gradients zeroed the run ends worse."""

from __future__ import annotations

import pytest

from tests.dist.launch import run_ranks

STEPS = 100


@pytest.mark.full
def test_run_ends_worse_with_the_adapters_gradients_zeroed() -> None:
    """Two lone ranks, one training as shipped, one with the adapters' gradients zeroed (shortened, smaller batch)."""
    trained, zeroed = run_ranks(2, "tests.numerics.adapters_worker", {"steps": STEPS}, timeout=280)
    print(f"\nvalidation perplexity after {STEPS} steps: {trained:.1f}, adapters' gradients zeroed {zeroed:.1f}")
    assert trained < 0.92 * zeroed
