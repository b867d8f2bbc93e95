"""TP 2 x dp 2 against one process: switchlora at ZeRO 0, 1, 2, full and lora at 1. Other meshes: test_full_grid.py.

TP 2 alone has no case of its own: its collectives and shards are those of this mesh, whose data ranks add to them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.dist.tp_grid import PADDED, RESTARTS, SHORT, STAGES, STEPS, gaps, grid, run_mesh, worst

pytestmark = pytest.mark.timeout(900)
MESH = (2, 2)  # dp, tp
GUARD = pytest.mark.guard_of(f"tests/dist/test_tp_parity.py::{{test}}[{STEPS}]")
short_and_long = pytest.mark.parametrize(
    "steps", [pytest.param(SHORT, marks=GUARD), pytest.param(STEPS, marks=pytest.mark.full)]
)


def small(steps: int) -> list[dict[str, Any]]:
    return [
        *grid(methods=("switchlora",), steps=steps),
        *(
            {"method": method, "stage": "1", "precision": "fp32", "steps": steps, "changes": PADDED}
            for method in ("full", "lora")
        ),
        {"method": "relora", "stage": "1", "precision": "fp32", "steps": 11, "changes": PADDED | RESTARTS},
        {
            "method": "lora",
            "stage": "1",
            "precision": "fp32",
            "steps": 6,
            "changes": {**PADDED, "method__init": "pissa", "optim__lora_plus_ratio": 4.0},
        },
    ]


# the first of each selection is compared with one process, all of them with one another
SPREAD = [
    {"method": "switchlora", "stage": "1", "precision": "fp32", "steps": SHORT,
     "changes": {**PADDED, "method__switch__selection": selection, **where}}
    for selection in ("ring", "random")
    for where in ({}, {"method__switch__bank_spread": "dp"}, {"method__switch__bank_device": "host"})
]  # fmt: skip
BASE: dict[str, Any] = {"method__base_spread": "dp"}
HOSTS = [  # four data ranks on two hosts
    {"method": "switchlora", "stage": "1", "precision": "bf16", "steps": SHORT, "hosts": "aabb",
     "changes": {**PADDED, "method__compute": "merged", "method__base_spread": spread}}
    for spread in ("none", "node")
]  # fmt: skip


def spread_bases(steps: int) -> list[dict[str, Any]]:
    """Cases of this mesh with W spread over data ranks: several stages and precisions, each method with an adapter."""
    fp32, _, _, _, _, bf16, _, _, _, relora, pissa = small(steps)
    chosen = (
        (fp32, BASE | {"train__activation_checkpointing": True}),
        *((case, BASE) for case in (bf16, relora, pissa, SPREAD[1])),
    )
    return [{**case, "changes": {**case["changes"], **more}} for case, more in chosen]


LONG = {
    "method": "switchlora",
    "stage": "1",
    "precision": "fp32",
    "steps": 100,
    "changes": {**PADDED, "train__steps": 100},
}


def identity(case: dict[str, Any]) -> str:
    """The same case on another mesh has the same."""
    return str([case[key] for key in ("changes", "method", "stage", "precision", "steps")])


class Results(dict):
    """(cases, their results) by (dp, tp), each mesh run when it is first asked for."""

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder, self.small, self.bases = folder, small(steps), spread_bases(steps)

    def __missing__(self, mesh: tuple[int, int]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        dp, tp = mesh
        cases = [*self.small, *([*SPREAD, *self.bases, *HOSTS] if mesh == MESH else SPREAD[::3])]
        for index, case in enumerate(cases):
            if case["method"] == "switchlora" and (case["stage"], case["precision"]) == ("1", "fp32"):
                cases[index] = {**case, "export": str(self.folder / f"{dp}-{tp}-{index}.safetensors")}
        self[mesh] = cases, run_mesh(dp, tp, cases)
        return self[mesh]


@pytest.fixture(scope="module")
def lengths(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Results]:
    return {steps: Results(tmp_path_factory.mktemp("exports"), steps) for steps in (SHORT, STEPS)}


@pytest.fixture
def results(lengths: dict[int, Results], steps: int) -> Results:
    return lengths[steps]


@short_and_long
def test_the_mesh_equals_one_process(results: dict) -> None:
    found = {identity(case): run for case, run in zip(*results[MESH], strict=True)}
    cases, base = results[1, 1]
    worst_gaps = gaps(cases, [found[identity(case)] for case in cases], base)
    print("\ndp 2 x tp 2: " + ", ".join(f"{key} {value:.1e}" for key, value in worst_gaps.items()))
    assert worst_gaps["fp32 losses"] < 1e-5 and worst_gaps["fp32 norms"] < 1e-5
    assert worst_gaps["bf16 losses"] < 5e-3 and worst_gaps["bf16 norms"] < 5e-2
    assert base[0]["switched"] > 15 * len(base[0]["losses"])


@short_and_long
def test_stages_agree_on_a_mesh(results: dict) -> None:
    runs = results[MESH][1][: len(STAGES)]
    assert [case["stage"] for case in results[MESH][0][: len(STAGES)]] == list(STAGES)
    largest = max(worst(run[key], runs[0][key]) for run in runs[1:] for key in ("losses", "norms"))
    print(f"\ndp 2 x tp 2: losses and norms across stages within {largest:.1e}")
    assert largest < 1e-6


@short_and_long
def test_where_the_bank_lies_changes_nothing(results: Results) -> None:
    """On the same mesh, dp 2 x tp 2: bit for bit."""
    cases, found = results[MESH]
    first = len(results.small)
    for start in (first, first + 3):
        for offset in (1, 2):
            assert found[start + offset]["losses"] == found[start]["losses"], cases[start + offset]
    assert found[first]["losses"] != found[first + 3]["losses"]  # ring and random do differ
    assert found[first + 1]["bank"]["bytes"] < 0.52 * found[first]["bank"]["bytes"]


@short_and_long
def test_where_the_base_lies_changes_nothing(results: Results) -> None:
    """On the same mesh, dp 2 x tp 2, to the bit: losses and norms, and at the end W, factors, optimizer and bank."""
    runs = {identity(case): run for case, run in zip(*results[MESH], strict=True)}
    for case in results.bases:
        kept = {k: v for k, v in case["changes"].items() if k not in (*BASE, "train__activation_checkpointing")}
        mine, whole = runs[identity(case)], runs[identity({**case, "changes": kept})]
        for kind in ("losses", "norms", "switched", "state"):
            assert mine[kind] == whole[kind], (case, kind)
        assert mine["frozen_bytes"] < 0.6 * whole["frozen_bytes"]
        assert mine["gathers"] == [7 * 3] * len(mine["losses"])  # one per matrix and step
        assert not any(whole["gathers"])


@short_and_long
def test_a_base_spread_over_hosts_changes_nothing(results: Results) -> None:
    """Each host has all rows of W, each of its two data ranks a half. The worker compares the hosts' rows."""
    whole, mine = results[MESH][1][-2:]
    for kind in ("losses", "norms", "switched", "state"):
        assert mine[kind] == whole[kind], kind
    assert 0.45 * whole["frozen_bytes"] < mine["frozen_bytes"] < 0.6 * whole["frozen_bytes"]
    assert mine["gathers"] == [7 * 3] * SHORT and not any(whole["gathers"])


