"""The command `switchlora`, what ships with the package, and the scripts it writes."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_switchlora import __version__, shipped
from megatron_switchlora.cli.bench import BENCHMARKS
from megatron_switchlora.cli.init_scripts import main as init_scripts
from megatron_switchlora.cli.main import COMMANDS
from megatron_switchlora.cli.table import run
from megatron_switchlora.config.command_line import parse_arguments
from megatron_switchlora.config.ds_config import read_ds_config
from megatron_switchlora.config.errors import UserError
from megatron_switchlora.study.comparison.command import default_out
from tests.dist.launch import REPOSITORY

SCRIPTS = {path for folder in ("launch", "tools") for path in (REPOSITORY / folder).glob("*.py")}


def test_every_script_has_its_command() -> None:
    """And the other way round, but for the command that writes scripts."""
    modules = {module for table in (COMMANDS, BENCHMARKS) for module, _ in table.values() if ".cli." not in module}
    started = {line.split()[1] for path in SCRIPTS for line in path.read_text().splitlines() if "import main" in line}
    assert modules == started
    for module in modules:
        assert callable(importlib.import_module(module).main)


def test_a_subcommand_gets_its_words(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["switchlora"])
    with pytest.raises(SystemExit, match="0"):
        run("switchlora", COMMANDS, ["bench", "step", "--help"])
    assert capsys.readouterr().out.startswith("usage: switchlora bench step ")


def test_help_version_and_what_is_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--help"]):
        run("switchlora", COMMANDS, words)
        shown = capsys.readouterr().out
        assert all(f"  {name} " in shown and about in shown for name, (_, about) in COMMANDS.items())
    run("switchlora", COMMANDS, ["--version"])
    assert capsys.readouterr().out == f"{__version__}\n"
    with pytest.raises(SystemExit, match="2"):
        run("switchlora", COMMANDS, ["trainn"])
    assert "no command 'trainn': give one of pretrain," in capsys.readouterr().err


def test_shipped_files_have_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of the user's of that name comes first, and a name that nothing has is an error."""
    monkeypatch.chdir(tmp_path)
    shipped_run = parse_arguments(["--config", "llama_1.3b", "--config", "methods/switchlora_r512"]).config
    assert shipped_run.model.hidden_size == 2048 and shipped_run.method.rank == 512
    assert read_ds_config("zero2")["zero_optimization"]["stage"] == 2
    (tmp_path / "cpu_quickstart").write_text("train:\n  steps: 77\n")
    assert parse_arguments(["--config", "cpu_quickstart"]).config.train.steps == 77
    (tmp_path / "llama_130m").mkdir()  # a folder, as of a run, hides nothing
    assert parse_arguments(["--config", "llama_130m"]).config.model.hidden_size == 768
    for words in (["--config", "no_such"], ["--config", "cpu_quickstart.yaml"], ["--config", "x" * 300]):
        with pytest.raises(UserError, match="cannot be read"):
            parse_arguments(words)


def test_an_installation_reads_its_own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "PACKAGE", tmp_path / "site-packages" / "megatron_switchlora")
    assert shipped.shipped_folder("settings") == tmp_path / "site-packages" / "tools" / "settings"
    (tmp_path / "site-packages" / "megatron_switchlora" / "settings").mkdir(parents=True)
    assert shipped.shipped_folder("settings").parent == shipped.PACKAGE
    monkeypatch.chdir(tmp_path)
    (shipped.PACKAGE / "launch").mkdir()
    assert shipped.home_path("launch/configs/x.yaml") == shipped.PACKAGE / "launch" / "configs" / "x.yaml"
    assert default_out("s") == tmp_path / "compare_s.json" and shipped.home_path("x.yaml") == tmp_path / "x.yaml"


def test_written_scripts_start_this_python(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where there is no checkout: the sketch of a cluster is a folder of fake commands."""
    init_scripts([str(tmp_path / "mine")])
    assert "launch/configs/cpu_quickstart.yaml" in capsys.readouterr().out
    written = {path.relative_to(tmp_path / "mine").as_posix() for path in (tmp_path / "mine").rglob("*.*")}
    assert {"launch/pretrain.py", "launch/slurm/pretrain.sbatch", "launch/mpi/pretrain.sh", "ds_configs/zero1.json",
            "launch/configs/methods/switchlora_r512.yaml"} <= written  # fmt: skip
    commands = tmp_path / "bin"
    commands.mkdir()
    for name in ("srun", "mpirun"):
        (commands / name).write_text('#!/bin/sh\necho "$@"\n')
        (commands / name).chmod(0o755)
    environment = {"PATH": f"{commands}:{os.environ['PATH']}"}
    slurm = {"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "n", "SLURM_CPUS_ON_NODE": "1",
             "SLURM_JOB_NAME": "job"}  # fmt: skip
    for script, words in (("slurm/pretrain.sbatch", []), ("mpi/pretrain.sh", ["n1", "2"])):
        done = subprocess.run(
            ["bash", f"launch/{script}", *words, "--train.steps", "5"], cwd=tmp_path / "mine", text=True,
            env=environment | slurm, capture_output=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0 and f"{sys.executable} -u " in done.stdout, done.stderr
        assert "launch/pretrain.py" in done.stdout and "--train.steps 5" in done.stdout
    assert os.access(tmp_path / "mine" / "launch" / "mpi" / "pretrain.sh", os.X_OK)


@pytest.mark.parametrize("linked", [False, True])
def test_written_scripts_replace_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str], linked: bool) -> None:
    """Nor is anything written through a link, even one to nowhere."""
    if linked:
        (tmp_path / "ds_configs").symlink_to(tmp_path / "elsewhere")
    else:
        (tmp_path / "ds_configs").mkdir()
    with pytest.raises(SystemExit, match="2"):
        init_scripts([str(tmp_path)])
    assert "ds_configs exist already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["ds_configs"]


def test_a_folder_that_takes_no_files_is_left_as_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for target in (tmp_path / ("x" * 300), tmp_path / "file" / "inside"):
        (tmp_path / "file").write_text("")
        with pytest.raises(SystemExit, match="2"):
            init_scripts([str(target)])
        assert "cannot be written" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["file"]
