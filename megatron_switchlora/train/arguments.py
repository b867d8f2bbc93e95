"""The command line of `launch/pretrain.py`: `RunConfig` through jsonargparse.

Every field is a dotted option (`--optim.lr 0.02`) that overrides the YAML of `--config`; the docstring
under a field is its help. Mistakes become one `UserError`, with the nearest valid name for an unknown
key.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Optional

import yaml
from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from megatron_switchlora.config import RunConfig, UserError, require
from megatron_switchlora.disk import shown
from megatron_switchlora.rules import validate


@dataclass(frozen=True)
class Arguments:
    """The parsed command line."""

    config: RunConfig
    ds_config: Optional[str]
    evaluate_only: bool
    dry_run: bool = False
    dry_run_world: Optional[int] = None
    prepare_only: bool = False


@cache
def build_parser() -> ArgumentParser:
    """The parser; `--print_config` and `--help` come with it. Kept: tools read many configurations, and reading the
    fields' docstrings takes longer than all else."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="pretrain.py",
        description="Pre-train a LLaMA with full-rank, LoRA, ReLoRA, SwitchLoRA or GaLore training under DeepSpeed.",
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
    parser.add_class_arguments(RunConfig)
    return parser


def _known_names(parser: ArgumentParser) -> list[str]:
    return sorted({action.dest for action in parser._actions if action.dest not in ("help", "print_config")})


def _unknown_name(message: str) -> Optional[str]:
    """The key that jsonargparse did not know, from its message."""
    group = re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message)
    if group:
        return f"{group.group(1)}.{group.group(2)}"
    found = re.search(r"nrecognized arguments: --([\w.]+)|Option '([\w.]+)' is not accepted", message)
    return found and (found.group(1) or found.group(2))


def _explain(parser: ArgumentParser, error: Exception) -> UserError:
    """Turn jsonargparse's error into a sentence with what to change."""
    message = " ".join(str(error).split())
    name = _unknown_name(message)
    if name is None:
        return UserError(f"The command line or YAML is not valid: {message}")
    near = difflib.get_close_matches(name, _known_names(parser), n=1, cutoff=0.0)
    return UserError(f"Unknown option or key {name!r}: did you mean {near[0]!r}? --help lists all of them.")


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """Parse and validate.

    Raises:
        UserError: unknown keys, wrong types, unreadable files, or a rule of `rules.validate`.
    """
    require_utf8(argv)
    parser = build_parser()
    files, others = split_config_files(argv)
    for path in files:
        check_yaml(path)
    try:
        namespace = parser.parse_args([f"--config={path}" for path in files] + others)
        made = parser.instantiate(namespace)
    except (ArgumentError, yaml.YAMLError, TypeError, ValueError, OSError) as error:
        vars(parser).pop("print_config", None)  # a --print_config that the mistake has kept from printing
        raise _explain(parser, error) from None
    config = to_run_config(made)
    config.method.init = config.method.initial  # type: ignore[assignment]  # a run's records say which it was
    validate(config)
    check_modes(namespace)
    return Arguments(
        config, namespace.ds_config, namespace.evaluate_only, namespace.dry_run, namespace.dry_run_world,
        namespace.prepare_only,
    )  # fmt: skip


def require_utf8(words: Sequence[str]) -> None:
    """Raises: UserError, if a word holds bytes that are not UTF-8: libraries that we write files with refuse them."""
    for word in words:
        require(
            word.isascii() or word == shown(word),
            f"{shown(word)!r} on the command line is not UTF-8: give files and folders names that are.",
        )


def check_modes(namespace: Namespace) -> None:
    """Raises: UserError, if the options that say what to do instead of training do not go together."""
    world = namespace.dry_run_world
    require(world is None or world >= 1, f"--dry_run_world must be at least 1, not {world}.")
    require(
        world is None or namespace.dry_run,
        f"--dry_run_world {world} says for how many ranks --dry_run plans: give --dry_run too, or leave it out.",
    )
    require(
        namespace.dry_run + namespace.evaluate_only + namespace.prepare_only <= 1,
        "--dry_run plans a training run, --evaluate_only evaluates a finished one, and --prepare_only makes the data "
        "ready: give one of them.",
    )


def split_config_files(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The files given with --config, and all other words: options override files wherever they stand."""
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


def check_yaml(path: str) -> None:
    """Raises: UserError, unless the file holds sections with fields."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path} cannot be read: {error.strerror}. Give a file of launch/configs/.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} is not valid YAML: {' '.join(str(error).split())}.") from None
    sections = {name for name, kind in RunConfig.__annotations__.items() if kind.endswith("Config")}
    wrong = (
        []
        if not isinstance(content, dict)
        else [k for k in sections & set(content) if not isinstance(content[k], dict)]
    )
    require(
        isinstance(content, dict) and not wrong,
        f"--config {path} must hold sections with fields, as 'train:' with '  steps: 600' below it; "
        + (f"{wrong[0]!r} has none." if wrong else f"it holds {type(content).__name__}."),
    )


def to_run_config(namespace: Namespace) -> RunConfig:
    return RunConfig(**{name: namespace[name] for name in RunConfig.__dataclass_fields__})
