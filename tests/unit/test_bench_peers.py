"""`switchlora bench peers` and `bench profile`: that all entries train one function, and what is reported of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_switchlora.config.errors import UserError
from megatron_switchlora.model.protocol import build_model, initialize_weights
from megatron_switchlora.study.benchmarks import entries, peer_entries, peers, turns
from megatron_switchlora.study.benchmarks.profile import KINDS, Sizes, kind_of, product_kind
from megatron_switchlora.study.benchmarks.turns import PARTS, ratio
from tests.dist.launch import REPOSITORY, free_port, run_scripts
from tests.plain import small_config
from tests.system.commands import Place

TINY = [
    "--hidden_sizes", "64", "--num_layers", "1", "--vocab_size", "61", "--tokens", "64", "--seq_lens", "16",
    "--rounds", "1", "--threads", "1", "--device", "cpu", "--compile_backend", "eager", "--divisors", "4",
]  # fmt: skip


def test_all_entries_start_with_one_loss(tmp_path: Path) -> None:
    status, output = Place(tmp_path).script("tools/measure_peers.py", *TINY, "--out", str(tmp_path / "peers.json"))
    assert status == 0 and "left out" not in output, output
    found = json.loads((tmp_path / "peers.json").read_text())
    assert found["machine"]["threads"] == 1 and found["machine"]["peft"] and found["setting"]["world"] == 1
    (case,) = found["cases"]
    ranked = {"lora", "switchlora merged", "switchlora split", "lte", "peft lora", "galore"}
    assert set(case["entries"]) == {f"{name} r=h/4" for name in ranked} | {
        "full", "transformers", "transformers compiled", "muon",
    }  # fmt: skip
    for name, entry in case["entries"].items():
        assert entry["losses_agree"] and entry["seconds"] > 0, name
        assert entry["share_of_step"].keys() == set(PARTS)
        assert sum(entry["share_of_step"].values()) == pytest.approx(1, abs=1e-3)  # each is rounded
        assert all(entry["share_of_step"][part] > 0 for part in ("forward", "backward", "optimizer")), name
        assert (
            entry["cpu_over"].keys()
            == entry["over"].keys()
            == {"transformers"} | ({"peft lora r=h/4"} if "r=" in name else set())
        )
        assert not any(entry["sent_bytes"].values())
    assert case["entries"]["switchlora merged r=h/4"]["share_of_step"]["switch"] > 0
    trained = {name: entry["trained_parameters"] for name, entry in case["entries"].items()}
    assert trained["peft lora r=h/4"] < trained["galore r=h/4"] == trained["muon"] == trained["transformers"]
    table = (tmp_path / "peers.md").read_text().splitlines()
    assert len(table) == 4 + len(case["entries"]) and table[-1].count("|") == table[2].count("|")


def test_bytes_over_two_ranks(tmp_path: Path) -> None:
    words = [*TINY, "--entries", "full", "transformers", "--micro_batches", "2", "--out", str(tmp_path / "peers.json")]
    place, world = Place(tmp_path), {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    sizes = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    envs = [{**place.env, **world, **sizes, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    statuses, output = run_scripts(REPOSITORY / "tools" / "measure_peers.py", words, envs, tmp_path, 120)
    assert statuses == [0, 0], output
    (case,) = json.loads((tmp_path / "peers.json").read_text())["cases"]
    theirs = case["entries"]["transformers"]
    assert theirs["losses_agree"]
    assert theirs["sent_bytes"]["gradient"] == 4 * theirs["trained_parameters"], "once a step, in fp32"
    assert case["entries"]["full"]["sent_bytes"]["gradient"] > 0


def test_transformers_computes_our_loss_and_gradients() -> None:
    config = small_config("full", model__pad_multiple=64, model__vocab_size=61)
    ours = build_model(config.model).double()
    initialize_weights(ours, config.train.seed)
    theirs: Any = peer_entries.transformers_model(config, torch.device("cpu"), torch.float64)
    theirs.load_state_dict({name: peers_value(param) for name, param in ours.named_parameters()})
    tokens = torch.randint(61, (2, 17), generator=torch.Generator().manual_seed(3))
    loss = ours(tokens[:, :-1], tokens[:, 1:])
    targets = tokens[:, 1:].contiguous()
    other = theirs(input_ids=tokens[:, :-1], labels=targets, shift_labels=targets, use_cache=False).loss
    assert float(other.detach()) == pytest.approx(float(loss.detach()), rel=1e-6)  # transformers casts logits to fp32
    loss.backward()
    other.backward()
    gradients = dict(theirs.named_parameters())
    for name, param in ours.named_parameters():
        torch.testing.assert_close(peers_value(param, param.grad), gradients[name].grad, rtol=1e-4, atol=1e-7)


def peers_value(param: Any, value: Any = None) -> torch.Tensor:
    return peer_entries.without_padding(param, param.data if value is None else value)


def test_what_is_missing_is_left_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    options = entries.entry_options(None).parse_args([*TINY, "--entries", "muon"])
    options.one_at_a_time = False
    config = entries.make_config(options, 64, 16, "fp32", 1)
    times, left_out = peers.measure_case(options, config, turns.batches(config, 0, 4), torch.device("cpu"))
    assert not times and "has no Muon" in left_out["muon"] and "muon is left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--entries", "fsdp"], "'fsdp'"),
        (["--tokens", "40"], "multiple of 32"),
        (["--divisors", "3"], "--divisors 3"),
        (["--tp", "2"], "--tp 2"),
    ],
)
def test_options_are_checked(words: list[str], text: str) -> None:
    with pytest.raises(UserError, match=text):
        entries.check_options(entries.entry_options(None).parse_args([*TINY, *words]), 1)


def test_what_is_compared_with_what() -> None:
    assert peers.bases_of("full", {"full", "transformers"}) == ["transformers"]
    assert peers.bases_of("lora r=h/4", {"full", "peft lora r=h/8"}) == ["full"]
    assert peers.bases_of("lora r=h/4", {"transformers", "peft lora r=h/4"}) == ["transformers", "peft lora r=h/4"]


def test_ratios_are_of_one_round() -> None:
    assert ratio([1.0, 30.0, 1.2], [2.0, 60.0, 2.0]) == 0.5  # all are slow in the second


def test_the_kinds_of_a_step(tmp_path: Path) -> None:
    sizes = ["--hidden_sizes", "192", "--divisors", "8", "--vocab_size", "500", "--tokens", "128"]
    names = ["full", "switchlora merged", "switchlora split", "peft lora"]
    words = [*TINY, *sizes, "--entries", *names, "--out", str(tmp_path / "profile.json")]
    status, output = Place(tmp_path).script("tools/measure_profile.py", *words)
    assert status == 0, output
    found = json.loads((tmp_path / "profile.json").read_text())["entries"]
    has = {
        name.partition(" r=")[0]: {kind for kind in KINDS if entry["kinds"][kind] > 0} for name, entry in found.items()
    }
    every = set(KINDS) - {"low-rank products", "forming W + sBA", "switch"}
    assert has["full"] - {"switch"} == every
    assert has["switchlora merged"] == set(KINDS)
    assert has["switchlora split"] == set(KINDS) - {"forming W + sBA"}
    assert has["peft lora"] == every | {"low-rank products"}
    for entry in found.values():
        assert math.isclose(sum(entry["kinds"].values()), entry["traced_seconds"], rel_tol=1e-6)


def test_products_are_told_apart() -> None:
    sizes = Sizes(frozenset({500, 512}), frozenset({128}), frozenset({16, 32, 48}))
    assert product_kind([[128, 192], [192, 192]], sizes) == "products with W"
    assert product_kind([[192, 16], [16, 192]], sizes) == "forming W + sBA"
    for shapes in (
        [[128, 192], [192, 16]],
        [[128, 16], [16, 192]],
        [[48, 128], [128, 192]],
        [[2, 64, 16], [2, 16, 128]],
    ):
        assert product_kind(shapes, sizes) == "low-rank products"
    step = SimpleNamespace(name="part: optimizer", cpu_parent=None, input_shapes=[])
    product: Any = SimpleNamespace(name="aten::mm", cpu_parent=step, input_shapes=[[128, 192], [192, 500], []])
    assert kind_of(product, sizes) == "optimizer"
    product.cpu_parent = None
    assert kind_of(product, sizes) == "output layer and loss"
