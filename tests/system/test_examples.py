"""The walks of examples/, in few steps."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.dist.launch import REPOSITORY, clean_environment, free_port
from tests.system.commands import BIN

pytestmark = [pytest.mark.full, pytest.mark.timeout(1200)]
EXAMPLES = REPOSITORY / "examples"


def walk(name: str, folder: Path, *words: str) -> str:
    """Return the output of a walk, which must succeed."""
    environment = {**clean_environment(folder), "STEPS": "20", "PORT": str(free_port())}
    environment["PATH"] = f"{BIN}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(EXAMPLES / name), *words], cwd=folder, env=environment, text=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("walks")


def test_a_run_is_stopped_resumed_and_taken_to_hugging_face_and_back(folder: Path) -> None:
    output = walk("first_run.sh", folder)
    assert "Dry run of switchlora" in output and "resume" in output.lower()
    assert "def read(" in walk("hugging_face.sh", folder, "first_run/final")
    assert (folder / "exported_peft" / "adapter" / "adapter_model.safetensors").is_file()


def test_both_methods_are_compared(folder: Path) -> None:
    table = walk("switchlora_or_full.sh", folder).splitlines()[-3:]
    (_, *full), (_, *low) = (line.replace(",", "").split() for line in table[1:])
    assert float(full[1]) > float(low[1]) and float(full[2]) > 1.5 * float(low[2]) > 0


def test_heads_send_merges_alone(folder: Path) -> None:
    output = walk("lte_slow_link.sh", folder)
    assert "gradients 0 bytes, merges " in output and "merges 0 bytes" not in output


def test_every_walk_is_listed_and_run() -> None:
    scripts = {path.name for path in EXAMPLES.glob("*.sh")}
    assert scripts == {name for name in scripts if f"[{name}]({name})" in (EXAMPLES / "README.md").read_text()}
    assert all(f'"{name}"' in Path(__file__).read_text() for name in scripts)
