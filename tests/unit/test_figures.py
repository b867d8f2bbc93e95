"""Plots and other decorations: whatever happens to them, the work goes on and says so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from megatron_switchlora.run.figures import decorating, new_figure, save_figure
from megatron_switchlora.run.folder import RunFolder
from tests.dist.launch import REPOSITORY
from tests.unit.test_structure import sources

PNG = b"\x89PNG\r\n\x1a\n"
ODD_NAMES = ["$5_b_$6", r"\frac{", "caf\udce9", "100%_^", "名"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_run_of_any_name_is_drawn(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / name).mkdir()
    run = RunFolder(tmp_path / name, writes=True)
    for step in (1, 2):
        run.log({"step": step, "loss": 3.0 / step})
    run.plot()
    assert (tmp_path / name / "loss.png").read_bytes()[:8] == PNG and "warning" not in capsys.readouterr().out


def test_names_are_no_mathematics_and_powers_of_ten_are(tmp_path: Path) -> None:
    figure = new_figure(3, 2)
    axes = figure.add_subplot()
    axes.plot([1, 10], [1, 1000], label="$x_{$")
    axes.set(title="$a_$", xlabel="$b_$", ylabel="$c_$", yscale="log")
    figure.suptitle("$d_$")
    save_figure(figure, tmp_path / "a.png")
    ticks = [tick for tick in axes.get_yticklabels() if tick.get_text()]
    assert ticks and all(tick.get_parse_math() for tick in ticks)


def test_a_backend_that_is_not_installed_is_not_asked_for(tmp_path: Path) -> None:
    """In a process of its own: matplotlib looks at it when it is imported."""
    code = (
        "from megatron_switchlora.run.figures import *; save_figure(new_figure(2, 2), Path('a.png')); print(os.environ)"
    )
    env = {**os.environ, "MPLBACKEND": "module://nowhere.backend", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "module://nowhere.backend" in done.stdout, done.stderr
    assert (tmp_path / "a.png").read_bytes()[:8] == PNG


def test_figures_are_made_in_one_place() -> None:
    words = ("FigureCanvasAgg", "import Figure\n", "pyplot", "savefig(")
    users = {path.name: [word for word in words if word in path.read_text()] for path in sources()}
    found = {name for name, used in users.items() if used and not name.startswith("test_")}
    assert found == {"figures.py", "plots.py", "step_figure.py", "preload.py"}
    assert users["plots.py"] == ["import Figure\n"]  # its type
    assert users["step_figure.py"] == users["preload.py"] == ["savefig("]  # of a figure that figures.py has made


def test_a_failing_plot_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder(tmp_path, writes=True)
    run.log({"step": 1, "loss": 3.0})

    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no\nfont")

    monkeypatch.setattr(Figure, "savefig", fail)
    run.plot()
    said = capsys.readouterr().out
    assert said == "warning: drawing loss.png failed (RuntimeError: no font); nothing else depends on it.\n"
    assert not list(tmp_path.glob("*.png")) and not list(tmp_path.glob(".loss*"))


def test_a_plot_is_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "theirs").write_text("private")
    (tmp_path / "loss.png").symlink_to(tmp_path / "theirs")
    save_figure(new_figure(2, 2), tmp_path / "loss.png")
    assert (tmp_path / "theirs").read_text() == "private" and not (tmp_path / "loss.png").is_symlink()


def test_only_errors_are_decorations_and_no_request_to_stop() -> None:
    with pytest.raises(KeyboardInterrupt), decorating("it"):
        raise KeyboardInterrupt


OUTLIVE = """
import sys
from megatron_switchlora.run.figures import outlive_terminal
outlive_terminal()
for number in range(20000):
    print("line", number, "caf\\udce9")
print("error: at its end", file=sys.stderr)
sys.stdout.flush()
open("done", "w").close()
"""


@pytest.mark.parametrize("target", ["| head -1", "> /dev/full", ">&-", "> file"])
def test_output_that_nobody_takes_ends_nothing(tmp_path: Path, target: str) -> None:
    """`run | head`, a log on a full disk, no output at all, and a name that is not UTF-8 among the words."""
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHON": sys.executable, "CODE": OUTLIVE}
    line = f'set -o pipefail; "$PYTHON" -c "$CODE" {target}'
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and (tmp_path / "done").exists(), done.stderr
    assert done.stderr == "error: at its end\n"
    if target == "> file":
        assert (tmp_path / "file").read_text().splitlines()[-1] == r"line 19999 caf\udce9"
