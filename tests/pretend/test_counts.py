"""How much a step asks of the GPU: numbers that may fall and not rise."""

from __future__ import annotations

from tests.dist.launch import run_ranks

# SwitchLoRA with 24 layers at ZeRO 1, one rank of 8, where every layer switches; waits in our own lines.
# A micro-batch forms all W + sBA; eager elementwise functions are most of its launches.
CEILINGS = {
    ("switch", "launches"): 31,
    ("switch", "uploads"): 1,
    ("switch", "waits"): 0,
    ("AdamW", "launches"): 84,
    ("AdamW", "uploads"): 0,
    ("AdamW", "waits"): 0,
    ("micro-batch", "launches"): 3935,
    ("micro-batch", "waits"): 0,
    ("step", "downloads"): 1,
    ("step", "waits"): 1,
}


def test_a_step_stays_below_its_ceilings() -> None:
    payload = {"name": "switchlora", "changes": {"method__compute": "merged"}}
    (found,) = run_ranks(1, "tests.pretend.counting_worker", payload)
    shown = ("switch", "AdamW", "micro-batch", "step", "waits", "launches")
    print(*(f"{kind}: {found[kind]}" for kind in shown), sep="\n")
    assert found["switched"] > 24 * 7 * 2 and found["AdamW"]["launches"] > 10  # all layer sides; something was counted
    above = {(part, kind): found[part][kind] for part, kind in CEILINGS if found[part][kind] > CEILINGS[part, kind]}
    assert not above
