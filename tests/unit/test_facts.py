"""Every option says what is known of it; what lists of options were kept for is derived from that."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_switchlora.config.errors import UserError
from megatron_switchlora.config.facts import names_where, walk
from megatron_switchlora.config.method import METHODS, all_sections
from megatron_switchlora.config.plugins import load_plugins
from megatron_switchlora.config.run import run_config_class

OPTIONS = {name: each.metadata for name, each, _ in walk(run_config_class()())}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_has_its_facts(name: str) -> None:
    facts = OPTIONS[name]
    assert set(facts) == {"resume", "results", "path", "swept"}
    assert facts["resume"] in ("free", "ask", "never")
    assert not (facts["resume"] == "never" and not facts["results"]), "what changes no result may change freely"


def test_facts_that_were_lists() -> None:
    config = run_config_class()()
    asks = names_where(config, lambda facts: facts["resume"] == "ask")
    assert {"optim.lr", "train.steps", "method.switch.interval0"} <= set(asks) and "train.seed" not in asks
    neutral = names_where(config, lambda facts: not facts["results"])
    assert {"method.switch.bank_device", "parallel.tp", "data.cache_dir"} <= set(neutral)
    assert not {"parallel.lte_heads", "train.eval_samples", "data.text_field"} & set(neutral)
    swept = names_where(config, lambda facts: facts["swept"])
    assert {"optim.lr", "optim.dense_lr", "train.seed", "output_dir", "resume"} <= set(swept)


def test_every_method_says_what_it_reads() -> None:
    shared = {name.split(".")[1] for name in OPTIONS if name.startswith("method.")} - set(all_sections())
    for name, facts in METHODS.items():
        assert facts.name == name and facts.about
        assert facts.reads <= shared
        assert bool(facts.inits) == facts.adapts == ("init" in facts.reads)
    read = {section for facts in METHODS.values() for section in facts.sections}
    assert read == set(all_sections())


@pytest.mark.parametrize("name", ["this", "antigravity", "os.path", "no_such_module", "../x", "tests.no_such", "a..b"])
def test_what_is_no_plugin_is_not_imported(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="plugins"):
        load_plugins([name])
    assert capsys.readouterr().out == ""  # importing `this` prints a poem


def test_a_plugin_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_method.py").write_text("import megatron_switchlora\n1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"broken_method fails as it is imported \(ZeroDivisionError"):
        load_plugins(["broken_method"])
