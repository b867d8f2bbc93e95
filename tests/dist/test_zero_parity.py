"""ZeRO 0, 1, 2 x dp 1, 2 x full, lora, switchlora: one launch per mesh runs every case."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest

from tests.dist.launch import run_ranks
from tests.dist.tp_grid import (
    BF16_STAGES,
    GALORE,
    METHODS,
    NEEDS_GALORE,
    RESTARTS,
    SHORT,
    STAGES,
    STEPS,
    check_restarts,
    on_mesh,
    worst,
)

pytestmark = pytest.mark.timeout(620)  # two launches


def cases(steps: int) -> list[dict[str, Any]]:
    return [
        *({"method": m, "stage": s, "precision": "fp32", "steps": steps} for m in METHODS for s in STAGES),
        *({"method": "switchlora", "stage": s, "precision": "bf16", "steps": steps} for s in BF16_STAGES),
        # without accumulation stage 2 reduces as often as the others
        *(
            {"method": "switchlora", "stage": s, "precision": "fp32", "steps": 5, "watch": True,
             "changes": {"train__micro_batch_size": 4}, "name": "watched"} for s in STAGES
        ),
        *({"method": "switchlora", "stage": s, "precision": "bf16", "steps": 5, "watch": True, "name": "watched"}
          for s in BF16_STAGES),
        *({"method": "relora", "stage": s, "precision": p, "steps": 6, "changes": RESTARTS}
          for s, p in (("0", "fp32"), ("2", "fp32"), ("1f", "bf16"))),
        {"method": "switchlora", "stage": "1f", "precision": "bf16", "steps": steps,
         "changes": {"method__base_spread": "dp"}, "name": "spread"},
        *([{**GALORE, "steps": 8}] if find_spec("galore_torch") else []),
    ]  # fmt: skip


# the drift at the published rate is a number to report, not a bar
DRIFT = [
    {"method": "switchlora", "stage": s, "precision": "fp32", "steps": STEPS, "changes": {"optim__lr": 0.02}}
    for s in STAGES
]


def label(case: dict[str, Any]) -> tuple[str, str, str, str]:
    return case["method"], case["stage"], case["precision"], case.get("name", "")


GUARD = pytest.mark.guard_of(f"tests/dist/test_zero_parity.py::{{test}}[{STEPS}]")


@pytest.fixture(
    scope="module", params=[pytest.param(SHORT, marks=GUARD), pytest.param(STEPS, marks=pytest.mark.full)], ids=str
)
def results(request: pytest.FixtureRequest) -> dict[int, dict[tuple, dict[str, Any]]]:
    found, chosen = {}, cases(request.param)
    for dp in (1, 2):
        given = [on_mesh(case, dp) for case in chosen]
        ranks = run_ranks(dp, "tests.dist.parity_worker", {"cases": given}, timeout=280)
        for other in ranks[1:]:
            for mine, theirs in zip(ranks[0], other, strict=True):
                assert mine["losses"] == theirs["losses"]
                assert mine["norms"] == theirs["norms"]
        found[dp] = {label(case): result for case, result in zip(chosen, ranks[0], strict=True)}
    return found


@pytest.mark.parametrize("method", METHODS)
def test_stages_and_data_ranks_agree(results: dict, method: str) -> None:
    base = results[1][method, "0", "fp32", ""]
    losses, norms = 0.0, 0.0
    for dp in (1, 2):
        for stage in STAGES:
            run = results[dp][method, stage, "fp32", ""]
            losses, norms = (
                max(losses, worst(run["losses"], base["losses"])),
                max(norms, worst(run["norms"], base["norms"])),
            )
            assert run["switched"] == base["switched"]
    print(f"\n{method}: over stages 0, 1, 2 and dp 1, 2 losses within {losses:.1e}, norms within {norms:.1e} relative")
    assert losses < 1e-6
    assert norms < 1e-6
    if method == "switchlora":
        assert base["switched"] > 15 * len(base["losses"])


def test_restarts_are_the_same_everywhere(results: dict) -> None:
    base = results[1]["relora", "0", "fp32", ""]
    for dp in (1, 2):
        for (method, _, precision, _), run in results[dp].items():
            if method == "relora":
                check_restarts(run, 1)
                assert worst(run["losses"], base["losses"]) < (1e-6 if precision == "fp32" else 5e-3)


@NEEDS_GALORE
def test_galore_on_two_data_ranks(results: dict) -> None:
    mine, base = (results[dp]["galore", "0", "fp32", ""] for dp in (2, 1))
    assert worst(mine["losses"], base["losses"]) < 1e-6 and base["losses"][-1] < base["losses"][0]
    assert mine["wrapper"] == "GaloreAdamW" and mine["differing"] == []


def test_learns(results: dict) -> None:
    for method in METHODS:
        losses = results[1][method, "0", "fp32", ""]["losses"]
        assert losses[-1] < losses[0]


@pytest.mark.long
def test_drift_at_the_published_rate_is_reported() -> None:
    runs = [run for dp in (1, 2) for run in run_ranks(dp, "tests.dist.parity_worker", {"cases": DRIFT}, timeout=280)[0]]
    drifts = [worst(run["losses"], runs[0]["losses"]) for run in runs]
    print(f"\nlr 0.02: losses within {max(drifts):.1e} relative after {STEPS} steps")
    assert max(drifts) < 1e-2  # a bug would show; rounding alone stays far below


def test_wrappers_are_the_four_known(results: dict) -> None:
    for dp in (1, 2):
        kinds = {label: run["wrapper"] for label, run in results[dp].items()}
        assert kinds["switchlora", "0", "fp32", ""] == "RowAdamW"
        assert kinds["switchlora", "0", "bf16", ""] == "FP16_UnfusedOptimizer"
        assert kinds["switchlora", "1", "bf16", ""] == kinds["switchlora", "2", "fp32", ""] == "DeepSpeedZeroOptimizer"
        assert kinds["switchlora", "1f", "bf16", ""] == "BF16_Optimizer"


def test_bf16_classes_agree_and_keep_w_in_fp32(results: dict) -> None:
    base = results[1]["switchlora", "0", "fp32", ""]
    for dp in (1, 2):
        for stage in BF16_STAGES:
            run = results[dp]["switchlora", stage, "bf16", ""]
            assert run["weight_dtypes"] == ["torch.float32"]
            assert run["param_dtypes"] == ["torch.bfloat16"]
            assert worst(run["losses"], base["losses"]) < 5e-3
            assert run["switched"] == base["switched"]


def test_a_spread_base_changes_nothing(results: dict) -> None:
    """One data rank has all rows, two have half of them, in blocks whose padding is the second's."""
    for dp in (1, 2):
        mine, whole = (results[dp]["switchlora", "1f", "bf16", name] for name in ("spread", ""))
        for kind in ("losses", "norms", "switched", "state"):
            assert mine[kind] == whole[kind], (dp, kind)
        assert (mine["frozen_bytes"] < whole["frozen_bytes"]) == any(mine["gathers"]) == (dp == 2)


