"""The house rules that can be checked: imports point one way, files stay small, nothing is unpickled."""

from __future__ import annotations

import ast
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "megatron_switchlora"
# A room may import those before it, and itself. TYPE_CHECKING imports count.
ROOMS = (
    "disk", "config", "distributed", "startup", "lowrank", "optim", "model", "data", "methods", "planning", "run",
    "checkpoint", "hf", "train", "study",
)  # fmt: skip


def sources() -> list[Path]:
    return [path for folder in (PACKAGE, "launch", "tools", "tests") for path in sorted((ROOT / folder).rglob("*.py"))]


def imported(path: Path) -> set[str]:
    """Absolute names of the modules a file imports."""
    names = set()
    parts = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(parts[: len(parts) - node.level]) if node.level else ""
            names.add(".".join(filter(None, (base, node.module))))
    return names


def layer(path: Path) -> str:
    return path.relative_to(ROOT / PACKAGE).with_suffix("").parts[0]


def test_imports_point_one_way() -> None:
    checked = 0
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        if path.parent == ROOT / PACKAGE and path.stem == "__init__":
            continue
        own = layer(path)
        for name in imported(path):
            parts = name.split(".")
            if parts[0] in ("launch", "tools", "tests"):
                raise AssertionError(f"{path} imports {name}")
            if parts[0] == PACKAGE and len(parts) > 1 and parts[1] != own:
                before = ROOMS[: ROOMS.index(own)]
                assert parts[1] in before, f"{path} imports {name}: {own} may import {before}"
                checked += 1
    assert checked > 30


def test_no_modules_import_each_other() -> None:
    """No cycle, imports for annotations and inside functions included."""
    files = {module_name(path): path for path in sorted((ROOT / PACKAGE).rglob("*.py"))}
    needs = {
        name: {other for other in imported(path) if other in files and other != name} for name, path in files.items()
    }
    assert sum(map(len, needs.values())) > 300
    while free := {name for name, others in needs.items() if not others & needs.keys()}:
        needs = {name: others for name, others in needs.items() if name not in free}
    assert not needs


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_only_methods_ask_for_a_methods_name() -> None:
    """Everybody else asks its facts (`config/method.py`)."""
    asks = re.compile(r"method(\.name|\[\"name\"\]) *(==|!=|in |not in )")
    found = [
        f"{path}:{number}"
        for path in sources()
        if "tests" not in path.parts and "methods" not in path.parts
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if asks.search(line)
    ]
    assert not found


def test_only_the_engine_imports_deepspeed() -> None:
    users = {
        str(path.relative_to(ROOT))
        for path in sources()
        if any(name.split(".")[0] == "deepspeed" for name in imported(path)) and "tests" not in path.parts
    }
    assert users == {f"{PACKAGE}/train/engine.py"}


def test_files_stay_small() -> None:
    long = {str(path): n for path in sources() if (n := len(path.read_text().splitlines())) > 400}
    assert not long


def test_nothing_is_unpickled() -> None:
    for path in sources():
        if "tests" in path.parts:
            continue
        text = path.read_text(encoding="utf-8")
        assert "import pickle" not in text and "allow_pickle=True" not in text, path
        assert "torch.load(" not in text or "weights_only=True" in text, path


def test_no_code_beside_a_model_is_run() -> None:
    loads = 0
    for path in (path for path in sources() if "tests" not in path.parts):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            if isinstance(call.func, ast.Attribute) and call.func.attr == "from_pretrained":
                given = {word.arg: ast.unparse(word.value) for word in call.keywords}
                assert given.get("trust_remote_code") == "False", f"{path}:{call.lineno}"
                loads += 1
    assert loads == 3


def test_programs_with_ranks_end_them() -> None:
    """Through the door: left to the interpreter's end, gloo's threads sometimes abort a rank whose peers are gone."""
    starts = ("train.engine import start_distributed", "volume_ranks import")
    programs = [p for p in sources() if p.parent.name in ("launch", "tools") and "def main(" in p.read_text()]
    found = {p.name: "the_door(" in p.read_text() for p in programs if any(word in p.read_text() for word in starts)}
    assert len(found) == 5
    assert all(found.values()), found


def test_every_test_folder_is_collected(pytestconfig: pytest.Config) -> None:
    """pytest by default passes over folders named `dist`, silently."""
    patterns = pytestconfig.getini("norecursedirs")
    folders = [path for path in (ROOT / "tests").iterdir() if path.is_dir() and list(path.glob("test_*.py"))]
    assert len(folders) == 5
    assert not [folder.name for folder in folders for pattern in patterns if fnmatch(folder.name, pattern)]
