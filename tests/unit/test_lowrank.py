"""Initial values, the bank and a single switch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from megatron_switchlora.distributed.mesh import lone_mesh
from megatron_switchlora.distributed.replica_check import fingerprint
from megatron_switchlora.distributed.shard import named_generator
from megatron_switchlora.lowrank.bank import CandidateBank
from megatron_switchlora.lowrank.indices import Indices
from megatron_switchlora.lowrank.init import GAIN, draw_vectors, factor_std
from tests.plain import PlainRun, make_batches, small_config


@pytest.mark.parametrize(
    ("m", "n", "a", "b"), [(2048, 2048, 0.5373, 0.5373), (5461, 2048, 0.6074, 0.4753), (2048, 5461, 0.3719, 0.4753)]
)
def test_deviations_of_the_1_3b_model(m: int, n: int, a: float, b: float) -> None:
    assert factor_std("A", "switchlora", m, n, 512) == pytest.approx(a, abs=5e-5)
    assert factor_std("B", "switchlora", m, n, 512) == pytest.approx(b, abs=5e-5)


def test_adapter_output_has_the_gain() -> None:
    m, n, r = 300, 500, 40
    A = draw_vectors(r, n, factor_std("A", "switchlora", m, n, r), named_generator(0, "a"))
    B = draw_vectors(r, m, factor_std("B", "switchlora", m, n, r), named_generator(0, "b"))
    x = torch.randn(4000, n, generator=torch.Generator().manual_seed(0))
    assert ((x @ A.t()) @ B / r).std().item() == pytest.approx(GAIN, rel=0.05)
    assert A.abs().max().item() <= math.sqrt(3) * factor_std("A", "switchlora", m, n, r)
    assert A.std().item() == pytest.approx(factor_std("A", "switchlora", m, n, r), rel=0.02)


def test_classic_initialisation() -> None:
    run = PlainRun(small_config("lora", method__init="classic"))
    for linear in run.method.linears.values():
        assert float(linear.lora_B.detach().abs().max()) == 0
        assert float(linear.lora_A.detach().abs().max()) <= 1 / math.sqrt(linear.in_features)
        assert float(linear.lora_A.detach().std()) == pytest.approx(1 / math.sqrt(3 * linear.in_features), rel=0.1)


def test_live_vectors_are_members_of_the_bank() -> None:
    method = PlainRun(small_config()).method
    for layer, linear in enumerate(method.switching):
        for side, factor in (("A", linear.lora_A), ("B", linear.lora_B)):
            assert torch.equal(method.bank.held[side, layer].rows[method.state.slots[side][layer]], factor)
            assert len(method.bank.held[side, layer].rows) == min(linear.in_features, linear.out_features)


def test_bank_stays_consistent_over_training() -> None:
    """Every candidate is somewhere exactly once: those not live are unchanged until they are taken."""
    config = small_config(optim__lr=1e-12)
    run = PlainRun(config)
    before = {name: rows.clone() for name, rows in run.method.bank.tensors()}
    switched = sum(run.step(step, batch)[2] for step, batch in enumerate(make_batches(config, 30)))
    assert switched > 500
    for layer, linear in enumerate(run.method.switching):
        for side, factor in (("A", linear.lora_A), ("B", linear.lora_B)):
            rows = run.method.bank.held[side, layer].rows.clone()
            rows[torch.from_numpy(run.method.state.slots[side][layer])] = factor.detach()
            torch.testing.assert_close(rows, before[f"bank_{side}.{layer}"], rtol=0, atol=1e-8)


@pytest.mark.parametrize("place", ["device", "host"])
def test_bank_location_changes_nothing(place: str) -> None:
    config = small_config(method__switch__bank_device=place)
    run = PlainRun(config)
    losses = [run.step(step, batch)[0] for step, batch in enumerate(make_batches(config, 8))]
    base = PlainRun(small_config())
    assert losses == [base.step(step, batch)[0] for step, batch in enumerate(make_batches(config, 8))]


def test_bank_size() -> None:
    method = PlainRun(small_config()).method
    expected = sum(
        min(x.in_features, x.out_features) * (x.in_features + x.out_features) * 4 for x in method.linears.values()
    )
    assert method.bank.num_bytes() == expected


def test_layers_without_spare_candidates_do_not_switch() -> None:
    """k and v have min(m, n) = 24 = rank; the others switch."""
    config = small_config(method__rank=24, method__switch__interval0=6.0)
    run = PlainRun(config)
    assert len(run.method.linears) == 21
    assert len(run.method.switching) == 15
    still = run.method.linears["model.layers.0.self_attn.k_proj"]
    before = still.weight.clone()
    assert sum(run.step(step, batch)[2] for step, batch in enumerate(make_batches(config, 3))) > 0
    assert torch.equal(still.weight, before)


def test_the_bank_gives_and_takes_rows() -> None:
    bank = CandidateBank("device", "tp", lone_mesh())
    bank.add("A", 0, torch.arange(10.0)[:, None].repeat(1, 3), None)
    bank.place(torch.float32, torch.device("cpu"), [[("A", 0)]])
    indices = Indices()
    (exchange,) = bank.exchanges(np.array([0, 0]), np.array([9, 0]), np.array([4, 5]), indices)
    indices.send(torch.device("cpu"))
    (new,) = bank.fetch([exchange], indices).result()
    bank.put_back(exchange, torch.full((2, 3), -1.0), indices)
    assert new[:, 0].tolist() == [9.0, 0.0]
    assert bank.held["A", 0].rows[:, 0].tolist() == [0, 1, 2, 3, -1, -1, 6, 7, 8, 9]


def test_fingerprints_see_every_change() -> None:
    values = torch.randn(40, 7, generator=torch.Generator().manual_seed(0))
    base = fingerprint(values)
    swapped = values.clone()
    swapped[[3, 9]] = swapped[[9, 3]]
    changed = values.clone()
    changed[2, 2] = torch.nextafter(changed[2, 2], torch.tensor(9.0))
    assert torch.equal(base, fingerprint(values.clone()))
    assert not torch.equal(base, fingerprint(swapped))
    assert not torch.equal(base, fingerprint(changed))
    assert fingerprint(torch.empty(0, 3)).tolist() == [0, 0]  # a bank of no layer
    for dtype in (torch.bfloat16, torch.float64, torch.int64, torch.bool):
        flat = torch.zeros(24, dtype=dtype)  # DeepSpeed's parameters are views at any offset of a flat tensor
        flat[4:] = 1
        assert torch.equal(fingerprint(flat[3:23]), fingerprint(flat[3:23].clone()))
        assert not torch.equal(fingerprint(flat[3:23]), fingerprint(flat[4:24]))