@short_and_long
def test_one_fetch_a_step_for_all_layers(results: dict) -> None:
    """Nothing at TP 1; one all-reduce over tp; with candidates spread over dp, one over dp and one over the head."""
    cases, found = results[MESH]
    for case, run in zip(cases, found, strict=True):
        wanted = int(case["method"] == "switchlora" and "hosts" not in case)
        if case["changes"].get("method__switch__bank_spread") == "dp":
            wanted = 2
        first, *others = run["fetches"]
        assert first == 2 * wanted, case  # its own rows and the next step's
        assert set(others) <= {0, wanted} and others[0] == wanted, (case, others)
    assert not any(number for run in results[1, 1][1] for number in run["fetches"])


@short_and_long
def test_the_bank_is_split_over_tp(results: dict) -> None:
    """Half of one process's bytes, but for padding: 75 columns are 128 and 64, odd counts of candidates one more."""
    alone, split = (results[mesh][1][0]["bank"]["bytes"] for mesh in ((1, 1), MESH))
    assert alone / 2 <= split < 0.51 * alone


@short_and_long
def test_the_export_is_that_of_one_process(results: dict) -> None:
    largest = 0.0
    exports = {identity(case): case["export"] for case in results[MESH][0] if "export" in case}
    pairs = [(exports[identity(case)], case["export"]) for case in results[1, 1][0] if "export" in case]
    assert len(pairs) == 3
    for mine, theirs in pairs:
        ours, base = load_file(Path(mine)), load_file(Path(theirs))
        assert {name: t.shape for name, t in ours.items()} == {name: t.shape for name, t in base.items()}
        largest = max(largest, *(float((ours[n] - base[n]).norm() / base[n].norm()) for n in base))
    print(f"\ndp 2 x tp 2: exported tensors within {largest:.1e} relative")
    assert largest < 1e-4
    assert torch.isfinite(torch.tensor(largest))


@pytest.mark.long
def test_replicas_stay_bit_identical_over_a_hundred_steps() -> None:
    (found,) = run_mesh(2, 2, [LONG])  # which asserts it
    assert found["switched"] > 1500
