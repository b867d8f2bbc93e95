"""Every command of README and docs/ is understood by the program that it starts: parsed by that program's own parser.

`tests/system/test_docs_commands.py` runs those that no marker keeps from it.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from megatron_switchlora.cli.main import COMMANDS
from megatron_switchlora.config.command_line import parse_arguments
from tests.pages import MARKERS, ROOT, Command, blocks, commands, pages

PRETRAIN = ("launch/pretrain.py", "launch/slurm/pretrain.sbatch", "launch/mpi/pretrain.sh")
LAUNCHERS = {"deepspeed", "mpirun", "python", "sbatch", "srun", "torchrun"}
# Programs of others, whose words are not looked at.
OTHERS = {"cd", "docker", "export", "git", "mkdir", "pip", "pre-commit", "scancel", "scontrol", "sh", "squeue"}


def all_commands() -> list[Command]:
    return [command for page in pages() for block in blocks(page, "bash") for command in commands(block)]


class ParsedError(BaseException):
    """Ends a program once its parser has accepted its words; `rest` are those it leaves to launch/pretrain.py."""

    def __init__(self, rest: Sequence[str]) -> None:
        self.rest = list(rest)


@contextmanager
def only_parse() -> Iterator[None]:
    """Let the outermost parse of argparse end the program."""
    depth = 0

    def ending(parse: Callable[..., Any], rest_of: Callable[[Any], Sequence[str]]) -> Callable[..., Any]:
        def wrapped(parser: argparse.ArgumentParser, *given: Any, **named: Any) -> Any:
            nonlocal depth
            depth += 1
            try:
                result = parse(parser, *given, **named)
            finally:
                depth -= 1
            if depth == 0:
                raise ParsedError(rest_of(result))
            return result

        return wrapped

    whole, known = argparse.ArgumentParser.parse_args, argparse.ArgumentParser.parse_known_args
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(argparse.ArgumentParser, "parse_args", ending(whole, lambda result: ()))
        patched.setattr(argparse.ArgumentParser, "parse_known_args", ending(known, lambda result: result[1]))
        yield


@pytest.mark.parametrize("command", all_commands(), ids=str)
def test_commands_parse(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", sys.argv)  # which `switchlora` changes
    words = [word for word in command.words if word != "..."]
    script = next((word for word in words if re.fullmatch(r"(?:launch|tools)/[\w/]+\.\w+", word)), None)
    if script is not None:
        assert Path(script).is_file() and words[0] in {*LAUNCHERS, script}
        check_script(script, words[words.index(script) + 1 :])
    elif words[0] == "switchlora":
        check_subcommand(words[1:])
    elif words[:2] == ["python", "-m"]:
        assert importlib.util.find_spec(words[2]) is not None
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", Path("Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    else:
        assert os.path.basename(words[0]) in OTHERS, "a program that no test knows"


def check_script(script: str, words: list[str]) -> None:
    if script in PRETRAIN:
        check_run(words)
        return
    module = re.findall(r"from (megatron_switchlora[\w.]+) import main", Path(script).read_text(encoding="utf-8"))
    check_main(importlib.import_module(module[0]).main, words)


def check_subcommand(words: list[str]) -> None:
    assert words[0] in COMMANDS or words[0].startswith("--")
    if words[0] == "pretrain":
        check_run(words[1:])
    elif words[0] in COMMANDS:
        check_main(importlib.import_module(COMMANDS[words[0]][0]).main, words[1:])


def check_main(main: Callable[[list[str]], object], words: list[str]) -> None:
    with pytest.raises(ParsedError) as parsed, only_parse():
        main(words)
    check_options(parsed.value.rest)


def check_run(words: list[str]) -> None:
    """Check the words of launch/pretrain.py, but for those that its scripts take themselves."""
    start = next((number for number, word in enumerate(words) if word.startswith("--")), len(words))
    words = words[start:]
    if words[:1] == ["--sweep"]:
        words = words[2:]
    if words[:1] in (["--help"], ["--print_config"]):
        return
    check_options(words)


def check_options(words: list[str]) -> None:
    """Read options as a run does, with its rules. A YAML of the reader's own is left out."""
    kept: list[str] = []
    rest = iter(words)
    for word in rest:
        if word == "--config":
            path = next(rest, None)
            if path is not None and (not path.endswith(".yaml") or re.match(r"(?:launch|tools|docs|examples)/", path)):
                kept += [word, path]
        else:
            kept.append(word)
    parse_arguments(kept)


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.stem)
def test_commands_are_fenced_as_such(page: Path) -> None:
    """No command hides from these tests in a block of another kind."""
    texts = [block.text.split() for kind in ("", "text", "sh", "shell", "console") for block in blocks(page, kind)]
    assert not [words for words in texts if {"$", *LAUNCHERS, "switchlora", "make", "pip"} & set(words[:1])]


def test_blocks_of_commands_are_marked_or_run() -> None:
    """A block that no marker keeps from it runs: most do not need one."""
    found = [block for page in pages() for block in blocks(page, "bash")]
    assert {block.marker for block in found} <= {"", *MARKERS}
    assert sum(block.marker == "" for block in found) >= 10
