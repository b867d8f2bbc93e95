"""YAML: what loses something in silence, never ends or imports code is refused; texts come back as they were."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megatron_switchlora.config.yaml_text import dump_yaml, load_yaml, read_yaml

TEXTS = [
    "1e-3", "1_000", "0x1f", "0o17", "007", "12:30:00", "on", "No", "y", "2024-01-01", "null", "Null", "~", "", "true",
    ".5", "1.", "+1", ".inf", "NaN", "é", "a\nb", "it's", '"', "# c", "a #b", "- a", "a: b", "[a]", "{a: b}", " x ",
    "=", "<<", "!x", "&a", "*a", "%x", "@x", "`x", "\t", "x" * 300 + " y", "\x7f", "\u2028",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_texts_come_back(text: str) -> None:
    """From ours, and from a reader of YAML 1.1."""
    written = dump_yaml({"a": {"b": [text]}, "c": text})
    assert load_yaml(written) == yaml.safe_load(written) == {"a": {"b": [text]}, "c": text}


def test_every_text_is_quoted() -> None:
    """Whatever another reader could take it for."""
    assert (
        dump_yaml({"a": "linear", "b": [1e-5, None, True, "1"]})
        == "a: 'linear'\nb:\n- 1.0e-05\n- null\n- true\n- '1'\n"
    )


def test_numbers_and_dates() -> None:
    given = "{a: 1e-3, b: 5e8, c: .5e1, d: 46_000_000, e: 2024-01-01, f: -.inf, g: 0x10}"
    assert list(load_yaml(given).values()) == [1e-3, 5e8, 5.0, 46_000_000, "2024-01-01", -float("inf"), 16]


DEEP = (
    "a0: &a0 "
    + "[" * 150
    + "]" * 150
    + "".join(f"\na{i}: &a{i} " + "[" * 150 + f"*a{i - 1}" + "]" * 150 for i in range(1, 9))
)
WIDE = "a0: &a0 [x]" + "".join(f"\na{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: {lr: 1}\ntrain: {}\noptim: {}", "line 3: 'optim' occurs here again, after line 1"),
        ("optim:\n  lr: 1\n  'lr': 2", "line 3: 'lr' occurs here again, after line 2"),
        ("a: &a [*a]", "line 1: an alias occurs inside what it names"),
        ("train: &a\n  steps: *a", "line 1: an alias occurs inside what it names"),
        (WIDE, "line 2: aliases stand for more than 10,000 values"),
        (DEEP, "nested too deeply"),
        ("[" * 5_000, "nested too deeply"),
        ("train:\n  class_path: this.Zen", "line 2: class_path would import code"),
        ("a: [{'init_args': {}}]", "line 1: init_args would import code"),
        ("a: &a {class_path: x}\nb: {<<: *a}", "line 1: class_path would import code"),
        ("a: !!python/name:os.system x", "line 1: could not determine a constructor"),
        ("a: !!bool x", "does not match its tag"),
        ("a: !!timestamp x", "does not match its tag"),
        ("a: !!int x", "invalid literal"),
        ("a: " + "9" * 5_000, "4300 digits"),
        ("? [a]\n: 3", "line 1: found unhashable key"),
        ("a: 1\n---\nb: 2", "line 2: but found another document"),
        ("a: [", "line 1: expected the node content"),
        ("a: *b", "line 1: found undefined alias 'b'"),
        ("a: \0", "special characters are not allowed"),
    ],
)  # fmt: skip
def test_refusals_name_the_line(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        load_yaml(text)
    assert "\n" not in str(raised.value)


def test_aliases_of_plain_sections_stay() -> None:
    assert load_yaml("a: &x {b: 1, c: 2}\nd: {<<: *x, b: 3}\ne: *x") == {
        "a": {"b": 1, "c": 2}, "d": {"b": 3, "c": 2}, "e": {"b": 1, "c": 2},
    }  # fmt: skip


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes("a: 1".encode("utf-16"))
    with pytest.raises(ValueError, match="utf-8"):
        read_yaml(tmp_path / "x.yaml")
