"""Learning rates where none is given: the method's, from the papers."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_switchlora.config.command_line import parse_arguments

RATES = {
    "full": (0.001, 0.001), "lora": (0.01, 0.01), "mhlora": (0.00005, 0.001), "relora": (0.001, 0.001),
    "switchlora": (0.02, 0.02), "lte": (0.00005, 0.001), "galore": (0.01, 0.01),
}  # fmt: skip


@pytest.mark.parametrize("name", RATES)
def test_a_method_has_rates_of_its_own(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """In the configuration that a run records, in --print_config and in the help."""
    optim = parse_arguments(["--method.name", name]).config.optim
    assert (optim.lr, optim.dense_lr) == RATES[name]
    shown = []
    for words in (["--method.name", name, "--print_config"], ["--help"], ["--help", "all"]):
        with pytest.raises(SystemExit):
            parse_arguments(words)
        shown.append(" ".join(capsys.readouterr().out.split()))
    words = shown[0].split()
    assert [float(words[words.index(key) + 1]) for key in ("lr:", "dense_lr:")] == list(RATES[name])
    assert all(f" {name} {RATES[name][0]:g}" in text for text in shown[1:])


@pytest.mark.parametrize(
    ("words", "rates"),
    [
        ("--method.name lora --optim.lr 0.5", (0.5, 0.5)),
        ("--method.name full --optim.dense_lr 0.5", (0.001, 0.5)),
        ("--method.name lte --optim.lr 0.5", (0.5, 0.001)),
        ("--method.name lte --method.lte.inner switchlora", (0.02, 0.001)),
        ("--method.name lte --method.init switchlora", (0.01, 0.001)),
        ("--method.name mhlora --method.init switchlora", (0.01, 0.001)),
    ],
)
def test_rates_follow_what_is_given(words: str, rates: tuple[float, float]) -> None:
    optim = parse_arguments(words.split()).config.optim
    assert (optim.lr, optim.dense_lr) == rates


def test_null_is_the_default_rate(tmp_path: Path) -> None:
    """So that a method's rates can be had over a YAML that gives others."""
    path = tmp_path / "run.yaml"
    path.write_text("optim:\n  lr: 0.5\n  dense_lr: 0.5\n")
    words = ["--config", str(path), "--method.name", "lte", "--optim.lr", "null", "--optim.dense_lr", "null"]
    optim = parse_arguments(words).config.optim
    assert (optim.lr, optim.dense_lr) == RATES["lte"]
