"""The help of `launch/pretrain.py`: short by default, every option with `--help all`.

An option's text is the docstring under its field. Text that depends on the registered methods is added here.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Optional

from megatron_switchlora.config.errors import UserError
from megatron_switchlora.config.facts import walk
from megatron_switchlora.config.method import METHODS, make_method
from megatron_switchlora.config.run import RunConfig, run_config_class

DESCRIPTION = "Pre-train a LLaMA under DeepSpeed, full-rank or with low-rank training."
WIDTH = 100
MODES = {
    "--config FILE": "YAML with these options, in sections; options on the command line override it.",
    "--ds_config FILE": "DeepSpeed's JSON; by default ZeRO stage 1.",
    "--dry_run": "Print mesh, parameters, memory and gradient bytes of this run and stop.",
    "--print_config": "Print the whole configuration of this run as YAML and stop.",
    "--evaluate_only": "Evaluate the finished run in --output_dir and stop.",
    "--prepare_only": "Tokenise the data into the cache and stop.",
}


def wanted_help(words: Sequence[str]) -> Optional[str]:
    """Return "short" or "all" where the command line asks for help, else None.

    Raises:
        UserError: it asks for help on something else.
    """
    for word, following in itertools.zip_longest(words, words[1:], fillvalue=""):
        option, equals, value = word.partition("=")
        if option in ("--help", "-h"):
            topic = value if equals else "" if following.startswith("-") else following
            if topic in ("", "all"):
                return topic or "short"
            raise UserError(f"{option} takes nothing or 'all', not {topic!r}: --help all explains every option.")
    return None


def added_help() -> dict[str, str]:
    """Return what the registered methods add to the help of options, by dotted name."""
    rates = {name: RunConfig(method=make_method(name)).lr for name in METHODS}
    return {
        "method.name": "; ".join(f"{name}: {facts.about}" for name, facts in METHODS.items()) + ".",
        "optim.lr": "; ".join(f"{name} {rate:g}" for name, rate in rates.items()) + ".",
    }


def option_docs(kind: type) -> dict[str, str]:
    """Return the docstring under each field of a dataclass, inherited fields included."""
    docs: dict[str, str] = {}
    for each in reversed(kind.__mro__):
        if not is_dataclass(each) or each.__module__ == "types":  # those made of registered sections have no source
            continue
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(each))).body
        assert isinstance(body, ast.ClassDef)
        for node, below in zip(body.body, body.body[1:], strict=False):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and _is_text(below):
                docs[node.target.id] = inspect.cleandoc(ast.literal_eval(below.value))  # type: ignore[attr-defined]
    return docs


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def short_help() -> str:
    """Return the sections, the options to start with, and the hint at `--help all`."""
    config: Any = run_config_class()()
    sections = [(each.name, getattr(config, each.name)) for each in fields(config)]
    sections = [(name, section) for name, section in sections if is_dataclass(section)]
    listed = {
        name: f"{_first_sentence(section)} ({sum(1 for _ in walk(section))} options)" for name, section in sections
    }
    docs = option_docs(type(config))
    docs |= {f"{name}.{key}": text for name, section in sections for key, text in option_docs(type(section)).items()}
    added, basic = added_help(), {}
    for name, each, default in walk(config):
        if each.metadata["basic"]:
            shown = "" if default is None else f" Default: {default}."
            basic[f"--{name}"] = f"{' '.join(docs[name].split())} {added.get(name, '')}".strip() + shown
    return "\n".join(
        [
            "usage: switchlora pretrain [--config FILE] [--ds_config FILE] [--SECTION.OPTION VALUE ...]",
            "",
            DESCRIPTION,
            "",
            *_rows("Sections of options:", listed),
            *_rows("The options to start with:", basic),
            *_rows("Files, and what to do instead of training:", MODES),
            "--help all explains every option.",
        ]
    )


def _first_sentence(section: Any) -> str:
    return " ".join((type(section).__doc__ or "").split()).partition(". ")[0].rstrip(".") + "."


def _rows(title: str, rows: dict[str, str]) -> list[str]:
    lines, column = [title], 2 + max(len(name) for name in rows) + 2
    for name, text in rows.items():
        first, *more = textwrap.wrap(text, WIDTH - column)
        lines += [f"  {name:<{column - 2}}{first}", *(" " * column + line for line in more)]
    return [*lines, ""]