def test_masters_and_rows_never_part(results: dict) -> None:
    for dp in (1, 2):
        for name, run in results[dp].items():
            assert run["cast_gap"] == 0.0, name


def test_a_switch_keeps_the_function(results: dict) -> None:
    for dp in (1, 2):
        watched = {name: run for name, run in results[dp].items() if name[3] == "watched"}
        for name, run in watched.items():
            assert run["switched"] > 100, name
            assert 0 < run["function_change"] < 1e-6, (name, run["function_change"])
            assert run["master_gap"] == 0.0, name
            assert run["reset_left"] == 0.0, name
            assert run["frozen_rows"] > 100, name
            assert run["frozen_moved"] == run["free_stuck"] == 0.0, name
            assert run["start_gap"] < 1e-6, name
        print(
            "\nlargest relative change of W + sBA in a switch:", max(run["function_change"] for run in watched.values())
        )


def test_a_partition_boundary_cuts_rows(results: dict) -> None:
    """Else the tests above would not show that a cut row is handled."""
    assert results[2]["switchlora", "1", "fp32", ""]["cut_rows"] > 0


def test_recorded_gradient_bytes(results: dict) -> None:
    """dp 1 hands over nothing; dp 2 the trainable tensors once a step, stage 2 once a micro-batch (two here)."""
    for (method, stage, precision, name), run in results[2].items():
        times = 2 if (stage == "2" and name != "watched") or (stage, precision) == ("2", "bf16") else 1
        width = {"fp32": 4, "bf16": 2}[precision]  # DeepSpeed sends bf16 also where it accumulates in fp32
        expected = run["trainable"] * width * times
        assert len(set(run["dp_bytes"])) == 1
        assert run["dp_bytes"][0] == pytest.approx(expected, rel=0.01), (method, stage, precision, name)
    assert all(run["dp_bytes"][0] == 0 for run in results[1].values())


def test_optimizer_state_is_eight_bytes_a_parameter(results: dict) -> None:
    """Two fp32 moments, and one fp32 counter a row: 4 / row length more."""
    run = results[1]["switchlora", "0", "fp32", ""]
    remainder = run["state_bytes"] / run["trainable"] - 8
    print(
        f"\noptimizer state: {run['state_bytes']} bytes for {run['trainable']} parameters, "
        f"8 + {remainder:.3f} a parameter"
    )
    assert 0 < remainder < 4 / 16
