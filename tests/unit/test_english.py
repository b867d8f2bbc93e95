"""The phrases that `make checks` refuses are found in comments, docstrings and messages, and nowhere else."""

from __future__ import annotations

import pytest

from tests.english import comments, translated


@pytest.mark.parametrize(
    ("source", "phrase"),
    [
        ('"""Take two numbers a\n    token."""', "numbers a token"),
        ('raise ValueError("the run goes " f"on from {step}")', "goes on from"),
        ("x = 1  # drawn\n# anew at the start", "anew"),
        ("def f():\n    '''Whether replicas\n    come apart.'''", "come apart"),
        ("help = 'Likewise.'", "Likewise"),
        ("text = f'{name} says which'", "says which"),
    ],
)
def test_translated_phrases_are_found(source: str, phrase: str) -> None:
    assert phrase in [found for _, found, _ in translated(source)]


@pytest.mark.parametrize(
    "source",
    [
        "anew = likewise.told",
        '"""Take a step. Apart from that, tell them apart."""',
        '"""The run goes on. What it gains is small."""',
        "x = 'say', 'what'  # one of a step",
    ],
)
def test_plain_english_passes(source: str) -> None:
    assert translated(source) == []


def test_comments_of_scripts_and_yaml_are_read() -> None:
    source = "# The same line\n# goes on from there.\nabout: drawn anew\n  # Take two samples a step.\n"
    assert [(line, phrase) for line, phrase, _ in translated(source, comments)] == [
        (1, "goes on from"),
        (4, "samples a step"),
    ]
