"""SwitchLoRA through DeepSpeed at stages 0, 1, 2 (fp32) equals the independent float64 reference step by step.

On two data ranks; one rank gives the same losses at every stage (test_zero_parity.py).
"""

from __future__ import annotations

from tests.dist.launch import run_ranks

CASES = [
    {"stage": stage, "selection": "ring", "weight_decay": 0.1 if stage == "1" else 0.0, "steps": 12}
    for stage in ("0", "1", "2")
] + [
    {"stage": "1", "selection": "random", "weight_decay": 0.0, "steps": 6},
    {"stage": "2", "selection": "independent", "weight_decay": 0.0, "steps": 6},
]


def test_one_step_at_a_time() -> None:
    for case, worst in zip(CASES, run_ranks(2, "tests.dist.reference_worker", {"cases": CASES})[0], strict=True):
        print(f"\n{case}: " + ", ".join(f"{key} {value:.1e}" for key, value in worst.items()))
        assert worst["switched"] > 100
        assert worst["integers"] == worst["row_step"] == 0.0
        for key in ("loss", "grad_norm", "W"):
            assert worst[key] < 1e-6, key
        for key in (
            "exp_avg",
            "exp_avg_sq",
            "master",
        ):  # gradients cancel: their rounding is larger than fp32's epsilon
            assert worst[key] < 1e-5, key
