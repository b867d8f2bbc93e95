"""Every option has a value of its type, wherever it is given; texts arrive as typed; nothing is imported."""

from __future__ import annotations

import argparse
import copy
import re
import sys
from pathlib import Path
from typing import Any, Optional, get_args

import pytest

from megatron_switchlora.config.command_line import option_types, parse_arguments, read_options, take_options
from megatron_switchlora.config.errors import UserError
from megatron_switchlora.config.field_checks import (
    check_fields,
    expand_paths,
    field_types,
    fit,
    fit_word,
    number_from,
    sections,
)
from megatron_switchlora.config.rules import validate
from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.config.yaml_text import dump_yaml
from tests.unit.test_yaml_text import TEXTS

PACKAGE = Path(__file__).resolve().parents[2] / "megatron_switchlora"
FIELDS = sorted(field_types())
OPTIONAL = {name for name in FIELDS if type(None) in get_args(field_types()[name])}
TEXT = [name for name in FIELDS if field_types()[name] in (str, Optional[str])]
PATHS = ["output_dir", "resume", "train.init_from", *(f"data.{n}" for n in ("tokenizer", "cache_dir", "hf_name"))]
NUMBERS = [name for name in FIELDS if "int" in str(field_types()[name]) or "float" in str(field_types()[name])]


def put(config: RunConfig, name: str, value: Any) -> RunConfig:
    section: Any = config
    *owners, entry = name.split(".")
    for owner in owners:
        section = getattr(section, owner)
    setattr(section, entry, value)
    return config


def taken(config: RunConfig, name: str) -> Any:
    value: Any = config
    for entry in name.split("."):
        value = getattr(value, entry)
    return value


def given(tmp_path: Path, content: dict[str, Any]) -> dict[str, Any]:
    (tmp_path / "x.yaml").write_text(dump_yaml(content))
    return read_options(str(tmp_path / "x.yaml"))


def test_the_fields_are_all_there() -> None:
    assert len(FIELDS) > 95 and sections() >= {"method", "method.ga"} and "method.ga.svd" in FIELDS
    assert len(NUMBERS) > 50 and len(TEXT) > 10
    assert {"method.lte.merge_interval", "method.alpha", "parallel.start_timeout"} <= set(NUMBERS)


