"""A method in one file under tests: without a change to the package it trains on two ranks, resumes, plans, exports
and is compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.system.commands import Place

TOY = ["--plugins", "tests.toy_method", "--method.name", "toy"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("toy"))


def test_it_trains_resumes_and_exports(place: Place) -> None:
    status, output = place.run("2 ranks", place.options("whole", *TOY, "--method.toy.shrink", "0.1"))
    assert status == 0, output
    lora = place.options("lora", "--method.name", "lora")
    assert place.run("2 ranks", lora)[0] == 0
    losses = {run: [record.get("loss") for record in place.records(run)] for run in ("whole", "lora")}
    assert losses["whole"] != losses["lora"]
    cut = place.options("cut", *TOY, "--method.toy.shrink", "0.1", "--train.stop_after_steps", "5")
    assert place.run("2 ranks", cut)[0] == 75
    status, output = place.run("2 ranks", cut[:-2])
    assert status == 0, output
    assert [record.get("loss") for record in place.records("cut")] == losses["whole"]
    status, output = place.run("alone", [*cut[:-2], "--method.toy.shrink", "0.2"])
    assert status == 2 and "method.toy.shrink is 0.1 there and 0.2 here" in output
    status, output = place.run("alone", ["--evaluate_only", "--output_dir", str(place.folder / "whole")])
    assert status == 0 and f"{place.records('whole')[-1]['val_loss']:.6f}" in output, output
    status, output = place.script("tools/convert_hf.py", "export", "whole", "exported")
    assert status == 0 and (place.folder / "exported" / "model.safetensors").is_file(), output


def test_it_plans_and_refuses(place: Place) -> None:
    options = [word for word in place.options("none", *TOY) if word != "--output_dir"][: -0 or None]
    planned = [*options, "--dry_run", "--dry_run_world", "2"]
    planned.remove(str(place.folder / "none"))
    status, output = place.run("alone", planned)
    assert status == 0 and "Dry run of toy at rank 6" in output, output
    status, output = place.run("alone", [*planned, "--method.toy.shrink", "1"])
    assert status == 2 and "method.toy.shrink must lie in [0, 1), it is 1.0." in output
    status, output = place.run("alone", [*planned, "--method.relora.interval", "60"])
    assert status == 2 and "method.relora.interval belongs to method.name relora, not toy" in output


@pytest.mark.full
def test_it_is_compared(place: Place, tmp_path: Path) -> None:
    options = dict(zip(*[iter(place.options("none"))] * 2, strict=True))
    del options["--output_dir"]
    shared = {name.removeprefix("--"): yaml.safe_load(value) for name, value in options.items()}
    del shared["optim.lr"]
    methods = {
        "lora": {"lr": 0.01, "options": {"method.name": "lora"}},
        "toy": {"lr": 0.01, "options": {"plugins": "tests.toy_method", "method.name": "toy"}},
    }
    setting = {"options": shared, "sweep": "none", "seeds": 1, "best": {"methods": 1, "seeds": 1},
               "reference": "lora", "methods": methods}  # fmt: skip
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(setting))
    out = tmp_path / "results.json"
    words = [str(tmp_path / "toy.yaml"), "--out", str(out), "--work", str(tmp_path / "work")]
    done = place.typed("tools/compare.py", *words, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {run.split()[0] for run in json.loads(out.read_text())["runs"]} == {"lora", "toy"}
    assert "| toy |" in out.with_suffix(".md").read_text()
