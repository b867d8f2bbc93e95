"""Every option says what is known of it; what lists of options were kept for is derived from that."""

from __future__ import annotations

import importlib
import importlib.machinery
import json
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file

from megatron_switchlora.checkpoint.files import open_checkpoint, seal
from megatron_switchlora.checkpoint.weights import Weights
from megatron_switchlora.config.command_line import parse_arguments
from megatron_switchlora.config.errors import UserError
from megatron_switchlora.config.facts import names_where, walk
from megatron_switchlora.config.method import METHODS, all_sections
from megatron_switchlora.config.plugins import load_plugins
from megatron_switchlora.config.run import run_config_class

OPTIONS = {name: each.metadata for name, each, _ in walk(run_config_class()())}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_has_its_facts(name: str) -> None:
    facts = OPTIONS[name]
    assert set(facts) == {"resume", "results", "path", "swept", "basic"}
    assert facts["resume"] in ("free", "ask", "never")
    assert not (facts["resume"] == "never" and not facts["results"]), "what changes no result may change freely"


def test_facts_that_were_lists() -> None:
    config = run_config_class()()
    asks = names_where(config, lambda facts: facts["resume"] == "ask")
    assert {"optim.lr", "train.steps", "method.switch.interval0"} <= set(asks) and "train.seed" not in asks
    neutral = names_where(config, lambda facts: not facts["results"])
    assert {"method.switch.bank_device", "parallel.tp", "data.cache_dir"} <= set(neutral)
    assert not {"parallel.lte_heads", "train.eval_samples", "data.text_field"} & set(neutral)
    swept = names_where(config, lambda facts: facts["swept"])
    assert {"optim.lr", "optim.dense_lr", "train.seed", "output_dir", "resume"} <= set(swept)


def test_every_method_says_what_it_reads() -> None:
    shared = {name.split(".")[1] for name in OPTIONS if name.startswith("method.")} - set(all_sections())
    for name, facts in METHODS.items():
        assert facts.name == name and facts.about
        assert facts.reads <= shared
        assert bool(facts.inits) == facts.adapts == ("init" in facts.reads)
    read = {section for facts in METHODS.values() for section in facts.sections}
    assert read == set(all_sections())


@pytest.mark.parametrize("name", ["this", "antigravity", "os.path", "no_such_module", "../x", "tests.no_such", "a..b"])
def test_what_is_no_plugin_is_not_imported(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="plugins"):
        load_plugins([name])
    assert capsys.readouterr().out == ""  # importing `this` prints a poem


@pytest.mark.parametrize(("line", "error"), [("1 / 0", "ZeroDivisionError"), ("raise SystemExit(0)", "SystemExit")])
def test_a_plugin_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, error: str) -> None:
    """A script without a guard would end the run as if its work were done."""
    (tmp_path / "broken_method.py").write_text(f"import megatron_switchlora\n{line}\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    with pytest.raises(UserError, match=rf"broken_method fails at import \({error}"):
        load_plugins(["broken_method"])


def test_a_plugin_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder_method.py").mkdir()
    found = importlib.machinery.ModuleSpec("folder_method", None, origin=str(tmp_path / "folder_method.py"))
    monkeypatch.setattr(importlib.machinery.PathFinder, "find_spec", lambda name, path: found)
    with pytest.raises(UserError, match="plugin folder_method cannot be read: Is a directory"):
        load_plugins(["folder_method"])


@pytest.mark.parametrize("name", ["theirs.evil", "theirs", "evil", "theirs.inner"])
def test_what_came_along_with_a_run_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """Whatever is on the path, by a configuration that is kept; what the user names is imported all the same."""
    for file in ("evil.py", "__init__.py", "inner/__init__.py"):
        (tmp_path / "theirs" / file).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "theirs" / file).write_text("import megatron_switchlora\nprint('run')\n")
    if name == "theirs.evil":
        (tmp_path / "theirs" / "__init__.py").unlink()
    run = tmp_path / "theirs" / ("" if name == "evil" else "run")
    monkeypatch.syspath_prepend(tmp_path / "theirs" if name == "evil" else tmp_path)
    importlib.invalidate_caches()
    for module in ("theirs", "theirs.evil", "theirs.inner", "evil"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(UserError, match=f"names the plugin {name}, which came along with it"):
        load_plugins([name], kept_in=run)
    assert capsys.readouterr().out == ""
    load_plugins([name], kept_in=tmp_path / "runs" / "mine")
    assert "run" in capsys.readouterr().out
    load_plugins([name], kept_in=run)  # imported by now


def test_kept_plugins_are_looked_at_where_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a checkpoint's weights, and by a run's configuration."""
    (tmp_path / "came_along.py").write_text("import megatron_switchlora\n1 / 0\n")
    (tmp_path / "config.yaml").write_text("plugins: came_along\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    with pytest.raises(UserError, match="came along with it"):
        parse_arguments(["--config", str(tmp_path / "config.yaml")], kept_in=tmp_path)
    folder = tmp_path / "checkpoints" / "step-00000012"
    folder.mkdir(parents=True)
    state = {"config": {"plugins": ["came_along"]}, "vocab_size": 300}
    (folder / "state.json").write_text(json.dumps(state))
    save_file({}, folder / "tensors-00000.safetensors")
    seal(folder, 12)
    with pytest.raises(UserError, match="came along with it"):
        Weights(open_checkpoint(folder))
