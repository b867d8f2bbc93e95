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
    "disk", "shipped", "config", "distributed", "startup", "lowrank", "optim", "model", "data", "methods", "planning",
    "library", "run", "checkpoint", "hf", "train", "study", "cli",
)  # fmt: skip


def sources() -> list[Path]:
    folders = (PACKAGE, "launch", "tools", "docs", "tests")
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


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


def scripts() -> list[Path]:
    every = (path for folder in ("launch", "tools") for path in sorted((ROOT / folder).rglob("*.py")))
    return [path for path in every if path.name != "__init__.py"]


def test_scripts_only_call_a_main_of_the_package() -> None:
    for path in scripts():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 12, path
        names = imported(path)
        assert len(names) == 2 and "sys" in names, f"{path} imports {names}"
        kinds = [type(node) for node in tree.body]
        assert kinds == [ast.Expr, ast.Import, ast.ImportFrom, ast.If], f"{path} holds code of its own"
    assert len(scripts()) > 10


def reached(start: str) -> set[str]:
    """Modules of the package that are imported, at once, with one of them."""
    found, queue = set(), [start]
    while queue:
        name = queue.pop()
        base = ROOT.joinpath(*name.split("."))
        path = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
        if name in found or not path.is_file():
            continue
        found.add(name)
        queue += [".".join(name.split(".")[:end]) for end in range(1, name.count(".") + 1)]
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import):
                queue += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                queue += [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


def test_commands_know_all_methods() -> None:
    """A command that reads a configuration or a checkpoint has imported `methods`, which registers them."""
    for path in scripts():
        (command,) = imported(path) - {"sys"}
        modules = reached(command)
        reads = {f"{PACKAGE}.config.command_line", f"{PACKAGE}.checkpoint.weights"} & modules
        assert f"{PACKAGE}.methods" in modules or not reads, f"{path} does not import the methods"


def test_no_module_imports_a_script() -> None:
    """By its place, or by its name from its own folder; nor does anything change where Python looks for modules."""
    stems = {path.stem for path in scripts()} | {"launch", "tools"}
    for path in sources():
        wrong = [name for name in imported(path) if name.split(".")[0] in stems]
        assert not wrong, f"{path} imports {wrong}"
        text = path.read_text(encoding="utf-8")
        assert "tests" in path.parts or "sys.path" not in text, f"{path} changes sys.path"


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
    starts = ("start_distributed(device, timeout", "join_ranks(")
    texts = {path: path.read_text(encoding="utf-8") for path in sources() if "tests" not in path.parts}
    found = {
        path.name: "the_door(" in text
        for path, text in texts.items()
        if "def main(" in text and any(word in text for word in starts)
    }
    assert {"pretrain.py", "switching.py"} <= set(found)
    assert all(found.values()), found


@pytest.mark.parametrize(
    ("what", "place"),
    [
        (r"\bfcntl\b", "disk.py"),
        (r"/proc/cpuinfo|platform\.(platform|processor|machine)\(", "run/machine.py"),
        (r"\"head_\{|head_\\+d|head_\[0-9\]|\"head_\"", "distributed/head_names.py"),
    ],
)
def test_is_written_once(what: str, place: str) -> None:
    """Locks, facts of the machine, names of heads."""
    found = [
        path for path in sources() if "tests" not in path.parts and re.search(what, path.read_text(), re.MULTILINE)
    ]
    assert found == [ROOT / PACKAGE / place]


def test_every_test_folder_is_collected(pytestconfig: pytest.Config) -> None:
    """pytest by default passes over folders named `dist`, silently."""
    patterns = pytestconfig.getini("norecursedirs")
    folders = [path for path in (ROOT / "tests").iterdir() if path.is_dir() and list(path.glob("test_*.py"))]
    assert {"unit", "dist", "numerics", "system"} <= {folder.name for folder in folders}
    assert not [folder.name for folder in folders for pattern in patterns if fnmatch(folder.name, pattern)]
