"""The switching schedule: purity, rates, and that its rules hold at every step."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from megatron_switchlora.lowrank.schedule import (
    ScheduleConfig,
    end_step,
    initial_state,
    mean_switch_rate,
    plan_step,
    switch_rate,
)

BASE = ScheduleConfig(
    candidates=(16, 40, 40, 9),
    rank=8,
    interval0=10,
    ratio=1.0,
    total_steps=4000,
    freeze_steps=5,
    selection="ring",
    seed=3,
)
VARIANTS = [
    BASE,
    dataclasses.replace(BASE, interval0=4, freeze_steps=2),
    dataclasses.replace(BASE, rank=7, interval0=2, freeze_steps=1),
    dataclasses.replace(BASE, selection="random"),
    dataclasses.replace(BASE, selection="independent"),
    dataclasses.replace(BASE, selection="independent", interval0=1, freeze_steps=0),
    dataclasses.replace(BASE, rank=2, interval0=1, freeze_steps=0, candidates=(3, 2 + 1)),
]


@pytest.mark.parametrize("config", VARIANTS)
def test_rules_hold_at_every_step(config: ScheduleConfig) -> None:
    state = initial_state(config)
    switched = np.zeros(len(config.candidates))
    for step in range(400):
        frozen = {side: state.frozen[side].copy() for side in "AB"}
        slots = {side: state.slots[side].copy() for side in "AB"}
        plan = plan_step(config, state, step)
        seen: dict[tuple[int, str], set[int]] = {}
        for switch in plan.switches:
            positions = switch.positions.tolist()
            assert len(set(positions)) == len(positions)
            assert (frozen[switch.side][switch.layer, positions] == 0).all(), "a frozen vector was switched"
            assert not set(switch.new_slots) & set(slots[switch.side][switch.layer]), "a live slot was read"
            assert (slots[switch.side][switch.layer, positions] == switch.old_slots).all()
            seen[switch.layer, switch.side] = set(positions)
            switched[switch.layer] += len(positions)
        for layer in range(len(config.candidates)):
            assert not seen.get((layer, "A"), set()) & seen.get((layer, "B"), set()), "windows overlap"
            if config.selection != "independent":
                assert len(seen.get((layer, "A"), ())) == len(seen.get((layer, "B"), ()))
            for side in "AB":
                live = state.slots[side][layer]
                assert len(set(live)) == config.rank and live.min() >= 0 and live.max() < config.candidates[layer]
        end_step(state)
    assert (switched > 2 * np.array(config.candidates)).all(), "the ring did not wrap"


def test_ring_takes_every_candidate_in_order() -> None:
    state = initial_state(BASE)
    taken: dict[str, list[int]] = {"A": [], "B": []}
    order: dict[str, list[int]] = {"A": [], "B": []}
    for step in range(200):
        for switch in plan_step(BASE, state, step).switches:
            if switch.layer == 1:
                taken[switch.side] += switch.new_slots.tolist()
                order[switch.side] += switch.positions.tolist()
        end_step(state)
    assert len(taken["A"]) > 100
    for side, first in (("A", 0), ("B", 4)):
        assert taken[side] == [k % 40 for k in range(len(taken[side]))]
        assert order[side] == [(first + k) % 8 for k in range(len(order[side]))]


def test_freeze_lasts_its_steps() -> None:
    state = initial_state(BASE)
    first = next(step for step in range(100) if plan_step(BASE, state, step).switches or end_step(state))
    masked = [int((state.frozen["B"][:, 0] > 0).sum())]
    while masked[-1]:
        end_step(state)
        masked.append(int((state.frozen["B"][:, 0] > 0).sum()))
    assert first >= 0
    assert len(masked) - 1 == BASE.freeze_steps


@pytest.mark.parametrize("selection", ["ring", "random", "independent"])
def test_draws_are_pure_functions_of_seed_and_step(selection: str) -> None:
    config = dataclasses.replace(BASE, selection=selection)

    def plans(config: ScheduleConfig) -> list[tuple]:
        state, found = initial_state(config), []
        for step in range(60):
            for s in plan_step(config, state, step).switches:
                found.append((step, s.layer, s.side, s.positions.tolist(), s.new_slots.tolist()))
            end_step(state)
        return found

    np.random.seed(1)
    one = plans(config)
    np.random.seed(2)
    assert plans(config) == one
    assert plans(dataclasses.replace(config, seed=4)) != one


def test_resuming_from_the_integer_state_continues_the_same() -> None:
    state, copies, plans = initial_state(BASE), [], []
    for step in range(40):
        copies.append({k: {s: v.copy() for s, v in getattr(state, k).items()} for k in ("pointer", "slots", "frozen")})
        plans.append(str(plan_step(BASE, state, step)))
        end_step(state)
    fresh = initial_state(BASE)
    for kind, sides in copies[17].items():
        setattr(fresh, kind, sides)
    for step in range(17, 40):
        assert str(plan_step(BASE, fresh, step)) == plans[step]
        end_step(fresh)


def test_rate_and_mean_count() -> None:
    assert switch_rate(399, 0.1, 4000) == pytest.approx(0.3)
    assert switch_rate(0, 0.1, 4000) == pytest.approx(0.3 ** (1 / 400))
    for steps, ratio in ((1, 0.1), (700, 0.1), (4000, 1e6), (4000, math.inf)):
        rates = [switch_rate(step, ratio, 4000) for step in range(steps)]
        assert mean_switch_rate(steps, ratio, 4000) == pytest.approx(sum(rates) / steps, rel=1e-12)
    config = dataclasses.replace(BASE, candidates=(64,) * 50, interval0=40, total_steps=100_000, freeze_steps=5)
    state = initial_state(config)
    total = 0
    for step in range(400):
        total += plan_step(config, state, step).count
        end_step(state)
    expected = 2 * 50 * sum(8 / 40 * switch_rate(step, 1.0, 100_000) for step in range(400))
    assert total == pytest.approx(expected, rel=0.05)
