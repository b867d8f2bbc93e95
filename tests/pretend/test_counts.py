"""How much a step asks of the GPU: numbers that may fall and not rise."""

from __future__ import annotations

from tests.dist.launch import run_ranks

# SwitchLoRA with 24 layers at ZeRO 1, one rank of 8, where every layer switches; waits in our own lines.
CEILINGS = {
    ("switch", "launches"): 3780,
    ("switch", "uploads"): 1092,
    ("switch", "waits"): 1092,
    ("AdamW", "launches"): 1013,
    ("AdamW", "uploads"): 42,
    ("AdamW", "waits"): 45,
    ("step", "downloads"): 2,
    ("step", "waits"): 1141,
}


def test_a_step_stays_below_its_ceilings() -> None:
    (found,) = run_ranks(1, "tests.pretend.counting_worker", {"name": "switchlora"})
    print(*(f"{kind}: {found[kind]}" for kind in ("switch", "AdamW", "step", "waits", "launches")), sep="\n")
    assert found["switched"] > 24 * 7 * 2 and found["AdamW"]["launches"] > 10  # all layer sides; something was counted
    above = {(part, kind): found[part][kind] for part, kind in CEILINGS if found[part][kind] > CEILINGS[part, kind]}
    assert not above
