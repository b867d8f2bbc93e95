"""The revision that results name: that of the package's own tree."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from megatron_switchlora.run import machine


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a git project of one commit."""
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    identity = ("-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
    (tmp_path / "notes.txt").write_text("first")
    for words in (["init", "-q"], ["add", "notes.txt"], ["commit", "-q", "-m", "Begin"]):
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True)
    return tmp_path


def revision(root: Path, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """Return the revision of a package that lies in `root`."""
    room = root / "megatron_switchlora" / "run"
    room.mkdir(parents=True)
    monkeypatch.setattr(machine, "__file__", str(room / "machine.py"))
    return machine.versions()["git_revision"]


def test_a_checkout_has_its_own_revision(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["git", "rev-parse", "HEAD"]
    head = subprocess.run(words, cwd=project, capture_output=True, text=True, check=True).stdout.strip()
    assert revision(project, monkeypatch) == head
    (project / "notes.txt").write_text("second")
    assert machine.versions()["git_revision"] == f"{head}-changed"


def test_a_package_installed_inside_a_project_has_no_revision(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert revision(project / ".venv" / "lib" / "site-packages", monkeypatch) is None
