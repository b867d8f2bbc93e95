"""The command line of `launch/pretrain.py`: every field of `RunConfig` is a dotted option.

`--optim.lr 0.02` overrides the YAML of `--config`. The docstring under a field is its help. Files and values are read
here, by the same rules. jsonargparse handles the help, `--print_config`, flags, and words that are no option. It never
gets a file or a section, in which it would look for classes to import. A mistake becomes one `UserError`; for an
unknown key it gives the nearest valid name.
"""

from __future__ import annotations

import contextlib
import difflib
import itertools
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any, NoReturn, Optional, Union

from jsonargparse import (
    ActionConfigFile,
    ArgumentError,
    ArgumentParser,
    Namespace,
    set_dumper,
    set_parsing_settings,
)

from megatron_switchlora.config.errors import UserError, require
from megatron_switchlora.config.field_checks import (
    expand_paths,
    expanded,
    field_types,
    fit,
    fit_word,
    read_word,
    sections,
)
from megatron_switchlora.config.help_text import DESCRIPTION, added_help, short_help, wanted_help
from megatron_switchlora.config.method import METHODS
from megatron_switchlora.config.plugins import listed, load_plugins
from megatron_switchlora.config.rules import validate
from megatron_switchlora.config.run import RunConfig, run_config_class
from megatron_switchlora.config.yaml_text import FORBIDDEN, dump_yaml, read_given_yaml, read_yaml
from megatron_switchlora.disk import shown
from megatron_switchlora.shipped import given_or_shipped


@dataclass(frozen=True)
class Arguments:
    """The parsed command line."""

    config: RunConfig
    ds_config: Optional[str]
    evaluate_only: bool
    dry_run: bool = False
    dry_run_world: Optional[int] = None
    prepare_only: bool = False


def build_parser() -> ArgumentParser:
    """Build the parser, with the sections of all methods that are registered by now."""
    return _parser_of(run_config_class())  # type: ignore[arg-type]


@cache
def _parser_of(kind: type[RunConfig]) -> ArgumentParser:
    """Build the parser for a configuration class; `--print_config` and `--help` come with it.

    It is cached: tools read many configurations, and reading the fields' docstrings takes longer than everything else.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    set_dumper("yaml", dump_yaml)  # --config reads what --print_config writes
    parser = ArgumentParser(
        prog="switchlora pretrain",
        description=DESCRIPTION,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file with the run configuration.")
    parser.add_argument(
        "--ds_config", type=Optional[str], default=None, help="DeepSpeed JSON; by default ZeRO stage 1."
    )
    parser.add_argument(
        "--evaluate_only",
        action="store_true",
        help="Evaluate the finished run in --output_dir and stop; all but the device comes from its config.yaml.",
    )
    parser.add_argument(
        "--prepare_only",
        action="store_true",
        help="Tokenise the data into the cache, where runs find it, and stop: one process, no GPU.",
    )
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="Print mesh, parameters, memory and gradient bytes of this run and stop: needs no GPU and reads no data.",
    )
    parser.add_argument(
        "--dry_run_world",
        type=Optional[int],
        default=None,
        help="Ranks that --dry_run plans for; by default the world's.",
    )
    parser.add_argument(
        "--local_rank", type=int, default=0, help="Set by the deepspeed launcher; the environment decides."
    )
    parser.add_class_arguments(kind)
    added = added_help() | {"help": "--help all prints this, --help alone the options to start with."}
    for action in parser._actions:
        if action.dest in added:
            action.help = f"{'' if action.dest == 'help' else action.help} {added[action.dest]}".strip()
    return parser


def print_help(which: str) -> NoReturn:
    """Print the help that `wanted_help` chose, and exit.

    --help alone builds no parser, which would take a second.
    """
    if which == "all":
        build_parser().print_help()
    else:
        print(short_help())
    sys.exit(0)


def _unknown_name(message: str) -> Optional[str]:
    """Return the option that jsonargparse did not know, from its message."""
    match = re.search(r"nrecognized arguments: --([\w.]+)|Option '([\w.]+)' is not accepted", message)
    return match and (match.group(1) or match.group(2))


def _unknown(name: str) -> UserError:
    near = difflib.get_close_matches(name, sorted(option_types()), n=1, cutoff=0.0)
    return UserError(f"Unknown option or key {name!r}: did you mean {near[0]!r}? --help all lists every option.")


def _explain(error: Exception) -> UserError:
    """Turn jsonargparse's error into a sentence with what to change."""
    message = " ".join(str(error).split())
    name = _unknown_name(message)
    return _unknown(name) if name else UserError(f"The command line is not valid: {message}")