@pytest.mark.parametrize("name", FIELDS)
def test_null_only_where_a_field_may_be_left_out(tmp_path: Path, name: str) -> None:
    ways = [lambda: given(tmp_path, {name: None}), lambda: take_options([f"--{name}", "null"], {})]
    if name not in TEXT:
        ways.append(lambda: check_fields(put(RunConfig(), name, None)))
    if name in TEXT and name not in OPTIONAL:
        assert fit_word(name, "null", str) == "null"
        ways = [ways[0], lambda: check_fields(put(RunConfig(), name, None))]
    for way in ways:
        if name in OPTIONAL:
            way()
            continue
        with pytest.raises(UserError, match=rf"{name} must be .*, not null: give a value, or leave the line out\.$"):
            way()


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_are_finite_and_named(name: str) -> None:
    wild: list[Any] = [float("nan"), float("inf"), -float("inf"), 10**400, -1]
    if "float" in str(field_types()[name]):
        wild.append(1e39)
    for value in wild:
        with pytest.raises(UserError, match=name.replace(".", r"\.")):
            validate(put(RunConfig(), name, value))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--parallel.start_timeout 0", "start_timeout must be above 0 and at most 604800 seconds"),
        ("--parallel.start_timeout 1e9", "start_timeout must be above 0 and at most 604800 seconds"),
        ("--optim.weight_decay 50", r"weight_decay 50 times the largest learning rate 0.02 must be below 1"),
        ("--optim.weight_decay 5 --optim.lora_plus_ratio 16", r"weight_decay 5 times the largest learning rate 0.32"),
        ("--train.threads 5000", "train.threads must lie between 0 .* and 4096"),
        ("--data.vocab_size 20000000", "data.vocab_size must lie between 257"),
        ("--train.steps 6e2", 'train.steps must be a whole number, not "6e2"'),
        ("--train.precision fp16", 'train.precision must be fp32 or bf16, not "fp16"'),
        ("--method.lte.redraw_A 1", "method.lte.redraw_A must be true or false"),
        ("--method.lte.merge_interval 1.5", "method.lte.merge_interval must be a whole number or never"),
        ("--checkpoint.allow_changes data", "checkpoint.allow_changes must be a list of strings"),
        ("--model.rope_scaling linear", "model.rope_scaling must be a section with fields or null"),
    ],
)
def test_ranges_and_types(words: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_arguments(words.split())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"train": {"steps": True}}, "train.steps must be a whole number, not true"),
        ({"output_dir": 1e-3}, r"output_dir must be a string or null, not 0.001: put it in quotes"),
        ({"data": {"files": [1]}}, r"data.files must be .*, not \[1\]: put each in quotes"),
        ({"data": {"text_field": "a\0b"}}, "data.text_field must be a string"),
        ({"method": {"ga": None}}, "'method.ga' has none"),
        ({"train.steps": 5, "train": {"steps": 6}}, "gives train.steps twice"),
        ({"train": {"nothing": {}}}, "Unknown option or key 'train.nothing'"),
    ],
)  # fmt: skip
def test_what_a_file_may_not_say(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        given(tmp_path, content)


def test_values_in_quotes_and_lists_on_the_command_line() -> None:
    found: dict[str, Any] = {"data.files": "a"}
    words = "--train.steps '600' --optim.lr 1 --data.files+ 1e-3 --data.files+=b --checkpoint.allow_changes [data,007]"
    words += " --model.rope_scaling.rope_type linear --model.rope_scaling.factor=2 --method.alpha -1"
    assert take_options([word.strip("'") for word in words.split()], found) == []
    assert found == {
        "train.steps": 600, "optim.lr": 1.0, "data.files": ["a", "1e-3", "b"],
        "checkpoint.allow_changes": ["data", "007"], "method.alpha": -1.0,
        "model.rope_scaling": {"rope_type": "linear", "factor": 2},
    }  # fmt: skip
    assert fit("optim.lr", "0.1", float) == 0.1
    found = {"model.rope_scaling": None}
    assert not take_options(["--model.rope_scaling.factor", "2"], found) and found["model.rope_scaling"] == {
        "factor": 2
    }
    for name in ("model.rope_scaling.a.b", "train.steps.x", "data.files.x"):
        with pytest.raises(UserError, match=f"Unknown option or key '{name}'"):
            parse_arguments([f"--{name}", "3"])


def test_texts_arrive_as_typed_and_come_back(tmp_path: Path) -> None:
    """Through the command line, and through a run's config.yaml."""
    for text in TEXTS:
        config = RunConfig()
        for name in TEXT:
            found: dict[str, Any] = {}
            take_options([f"--{name}={text}"], found)
            assert found == {name: None if text == "null" and name in OPTIONAL else text}
            put(config, name, text)
        put(config, "data.files", [text])
        stored = given(tmp_path, config.to_dict())
        assert {name: stored[name] for name in TEXT} == dict.fromkeys(TEXT, text)
        assert stored["data.files"] == [text]


@pytest.mark.parametrize("text", ["1e-3", "007", "on", "2024-01-01", "12:30"])
def test_a_run_is_found_again_whatever_its_name(tmp_path: Path, text: str) -> None:
    config = parse_arguments(["--output_dir", text]).config
    (tmp_path / "config.yaml").write_text(dump_yaml(config.to_dict()))
    assert parse_arguments(["--config", str(tmp_path / "config.yaml")]).config == config


def test_print_config_is_read_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(["--print_config", "--output_dir", "1e-3", "--train.seed", "5"])
    (tmp_path / "x.yaml").write_text(capsys.readouterr().out)
    config = parse_arguments(["--config", str(tmp_path / "x.yaml")]).config
    assert (config.output_dir, config.train.seed) == ("1e-3", 5)


@pytest.fixture
def marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "leaves_mark.py").write_text("class Zen: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("leaves_mark", None)
    return "leaves_mark.Zen"


def test_no_configuration_imports_code(tmp_path: Path, marked: str) -> None:
    spec = f'{{"class_path": "{marked}"}}'
    ways = [[f"--{name}", spec] for name in [*sorted(sections()), *option_types(), "config"]]
    ways += [[f"--{name}.class_path", marked] for name in [*sorted(sections()), "model.rope_scaling"]]
    ways += [["--train.init_args.steps", "3"], ["--train.help", marked], ["--method.ga+", spec], ["--train", marked]]
    for text in ("train: %", "method: {ga: %}", "model: {rope_scaling: %}", "data: {files: [%]}", "output_dir: %"):
        (tmp_path / "x.yaml").write_text(text.replace("%", spec))
        with pytest.raises(UserError, match="line 1: class_path would import code"):
            parse_arguments(["--config", str(tmp_path / "x.yaml")])
    for words in ways:
        try:
            parse_arguments(words)  # a text may look like anything
        except UserError:
            continue
        assert words[0].removeprefix("--") in [*TEXT, "ds_config"], words
    assert "leaves_mark" not in sys.modules


def test_home_is_expanded_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = RunConfig()
    for name in [*PATHS, "data.files", "data.val_files"]:
        put(config, name, "~/a/*.b")
    several = put(copy.deepcopy(config), "data.files", ["~/a", "b~/c"])
    expand_paths(config)
    assert {taken(config, name) for name in [*PATHS, "data.files", "data.val_files"]} == {f"{tmp_path}/a/*.b"}
    expand_paths(several)
    assert several.data.files == [f"{tmp_path}/a", "b~/c"]
    (tmp_path / "x.yaml").write_text("output_dir: ~/runs/x\n")
    assert parse_arguments(["--config", "~/x.yaml"]).config.output_dir == f"{tmp_path}/runs/x"
    assert parse_arguments(["--output_dir=~/y"]).config.output_dir == f"{tmp_path}/y"
    for words in (["--output_dir=~nobody-here/x"], ["--config=~nobody-here/x"]):
        with pytest.raises(UserError, match="begins with a home folder that this machine does not know"):
            parse_arguments(words)


@pytest.mark.parametrize("name", PATHS)
def test_an_empty_path_is_no_path(name: str) -> None:
    with pytest.raises(UserError, match=f"{name} is empty"):
        parse_arguments([f"--{name}="])


def test_programs_expand_home_too() -> None:
    programs = [path for path in PACKAGE.rglob("*.py") if "add_argument(" in path.read_text()]
    assert len(programs) > 10
    assert not [path.name for path in programs if "type=Path" in path.read_text()]


@pytest.mark.parametrize("word", ["nan", ".nan", ".inf", "1e400", "-1", "0", "null", "x"])
def test_numbers_of_programs_are_finite(word: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="it must be"):
        number_from(0.001, float)(word)
    assert number_from(0.001, float)("2") == 2.0 and number_from(1)("2") == 2


def test_programs_check_their_numbers() -> None:
    """Those of plan and gradient_volume, and compare's --jobs, have sentences of their own."""
    compare = PACKAGE / "study" / "comparison" / "command.py"
    own = {PACKAGE / "planning" / "command.py", PACKAGE / "study" / "volume" / "command.py", compare}
    found = {path for path in PACKAGE.rglob("*.py") if re.search("type=(int|float),", path.read_text())}
    assert found - {PACKAGE / "config" / "command_line.py"} == own  # which has deepspeed's --local_rank
    assert len(re.findall("type=(int|float)", compare.read_text())) == 1
