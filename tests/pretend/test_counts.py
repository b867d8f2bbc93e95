"""How much a step asks of the GPU: numbers that may fall and not rise."""

from __future__ import annotations

from tests.dist.launch import run_ranks

# SwitchLoRA with 24 layers at ZeRO 1, one rank of 8, where every layer switches; waits in our own lines.
CEILINGS = {
    ("switch", "launches"): 31,
    ("switch", "uploads"): 1,
    ("switch", "waits"): 0,
    ("AdamW", "launches"): 84,
    ("AdamW", "uploads"): 0,
    ("AdamW", "waits"): 0,
    ("step", "downloads"): 1,
    ("step", "waits"): 1,
}


def test_a_step_stays_below_its_ceilings() -> None:
    (found,) = run_ranks(1, "tests.pretend.counting_worker", {"name": "switchlora"})
    print(*(f"{kind}: {found[kind]}" for kind in ("switch", "AdamW", "step", "waits", "launches")), sep="\n")
    assert found["switched"] > 24 * 7 * 2 and found["AdamW"]["launches"] > 10  # all layer sides; something was counted
    above = {(part, kind): found[part][kind] for part, kind in CEILINGS if found[part][kind] > CEILINGS[part, kind]}
    assert not above