def parse_arguments(argv: Sequence[str], kept_in: Optional[Path] = None) -> Arguments:
    """Parse and validate the command line.

    `kept_in` is the folder of the run or checkpoint that a configuration file belongs to; no plugin beside it is
    imported.

    Raises:
        UserError: unknown keys, wrong types, unreadable files, or a broken rule of `rules.validate`.
    """
    require_utf8(argv)
    files, words = split_config_files(argv)
    load_plugins(named_plugins(files, words), kept_in)
    help_for = wanted_help(words)
    if help_for:
        print_help(help_for)
    given: dict[str, Any] = {}
    for path in files:
        given |= read_options(path)
    others = take_options(words, given)
    config = run_config_class()()
    for name, value in given.items():
        section, _, entry = f"config.{name}".rpartition(".")
        if name in field_types():
            setattr(attrgetter(section)(Namespace(config=config)), entry, value)
    expand_paths(config)
    known = METHODS.get(config.method.name)  # `validate` refuses an unknown one
    rates = {"optim.lr": config.lr, "optim.dense_lr": config.dense_lr} if known else {}
    flags = _parse_flags(given | rates, others)
    config.method.init = config.method.initial  # type: ignore[assignment]  # a run records them
    config.optim.lr, config.optim.dense_lr = config.lr, config.dense_lr
    validate(config)
    check_modes(flags)
    return Arguments(
        config, given.get("ds_config"), flags.evaluate_only, flags.dry_run, flags.dry_run_world, flags.prepare_only
    )


def _parse_flags(given: dict[str, Any], words: Sequence[str]) -> Namespace:
    """Return what the parser makes of the words that are no option with a value: flags, and mistakes."""
    parser, namespace = build_parser(), Namespace()
    for name, value in given.items():  # for --print_config
        namespace[name] = value
    try:
        return parser.parse_args(words, namespace=namespace)
    except (ArgumentError, TypeError, ValueError, OSError) as error:
        vars(parser).pop("print_config", None)  # a --print_config that the mistake has prevented
        raise _explain(error) from None


def require_utf8(words: Sequence[str]) -> None:
    """Require words in UTF-8: the libraries that write our files refuse other bytes.

    Raises:
        UserError: a word holds bytes that are not UTF-8.
    """
    for word in words:
        require(
            word.isascii() or word == shown(word),
            f"{shown(word)!r} on the command line is not UTF-8: give files and folders names that are.",
        )


def check_modes(namespace: Namespace) -> None:
    """Check that the options that replace training fit together.

    Raises:
        UserError: they do not.
    """
    world = namespace.dry_run_world
    require(world is None or world >= 1, f"--dry_run_world must be at least 1, not {world}.")
    require(
        world is None or namespace.dry_run,
        f"--dry_run_world {world} sets the ranks that --dry_run plans for: give --dry_run too, or leave it out.",
    )
    require(
        namespace.dry_run + namespace.evaluate_only + namespace.prepare_only <= 1,
        "--dry_run plans a training run, --evaluate_only evaluates a finished one, and --prepare_only makes the data "
        "ready: give one of them.",
    )


