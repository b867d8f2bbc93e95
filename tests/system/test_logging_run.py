"""What a run writes beside metrics.jsonl: TensorBoard's events, W&B's run, a trace of a few steps. None changes it."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_switchlora.run.folder import read_meta
from tests.equality.observe import tensor_digests
from tests.system.commands import Place
from tests.unit.test_loggers import curves, events, single
from tests.unit.test_profile import operators, spans, trace_of
from tests.wandb_files import read_run

LOGGED = ["--train.profile", "5-7", "--log.tensorboard", "true", "--log.wandb", "offline"]


@pytest.mark.full
def test_logging_and_tracing_change_no_result(tmp_path: Path) -> None:
    """Two ranks, stopped within the traced steps and resumed: the bits of a plain run that is not stopped."""
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    place = Place(tmp_path)
    plain, logged = tmp_path / "plain", tmp_path / "logged"
    status, output = place.run("2 ranks", place.options("plain"))
    assert status == 0, output
    status, output = place.run("2 ranks", place.options("logged", *LOGGED, "--train.stop_after_steps", "6"))
    assert status == 75 and f"steps 5 to 6 are traced in {logged}/profile/rank0" in output, output
    status, output = place.run("2 ranks", place.options("logged", *LOGGED))
    assert status == 0 and "warning" not in output, output
    assert tensor_digests(plain / "final", "") == tensor_digests(logged / "final", "")
    of_results = ("loss", "val_loss", "grad_norm", "switched")
    assert {key: curves(plain)[key] for key in of_results} == {key: curves(logged)[key] for key in of_results}
    assert not (plain / "profile").exists() and not (plain / "tensorboard").exists() and not (plain / "wandb").exists()
    assert events(logged) == single(curves(logged))
    traces = {path.name: trace_of(path) for path in (logged / "profile").iterdir()}
    steps = {name: list(spans(trace)) for name, trace in traces.items()}
    assert steps == {"rank0.steps_5-6.json.gz": ["step 5", "step 6"], "rank0.steps_7-7.json.gz": ["step 7"]}
    assert all(len(operators(trace)) > 300 for trace in traces.values())
    starts = [read_run(path) for path in sorted(logged.glob("wandb/offline-run-*/*.wandb"))]
    assert [start["id"] for start in starts] == [read_meta(logged)["wandb"]["id"]] * 2
    rows = [(row["_step"], row["loss"]) for start in starts for row in start["rows"] if "loss" in row]
    assert rows == curves(logged)["loss"]
