"""What is installed from the source distribution's wheel, in a fresh environment far from any checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_switchlora.run.metrics_log import read_records
from tests.dist.launch import REPOSITORY, free_port
from tests.system.commands import write_corpus

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]
BUILD = "from setuptools import build_meta; print(build_meta.build_sdist('{out}'))"
IMPORT_ALL = """
import importlib, pkgutil, megatron_switchlora as package
names = [module.name for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
for name in names:
    importlib.import_module(name)
print(len(names), package.__path__[0])
"""
TINY = (  # noqa: SIM905
    "--model.hidden_size 32 --model.intermediate_size 64 --model.num_layers 2 --model.num_heads 2 --method.rank 4 "
    "--train.steps 10 --train.warmup_steps 2 --train.seq_len 32 --train.threads 1 --data.source files "
    "--data.vocab_size 300"
).split()


class Environment:
    """A virtual environment with the package, and an empty folder to work in."""

    def __init__(self, folder: Path) -> None:
        self.bin, self.home = folder / "venv" / "bin", folder / "home"
        self.home.mkdir()

    def run(self, program: str, *words: str, seconds: float = 200) -> str:
        """Return the output of a program that must succeed, without this process's PYTHONPATH."""
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= {"PATH": f"{self.bin}:{environment['PATH']}", "OMP_NUM_THREADS": "1", "HOME": str(self.home),
                        "TORCH_EXTENSIONS_DIR": str(self.home / "extensions")}  # fmt: skip
        done = subprocess.run(
            [str(self.bin / program), *words], cwd=self.home, env=environment, text=True, capture_output=True,
            timeout=seconds,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """The source distribution is built from the tracked files alone, the wheel from it."""
    folder = tmp_path_factory.mktemp("package")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    for name in filter(None, tracked.stdout.split("\0")):
        if (REPOSITORY / name).is_file():
            (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, folder / "tree" / name)
    python = sys.executable
    subprocess.run([python, "-c", BUILD.format(out=folder)], cwd=folder / "tree", check=True, capture_output=True)
    (archive,) = folder.glob("*.tar.gz")
    shutil.rmtree(folder / "tree")
    subprocess.run([python, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(archive)], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([python, "-m", "venv", str(folder / "venv")], check=True)
    environment = Environment(folder)
    environment.run(
        "pip", "install", "-q", "--no-compile", str(wheel), "-c", str(REPOSITORY / "constraints.txt"), seconds=800
    )
    return environment


def test_every_module_imports(installed: Environment) -> None:
    count, place = installed.run("python", "-c", IMPORT_ALL).split()[-2:]
    assert place.startswith(str(installed.bin.parent)) and int(count) > 100


def test_it_trains_ten_steps(installed: Environment) -> None:
    """Alone by a shipped configuration's name, and under DeepSpeed's launcher by the module's."""
    corpus = write_corpus(installed.home / "corpus")
    words = ["--config", "cpu_quickstart", "--ds_config", "zero1", *TINY, "--data.files", f"{corpus}/*.txt"]
    installed.run("switchlora", "pretrain", *words, "--output_dir", "alone")
    module = ["--num_gpus", "1", "--master_port", str(free_port()), "--module", "megatron_switchlora.launch.pretrain"]
    installed.run("deepspeed", *module, *words, "--output_dir", "launched")
    for run in ("alone", "launched"):
        assert (installed.home / run / "final" / "model.safetensors").is_file()
    alone, launched = (read_records(installed.home / run / "metrics.jsonl") for run in ("alone", "launched"))
    assert [record.get("loss") for record in alone] == [record.get("loss") for record in launched]
    assert alone[-1]["val_loss"] < alone[0]["val_loss"]


def test_commands_find_what_is_shipped(installed: Environment) -> None:
    assert "rank 512" in installed.run("switchlora", "pretrain", "--config", "llama_1.3b", "--dry_run")
    installed.run("switchlora", "init-scripts", "project")
    assert str(installed.bin / "python") in (installed.home / "project/launch/slurm/pretrain.sbatch").read_text()
    text = write_corpus(installed.home / "text") / "argparse.txt"
    words = ["--data", str(text), "--methods", "full,switchlora", "--dry_run"]
    assert "switchlora" in installed.run("switchlora", "compare", "tiny_shakespeare", *words)