def split_config_files(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the files given with --config, and all other words: options override files wherever they stand."""
    files: list[str] = []
    others: list[str] = []
    words = iter(argv)
    for word in words:
        if word == "--config":
            files.append(next(words, ""))
        elif word.startswith("--config="):
            files.append(word.removeprefix("--config="))
        else:
            others.append(word)
    return files, others


def named_plugins(files: Sequence[str], words: Sequence[str]) -> list[Any]:
    """Return the value of the option `plugins`, which decides which other options exist.

    Mistakes in files are left to `read_options`.
    """
    plugins: list[Any] = []
    for path in files:
        with contextlib.suppress(OSError, ValueError, UserError):
            content = read_yaml(Path(expanded("--config", path)))
            if isinstance(content, dict) and "plugins" in content:
                plugins = listed(content["plugins"])
    for word, following in itertools.zip_longest(words, words[1:], fillvalue=""):
        option, equals, value = word.partition("=")
        if option in ("--plugins", "--plugins+"):
            named = listed(fit_word("plugins", value if equals else following, Union[list[str], str, None]))
            plugins = plugins + named if option.endswith("+") else named
    return plugins


def take_options(words: Sequence[str], given: dict[str, Any]) -> list[str]:
    """Add the values of options to `given`, and return all other words, for the parser.

    Values are read here, not by the parser. So a text arrives as it was typed, and nothing is taken for the name of a
    class to import.

    Raises:
        UserError: a value of the wrong type, or a value for a whole section.
    """
    types, others, rest = option_types(), [], list(words)
    while rest:
        word = rest.pop(0)
        option, equals, value = word.partition("=")
        name, adds = option.removeprefix("--").removesuffix("+"), option.endswith("+")
        _refuse_section(option, name)
        owner, _, key = name.rpartition(".")
        inside = types.get(owner) == Optional[dict[str, Any]]
        if not inside and any(name.startswith(f"{known}.") for known in types):
            raise _unknown(name)  # which the parser might take, for nobody
        if not option.startswith("--") or not (name in types or inside) or not (equals or _is_value(rest[:1])):
            others.append(word)  # a flag, or a mistake
            continue
        text = value if equals else rest.pop(0)
        if inside:
            given[owner] = (given.get(owner) or {}) | {key: read_word(text)}
        elif adds:
            given[name] = fit(name, _listed(given.get(name)) + _listed(fit_word(name, text, types[name])), types[name])
        else:
            given[name] = fit_word(name, text, types[name])
    return others


def _refuse_section(option: str, name: str) -> None:
    wrong = name in sections() or set(name.split(".")) & set(FORBIDDEN)
    require(
        not (option.startswith("--") and wrong),
        f"{option} takes no value: give the options inside a section one by one, as --train.steps 600, or a YAML of "
        "them with --config.",
    )


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _is_value(following: list[str]) -> bool:
    """Return whether the word after an option, if there is one, is its value and no option itself."""
    return any(not word.startswith("-") or word == "-" or re.match(r"-\.?(\d|inf)", word) for word in following)


def option_types() -> dict[str, Any]:
    """Return the type of every option that has a value."""
    return field_types() | {"ds_config": Optional[str], "dry_run_world": Optional[int], "local_rank": int}


def read_options(path: str) -> dict[str, Any]:
    """Return the options of a YAML file, by dotted name.

    Raises:
        UserError: it does not hold sections with options, each with a value of its type.
    """
    file = given_or_shipped(Path(expanded("--config", path)), "launch/configs", ".yaml")
    content = read_given_yaml(file, f"--config {path}", "Give a file of launch/configs/, or its name.")
    _require_section(path, isinstance(content, dict), f"it holds {type(content).__name__}")
    types = option_types() | dict.fromkeys(("evaluate_only", "prepare_only", "dry_run"), bool)
    options: dict[str, Any] = {}
    for name, value in _flatten(content, types):
        _require_section(path, name not in sections(), f"{name!r} has none")
        if name not in types:
            raise _unknown(name)
        require(name not in options, f"--config {path} gives {name} twice: keep one of them.")
        try:
            options[name] = fit(name, value, types[name])
        except UserError as error:
            raise UserError(f"--config {path}: {error}") from None
    return options


def _require_section(path: str, holds: bool, instead: str) -> None:
    require(
        holds,
        f"--config {path} must hold sections with fields, as 'train:' with '  steps: 600' below it; {instead}.",
    )


def _flatten(tree: dict[Any, Any], types: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and (value or name in sections()) and name not in types:
            yield from _flatten(value, types, f"{name}.")
        else:
            yield name, value
