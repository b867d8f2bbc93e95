"""Check that every field of the run configuration has a value of its annotated type.

`fit` takes a value from a YAML file, and `fit_word` a word of the command line. `check_fields` checks a configuration
that a program made; it is the first step of rules.py. Only optional fields may be null. Numbers must be finite and fit
in 64 bits, and choices must be among those of the field. Fields whose metadata have `path` are files or folders: a
leading ~ in them is expanded.
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
    bool: "true or false", int: "a whole number", float: "a number", str: "a string", list[str]: "a list of strings",
    dict[str, Any]: "a section with fields", type(None): "null",
}  # fmt: skip


LARGEST = 3.4e38  # of fp32, in which most numbers are used


def field_types() -> dict[str, Any]:
    """Return the annotated type of every option by its dotted name, those of nested sections included."""
    return _field_types(run_config_class(), "")  # type: ignore[arg-type]


@cache
def _field_types(kind: type, prefix: str) -> dict[str, Any]:
    types: dict[str, Any] = {}
    for name, hint in get_type_hints(kind).items():
        inside = is_dataclass(hint)
        types |= _field_types(hint, f"{prefix}{name}.") if inside else {prefix + name: hint}
    return types


def sections() -> frozenset[str]:
    """Return the dotted names of the sections, which hold options."""
    return _sections(run_config_class(), "")  # type: ignore[arg-type]


@cache
def _sections(kind: type, prefix: str) -> frozenset[str]:
    names: set[str] = set()
    for name, hint in get_type_hints(kind).items():
        if is_dataclass(hint):
            names |= {prefix + name} | _sections(hint, f"{prefix}{name}.")  # type: ignore[arg-type]
    return frozenset(names)


def takes_text(name: str) -> bool:
    """Return whether an option's value may be any text."""
    return str in _alternatives(field_types().get(name))


def fit(name: str, value: Any, hint: Any) -> Any:
    """Return `value` as the type that `hint` annotates.

    A whole number becomes a number where one is expected. A text is read as YAML where no text is expected.

    Raises:
        UserError: the value has another type, or is no finite number.
    """
    kinds, given = _alternatives(hint), value
    if isinstance(value, str) and str not in kinds and value not in _choices(hint):
        value = read_word(value)
    for kind in kinds:
        if _is_of(value, kind):
            return _number(name, value, kind)
    raise UserError(f"{name} must be {_described(hint)}, not {_shown(value and given)}{_advice(value, kinds)}.")


def fit_word(name: str, word: str, hint: Any) -> Any:
    """Return the value of a word of the command line, as the type that `hint` annotates.

    A text arrives as it was typed, except for null where a field is optional.

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
    """Return the value that a text has as YAML, or the text itself where it is no YAML."""
    try:
        return yaml.load(text, Loader=loader) if loader else load_yaml(text)
    except (ValueError, yaml.YAMLError, RecursionError):
        return text


def number_from(least: float, kind: Any = int) -> Callable[[str], Any]:
    """Return a type for argparse: a number of the configuration's kind, not below `least`."""

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
    """Check that every field of the configuration has a value of its type.

    Raises:
        UserError: a field has not.
    """
    types = field_types()
    for owner, entry, name in _entries(config):
        value = getattr(owner, entry.name)
        fit(name, value, types[name])
        empty = entry.metadata.get("path") and "" in (value if isinstance(value, list) else [value])
        require(not empty, f"{name} is empty: give a path, or leave it out.")


def expand_paths(config: RunConfig) -> None:
    """Expand the leading ~ of every path, in place.

    Raises:
        UserError: ~ stands for an unknown home folder.
    """
    for owner, entry, name in _entries(config):
        value = getattr(owner, entry.name)
        if entry.metadata.get("path") and isinstance(value, list):
            setattr(owner, entry.name, [expanded(name, text) for text in value])
        elif entry.metadata.get("path") and value is not None:
            setattr(owner, entry.name, expanded(name, value))


def expanded(name: str, text: str) -> str:
    """Return a path with its leading ~ expanded.

    Raises:
        UserError: ~ stands for an unknown home folder.
    """
    if not text.startswith("~"):
        return text  # not through Path, which would take ./ and // out of patterns and names
    try:
        return str(user_path(text))
    except ValueError as error:
        raise UserError(f"{name}: {error}.") from None


def _entries(config: RunConfig) -> Iterator[tuple[Any, Field, str]]:
    """Yield every option's section, field and dotted name."""
    return _entries_below(config, "", sections())


def _entries_below(section: Any, prefix: str, inner: frozenset[str]) -> Iterator[tuple[Any, Field, str]]:
    for entry in fields(section):
        value, name = getattr(section, entry.name), prefix + entry.name
        if name in inner:
            if not is_dataclass(value):
                raise UserError(f"{name} must be a section with fields, not {_shown(value)}.")
            yield from _entries_below(value, f"{name}.", inner)
        else:
            yield section, entry, name


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
    if kind is float and not -LARGEST <= value <= LARGEST:
        raise UserError(f"{name} must be a finite number of 32 bits, not {_shown(value)}.")
    if kind is int and not -(2**63) <= value < 2**63:
        raise UserError(f"{name} must be a whole number of 64 bits, not {_shown(value)}.")
    return float(value) if kind is float else value


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
