"""Write docs/options.md from the dataclasses of the run configuration: `python -m docs.option_reference`.

The page is committed, so that it can be read on GitHub. `tests/unit/test_docs_pages.py` compares it with what this
writes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from megatron_switchlora import methods, model  # noqa: F401  # fill the tables
from megatron_switchlora.config.field_checks import WORDS, field_types
from megatron_switchlora.config.help_text import added_help, option_docs
from megatron_switchlora.config.method import METHODS, all_sections, make_method
from megatron_switchlora.config.run import run_config_class

PAGE = Path(__file__).with_name("options.md")
INTRODUCTION = """\
# All options

<!-- Written by `python -m docs.option_reference`. Change the docstrings of the options instead. -->

Every option of a run, section by section. Give it on the command line (`--optim.lr 0.02`) or in a YAML file
([Configuration](configuration.md)). `switchlora pretrain --help all` prints the same texts.

The line under an option has three facts:

- **Type and default.** `null` stands for "left out": then the text names what counts instead.
- **Resume.** Whether a resumed run may change it: *yes*, *if allowed* (`checkpoint.allow_changes` must list it), or
  *no*. `data` options may change as long as the tokens stay the same; another text needs `data` in that list.
- **Read by.** Which methods read it. Options outside `method` are read by all of them, but for two:
  `optim.lora_plus_ratio` needs adapters, and `parallel.lte_heads` needs `method.name lte`.
"""
# Names of options and what else one types, by their form.
SECTIONS = "|".join(each.name for each in fields(run_config_class()) if each.name not in ("resume", "plugins"))
PATH, FLAG, OBJECT, PATTERN = r"\w+/[\w/]+\.\w+", r"--\w[\w.]*", r"\{.*?\}", r"\w+\.\*"
NAME, FOLDER = rf"\b(?:{SECTIONS})(?:\.\w+)+|\b[a-z]\w*_\w+", r"[\w~/]+<\w+>[\w<>-]*"
CODE = re.compile("|".join((PATH, FLAG, OBJECT, PATTERN, NAME, FOLDER)).join("()"))
RESUME = {"free": "yes", "ask": "if allowed", "never": "no"}


def write_reference() -> str:
    """Return the page."""
    config: Any = run_config_class()()
    added, top = added_help(), option_docs(type(config))
    parts = [INTRODUCTION]
    for name, section in _sections(config):
        parts.append(f"## `{name}`\n\n{_paragraph(type(section).__doc__ or '')}\n")
        docs = option_docs(type(section))
        parts += [
            _entry(f"{name}.{each.name}", each, getattr(section, each.name), docs[each.name], added)
            for each in fields(section)
            if not is_dataclass(getattr(section, each.name))
        ]
    parts.append("## Of the run itself\n")
    parts += [
        _entry(each.name, each, getattr(config, each.name), top[each.name], added)
        for each in fields(config)
        if not is_dataclass(getattr(config, each.name))
    ]
    return "\n".join(parts)


def _sections(owner: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, section) of every section, those inside a section behind it."""
    for each in fields(owner):
        section = getattr(owner, each.name)
        if is_dataclass(section):
            yield f"{prefix}{each.name}", section
            yield from _sections(section, f"{prefix}{each.name}.")


def _entry(name: str, each: Field[Any], default: Any, doc: str, added: dict[str, str]) -> str:
    facts = [f"{_kind(field_types()[name])}, default `{_shown(default)}`", f"resume: {_resume(name, each)}"]
    if name.startswith("method."):
        facts.append(f"read by {_readers(name.split('.')[1])}")
    text = f"{_paragraph(doc)} {_paragraph(added.get(name, ''))}".strip()
    return f"### `{name}`\n\n{' · '.join(facts)}\n\n{text}\n"


def _resume(name: str, each: Field[Any]) -> str:
    """Return whether a resumed run may change an option, by its own facts or by those of a method."""
    allowing = [f"`{method}`" for method in METHODS if name in make_method(method).facts.may_change]
    return f"yes, with {', '.join(allowing)}" if allowing else RESUME[each.metadata["resume"]]


def _readers(entry: str) -> str:
    """Return the methods that read an option or a section below `method`."""
    own = all_sections()
    names = [name for name, facts in METHODS.items() if entry in (facts.sections if entry in own else facts.reads)]
    if names:
        return ", ".join(f"`{name}`" for name in names)
    return "all but `full`" if entry.startswith("full_rank_") else "all"


def _kind(hint: Any) -> str:
    """Return a type in words: "a number or null"."""
    kinds = get_args(hint) if get_origin(hint) is Union else (hint,)
    words = [
        word
        for kind in kinds
        for word in ([f"`{each}`" for each in get_args(kind)] if get_origin(kind) is Literal else [WORDS[kind]])
    ]
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _shown(value: Any) -> str:
    """Return a value as one types it."""
    return value if isinstance(value, str) else json.dumps(value)


def _paragraph(text: str) -> str:
    """Return a docstring as one line of Markdown: what looks like a name is code, and nothing else is markup."""
    parts = CODE.split(" ".join(text.split()))  # the odd ones are what CODE found
    return "".join(
        f"`{part}`" if odd % 2 else re.sub(r"([\\*_\[\]<|`])", r"\\\1", part) for odd, part in enumerate(parts)
    )


if __name__ == "__main__":
    PAGE.write_text(write_reference(), encoding="utf-8")
