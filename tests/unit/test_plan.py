"""tools/plan.py: what it chooses, what it refuses, what it prints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_switchlora.planning import command
from tests.dist.launch import clean_environment, run_scripts

ROOT = Path(__file__).resolve().parents[2]
LARGE = ["--config", "launch/configs/llama_1.3b.yaml"]


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The command in this process."""
    monkeypatch.chdir(ROOT)
    return lambda *words: command.main(words)


@pytest.fixture
def planned(main: Callable[..., None], tmp_path: Path) -> Callable[..., dict]:
    """The numbers of the best plan."""

    def run(*words: str) -> dict:
        main(*words, "--out", str(tmp_path / "plan.json"))
        return json.loads((tmp_path / "plan.json").read_text())

    return run


def test_the_large_model_on_sixteen_nodes(planned: Callable[..., dict]) -> None:
    cluster = ["--nodes", "16", "--gpus", "8", "--gpu", "h100", "--link", "400Gb"]
    low = planned(*LARGE, *cluster, "--as_configured")
    full = planned(*LARGE, "--config", "launch/configs/methods/full.yaml", *cluster, "--as_configured")
    assert low["by_link"]["between nodes"] / full["by_link"]["between nodes"] == pytest.approx(1 - 0.5457, abs=5e-4)
    assert low["seconds"] < full["seconds"] and low["memory"] < 80e9
    kinds = {item["kind"] for item in low["items"]}
    assert {"frozen W, fp32", "candidate bank, bf16", "fp32 masters", "Adam moments, fp32"} <= kinds
    assert low["seconds"] == pytest.approx(low["compute"] + sum(low["exposed"].values()))
    assert low["checkpoint_seconds"] == low["checkpoint"] / 2e9


def test_a_small_gpu_takes_smaller_micro_batches_and_more_stages(planned: Callable[..., dict]) -> None:
    """What fits decides: on 24 GB the fastest plan of 80 GB is not among them."""
    found = planned(*LARGE, "--nodes", "1", "--gpus", "8", "--gpu", "rtx4090")
    assert found["memory"] <= 24e9
    large = planned(*LARGE, "--nodes", "1", "--gpus", "8", "--gpu", "a100")
    assert large["memory"] > 24e9 and large["seconds"] < found["seconds"]


def test_the_configuration_itself(planned: Callable[..., dict]) -> None:
    words = [*LARGE, "--nodes", "4", "--ds_config", "ds_configs/zero2.json", "--parallel.tp", "2", "--as_configured"]
    found = planned(*words)
    assert found["plan"] == "dp 16 x tp 2, ZeRO 2, 8 micro-batches of 12"
    assert found["by_link"]["within nodes"] > 0


def test_heads_need_no_link_between_merges(planned: Callable[..., dict]) -> None:
    words = [*LARGE, "--config", "launch/configs/methods/lte_r64.yaml", "--parallel.lte_heads", "4", "--nodes", "4"]
    often, seldom = (planned(*words, "--method.lte.merge_interval", t) for t in ("10", "1000"))
    assert often["by_link"]["between nodes"] == pytest.approx(100 * seldom["by_link"]["between nodes"], rel=1e-6)


def test_a_row_of_a_table(main: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    main(*LARGE, "--nodes", "1", "--brief", "--name", "mine")
    row = capsys.readouterr().out
    assert row.startswith("| mine | dp 8 x tp 1") and row.count("|") == 10


def test_as_a_program(tmp_path: Path) -> None:
    env = [clean_environment(tmp_path)]
    statuses, output = run_scripts(ROOT / "tools" / "plan.py", [*LARGE, "--nodes", "16"], env, ROOT, timeout=60)
    assert statuses == [0], output
    assert "dp 128 x tp 1" in output and "next: " in output


def test_full_rank_steps_are_a_phase_of_their_own(
    planned: Callable[..., dict], capsys: pytest.CaptureFixture[str]
) -> None:
    """Days and the peak are those of both; the phases are those of two plans."""
    cluster = [
        "--nodes",
        "4",
        "--gpu",
        "a100-40gb",
        "--as_configured",
        "--parallel.tp",
        "2",
        "--train.activation_checkpointing",
        "true",
    ]
    both = planned(*LARGE, *cluster, "--method.full_rank_steps", "1000")
    assert "before it            1,000 full-rank steps of" in capsys.readouterr().out
    low = planned(*LARGE, *cluster)
    full = planned(*LARGE, "--config", "launch/configs/methods/full.yaml", *cluster)
    assert both["seconds"] == pytest.approx(low["seconds"]) and both["by_link"] == pytest.approx(
        low["by_link"], rel=1e-3
    )
    assert both["full_rank"]["seconds"] == pytest.approx(full["seconds"])
    assert both["full_rank"]["by_link"] == full["by_link"]
    assert both["days"] == pytest.approx((1000 * full["seconds"] + 39000 * low["seconds"]) / 86400)
    assert both["memory"] == max(low["memory"], full["memory"])


def test_what_is_given_is_not_tried(planned: Callable[..., dict]) -> None:
    found = planned(*LARGE, "--nodes", "2", "--parallel.tp", "2", "--train.micro_batch_size=8")
    assert "x tp 2," in found["plan"] and "micro-batches of 8" in found["plan"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nodes", "0"], "error: --nodes must be at least 1, not 0"),
        (["--nodes", "1", "--efficiency", "2"], "error: --efficiency must be above 0"),
        (["--nodes", "1", "--link", "fast"], "'fast' is no rate"),
        (["--nodes", "1", "--link", "0Gb"], "error: --link must be above 0"),
        (["--nodes", "1", "--max_tp", "0"], "error: --max_tp must be at least 1, not 0"),
        (["--nodes", "1", "--out", "missing/plan.json"], "error: --out missing/plan.json: there is no folder missing"),
        (["--nodes", "1", "--gpu", "rtx4090", "--as_configured"], "error: This does not fit: a rank needs"),
        (["--nodes", "1", "--gpu", "abacus"], "invalid choice: 'abacus'"),
        (["--nodes", "1", "--model.num_layers", "4000"], "error: Nothing fits 80 GB"),
        (
            ["--nodes", "1", "--gpus", "3", "--method.name", "lte", "--parallel.lte_heads", "2"],
            "error: The world of 3 ranks must be a multiple of parallel.lte_heads 2",
        ),
    ],
)
def test_mistakes(
    main: Callable[..., None], capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as end:
        main(*LARGE, *words)
    assert end.value.code == 2
    assert message in capsys.readouterr().err
