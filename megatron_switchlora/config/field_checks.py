"""Every field of the run configuration has a value of its type: checked from the dataclasses' annotations alone.

A value may come from a file, as YAML has read it (`fit`), from a word of the command line (`fit_word`), or stand in a
configuration that a program made (`check_fields`, with which rules.py begins). null is a value only of fields that may
be left out; numbers are finite and fit in 64 bits; choices are among those that the field names. Fields whose metadata
say `path` are files or folders: a leading ~ in them is expanded.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import Field, fields, is_dataclass
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from megatron_switchlora.config.errors import UserError, require
from megatron_switchlora.config.run import RunConfig, run_config_class
from megatron_switchlora.config.yaml_text import load_yaml
from megatron_switchlora.disk import user_path

WORDS = {
    bool: "true or false", int: "a whole number", float: "a number", str: "a text", list[str]: "a list of texts",
    dict[str, Any]: "a section with fields", type(None): "null",
}  # fmt: skip


LARGEST = 3.4e38  # in fp32, in which most numbers end


def field_types() -> dict[str, Any]:
    """The annotated type of every option by its dotted name, sections inside sections too."""
    return _field_types(run_config_class(), "")  # type: ignore[arg-type]


@cache
def _field_types(kind: type, prefix: str) -> dict[str, Any]:
    types: dict[str, Any] = {}
    for name, hint in get_type_hints(kind).items():
        inside = is_dataclass(hint)
        types |= _field_types(hint, f"{prefix}{name}.") if inside else {prefix + name: hint}
    return types


def sections() -> frozenset[str]:
    """The dotted names of what holds options and is none itself."""
    return _sections(run_config_class(), "")  # type: ignore[arg-type]


@cache
def _sections(kind: type, prefix: str) -> frozenset[str]:
    names: set[str] = set()
    for name, hint in get_type_hints(kind).items():
        if is_dataclass(hint):
            names |= {prefix + name} | _sections(hint, f"{prefix}{name}.")  # type: ignore[arg-type]
    return frozenset(names)


def takes_text(name: str) -> bool:
    """Whether an option's value may be a text of any kind."""
    return str in _alternatives(field_types().get(name))


def fit(name: str, value: Any, hint: Any) -> Any:
    """`value` as the type that `hint` annotates: a whole number where a number is asked for becomes one, a text where
    none is asked for is read as YAML.

    Raises:
        UserError: it is of no such type, or no finite number.
    """
    kinds, given = _alternatives(hint), value
    if isinstance(value, str) and str not in kinds and value not in _choices(hint):
        value = read_word(value)
    for kind in kinds:
        if _is_of(value, kind):
            return _number(name, value, kind)
    raise UserError(f"{name} must be {_described(hint)}, not {_shown(value and given)}{_advice(value, kinds)}.")


def fit_word(name: str, word: str, hint: Any) -> Any:
    """What a word of the command line says: a text arrives as it was typed, but for null where a field may be left out.

    Raises:
        UserError: as `fit`.
    """
    kinds = _alternatives(hint)
    if word == "null" and type(None) in kinds:
        return None
    if list[str] in kinds and word.startswith("["):
        return fit(name, read_word(word, yaml.BaseLoader), hint)
    return fit(name, word, hint)


def read_word(text: str, loader: Any = None) -> Any:
    """The value that a text is as YAML, and the text itself where it is none."""
    try:
        return yaml.load(text, Loader=loader) if loader else load_yaml(text)
    except (ValueError, yaml.YAMLError, RecursionError):
        return text


def number_from(least: float, kind: Any = int) -> Callable[[str], Any]:
    """The type of a program's own option, for argparse: a number of the configuration's kind, not below `least`."""

    def read(word: str) -> Any:
        try:
            value = fit_word("it", word, kind)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error).removesuffix(".")) from None
        if value < least:
            raise argparse.ArgumentTypeError(f"it must be at least {least}, not {word}")
        return value

    return read


def check_fields(config: RunConfig) -> None:
    """Raises: UserError, unless every field of the configuration has a value of its type."""
    for owner, entry, name in _entries(config):
        value = getattr(owner, entry.name)
        fit(name, value, field_types()[name])
        empty = entry.metadata.get("path") and "" in (value if isinstance(value, list) else [value])
        require(not empty, f"{name} is empty: give a path, or leave it out.")


def expand_paths(config: RunConfig) -> None:
    """Expand the leading ~ of every path, in place.

    Raises:
        UserError: of a home folder that is not known.
    """
    for owner, entry, name in _entries(config):
        value = getattr(owner, entry.name)
        if entry.metadata.get("path") and isinstance(value, list):
            setattr(owner, entry.name, [expanded(name, text) for text in value])
        elif entry.metadata.get("path") and value is not None:
            setattr(owner, entry.name, expanded(name, value))


def expanded(name: str, text: str) -> str:
    """Raises: UserError, if ~ stands for a home folder that is not known."""
    if not text.startswith("~"):
        return text  # not through Path, which would take ./ and // out of patterns and names
    try:
        return str(user_path(text))
    except ValueError as error:
        raise UserError(f"{name}: {error}.") from None


def _entries(config: Any, prefix: str = "") -> Iterator[tuple[Any, Field, str]]:
    """Every option's section, field and dotted name."""
    for entry in fields(config):
        value, name = getattr(config, entry.name), prefix + entry.name
        if name in sections():
            require(is_dataclass(value), f"{name} must be a section with fields, not {_shown(value)}.")
            yield from _entries(value, f"{name}.")
        else:
            yield config, entry, name


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) is Union else (hint,)


def _choices(hint: Any) -> list[str]:
    return [choice for kind in _alternatives(hint) if get_origin(kind) is Literal for choice in get_args(kind)]


def _is_of(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if kind == list[str]:
        return isinstance(value, list) and all(_is_of(item, str) for item in value)
    if kind is str:
        return isinstance(value, str) and "\0" not in value
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, get_origin(kind) or kind) and (kind is bool or not isinstance(value, bool))


def _number(name: str, value: Any, kind: Any) -> Any:
    if kind is float:
        require(-LARGEST <= value <= LARGEST, f"{name} must be a finite number of 32 bits, not {_shown(value)}.")
        return float(value)
    if kind is int:
        require(-(2**63) <= value < 2**63, f"{name} must be a whole number of 64 bits, not {_shown(value)}.")
    return value


def _described(hint: Any) -> str:
    words = [w for k in _alternatives(hint) for w in (get_args(k) if get_origin(k) is Literal else (WORDS[k],))]
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _shown(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _advice(value: Any, kinds: tuple[Any, ...]) -> str:
    if str in kinds and isinstance(value, (int, float)):
        return ": put it in quotes"
    if list[str] in kinds and isinstance(value, list):
        return ": put each in quotes"
    return ": give a value, or leave the line out" if value is None else ""
