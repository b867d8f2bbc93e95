"""What --help prints: the options to start with, or all; methods from the registry."""

from __future__ import annotations

import pytest

from megatron_switchlora.config import command_line
from megatron_switchlora.config.command_line import parse_arguments
from megatron_switchlora.config.errors import UserError
from megatron_switchlora.config.facts import names_where, walk
from megatron_switchlora.config.field_checks import sections
from megatron_switchlora.config.method import METHODS
from megatron_switchlora.config.run import run_config_class


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as end:
        parse_arguments(words)
    assert end.value.code == 0
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["--train.steps", "3", "--help", "--dry_run"]])
def test_short_help(words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The ten options and all sections; the parser of all options, which takes a second, is not built."""
    monkeypatch.setattr(command_line, "build_parser", lambda: pytest.fail("the parser was built"))
    text = printed(capsys, *words)
    config = run_config_class()()
    basic = names_where(config, lambda facts: facts["basic"])
    assert len(basic) == 10
    for name, _, _ in walk(config):
        assert (f" --{name} " in text) == (name in basic), name
    assert all(f" {name} " in text for name in sections() if "." not in name)
    assert "Samples per step, over all ranks and accumulation. Default: 32." in text
    assert "--help all explains every option" in text


@pytest.mark.parametrize("words", [["--help", "all"], ["--help=all"], ["-h", "all"]])
def test_all_options(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, *words)
    assert [name for name, _, _ in walk(run_config_class()()) if text.count(f"--{name} ") < 2] == []
    assert "Seed of initial values, data order and switching draws. (type: int, default: 0)" in text


@pytest.mark.parametrize("words", [["--help"], ["--help", "all"]])
def test_every_method_is_described(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, *words)
    assert all(f"{name}: {facts.about}" in text for name, facts in METHODS.items())


def test_help_on_something_else_is_refused() -> None:
    with pytest.raises(UserError, match=r"takes nothing or 'all', not 'optim\.lr'"):
        parse_arguments(["--help", "optim.lr"])
