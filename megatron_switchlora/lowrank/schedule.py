"""SwitchLoRA's schedule: which vectors switch at which step (arXiv 2406.06564, section 2.3, algorithms 1 and 2).

The draws are pure functions of (seed, step, layer) through the counter-based Philox generator. So all ranks agree, and
a resumed run needs no generator state. The state is small integers, advanced in the same way on every rank: ring
pointers, the slot of the bank that each live vector owns, and freeze counters.

    rate(step) = 0.3 ^ ((step + 1) / (ratio T));   x = rank rate / interval0 vectors per side and layer
    count = floor(x) + Bernoulli(x - floor(x)), one draw per layer and step, the same for A and B

Selections:

    ring         positions and slots in order
    random       slots drawn among those that are not live
    independent  positions and counts drawn per side as well (algorithm 2)

A frozen vector is never switched, A's and B's windows never overlap, and no live slot is read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

# Stream numbers separate the draws for different purposes: Philox counter = (stream, layer, step, 0).
COUNT_A, COUNT_B, SLOTS_A, SLOTS_B, POSITIONS_A, POSITIONS_B = range(6)
COUNT_STREAM = {"A": COUNT_A, "B": COUNT_B}
SLOT_STREAM = {"A": SLOTS_A, "B": SLOTS_B}
POSITION_STREAM = {"A": POSITIONS_A, "B": POSITIONS_B}
OTHER = {"A": "B", "B": "A"}


@dataclass(frozen=True)
class ScheduleConfig:
    """The numbers that a schedule depends on; `candidates[l]` is min(m, n) of layer l."""

    candidates: tuple[int, ...]
    rank: int
    interval0: float
    ratio: float
    total_steps: int
    freeze_steps: int
    selection: str
    seed: int


@dataclass
class SwitchState:
    """Integer state of all layers.

    Per side: pointer [L], slots [L, r], and frozen [L, r], the number of steps still masked.
    """

    pointer: dict[str, np.ndarray]
    slots: dict[str, np.ndarray]
    frozen: dict[str, np.ndarray]


@dataclass(frozen=True)
class LayerSwitch:
    """Switches of one side of one layer.

    Live `positions[k]` takes the vector of `new_slots[k]`. Its old vector returns to `old_slots[k]`.
    """

    layer: int
    side: str
    positions: np.ndarray
    old_slots: np.ndarray
    new_slots: np.ndarray


@dataclass
class StepPlan:
    """All switches of a step, in the order in which they apply: a layer's A before its B."""

    switches: list[LayerSwitch] = field(default_factory=list)

    @property
    def count(self) -> int:
        return sum(len(switch.positions) for switch in self.switches)


def raw_draws(seed: int, stream: int, step: int, layer: int, count: int) -> np.ndarray:
    """Return `count` uniform 64-bit integers, a pure function of the arguments: Philox's bit stream is stable."""
    return np.random.Philox(key=seed, counter=[0, stream, layer, step]).random_raw(count)


def switch_rate(step: int, ratio: float, total_steps: int) -> float:
    """Return the share of the starting frequency that is left at `step`, counted from 0."""
    return 0.3 ** ((step + 1) / (ratio * total_steps))


def mean_switch_rate(steps: int, ratio: float, total_steps: int) -> float:
    """Return the mean of `switch_rate` over the first `steps`: the sum of a geometric series."""
    log = math.log(0.3) / (ratio * total_steps)
    if log == 0:  # an infinite ratio: the rate stays
        return 1.0
    return math.exp(log) * math.expm1(steps * log) / math.expm1(log) / steps


def initial_state(config: ScheduleConfig) -> SwitchState:
    """Return the state at the start.

    Live vectors own the last r slots in order, with B's list rotated by r // 2. The pointers are at 0 and r // 2.
    """
    layers, r = len(config.candidates), config.rank
    last = np.array(config.candidates, dtype=np.int64)[:, None] - r + np.arange(r)
    start = {"A": 0, "B": r // 2}
    return SwitchState(
        pointer={side: np.full(layers, start[side], dtype=np.int64) for side in "AB"},
        slots={side: np.roll(last, start[side], axis=1) for side in "AB"},
        frozen={side: np.zeros((layers, r), dtype=np.int64) for side in "AB"},
    )


def _uniforms(config: ScheduleConfig, side: str, step: int) -> np.ndarray:
    """Return one draw in [0, 1) per layer: layer l reads word l of the step's stream."""
    words = raw_draws(config.seed, COUNT_STREAM[side], step, 0, len(config.candidates))
    return (words >> np.uint64(11)) * 2.0**-53


def _counts(config: ScheduleConfig, side: str, step: int) -> np.ndarray:
    """Return how many vectors to switch in each layer, before the caps."""
    x = config.rank / config.interval0 * switch_rate(step, config.ratio, config.total_steps)
    whole = int(np.floor(x))
    return whole + (_uniforms(config, side, step) < x - whole).astype(np.int64)


def _choose(config: ScheduleConfig, stream: int, step: int, layer: int, eligible: np.ndarray, count: int) -> np.ndarray:
    """Choose `count` of the eligible items without replacement, in random order."""
    keys = raw_draws(config.seed, stream, step, layer, len(eligible))
    return eligible[np.argsort(keys, kind="stable")[:count]]


def _window_cap(config: ScheduleConfig, state: SwitchState, layer: int) -> int:
    """Return the largest count for which both ring windows stay clear.

    They must stay clear of frozen vectors, of one another and of live slots. The vectors that A's switches froze are
    B's, and lie behind A's pointer; B's window grows towards them.
    """
    r = config.rank
    i_a, i_b = int(state.pointer["A"][layer]), int(state.pointer["B"][layer])
    behind_a = int(np.count_nonzero(state.frozen["B"][layer]))
    behind_b = int(np.count_nonzero(state.frozen["A"][layer]))
    return min((i_a - behind_a - i_b) % r, (i_b - behind_b - i_a) % r, config.candidates[layer] - r)


def _new_slots(
    config: ScheduleConfig, state: SwitchState, side: str, layer: int, step: int, positions: np.ndarray
) -> np.ndarray:
    slots, candidates = state.slots[side][layer], config.candidates[layer]
    if config.selection == "ring":
        newest = slots[(positions[0] - 1) % config.rank]
        return (newest + 1 + np.arange(len(positions))) % candidates
    free = np.setdiff1d(np.arange(candidates), slots, assume_unique=True)
    return _choose(config, SLOT_STREAM[side], step, layer, free, len(positions))


def _switch_side(
    config: ScheduleConfig, state: SwitchState, side: str, layer: int, step: int, positions: np.ndarray
) -> LayerSwitch:
    """Record one side's switches of a layer: slots, and the freeze of the counterparts."""
    new = _new_slots(config, state, side, layer, step, positions)
    old = state.slots[side][layer, positions].copy()
    state.slots[side][layer, positions] = new
    state.frozen[OTHER[side]][layer, positions] = max(1, config.freeze_steps)
    return LayerSwitch(layer, side, positions, old, new)


def _plan_ring(config: ScheduleConfig, state: SwitchState, step: int, plan: StepPlan) -> None:
    counts = _counts(config, "A", step)
    for layer in map(int, np.flatnonzero(counts)):
        count = min(int(counts[layer]), _window_cap(config, state, layer))
        if count <= 0:
            continue
        for side in "AB":
            pointer = state.pointer[side]
            positions = (pointer[layer] + np.arange(count)) % config.rank
            plan.switches.append(_switch_side(config, state, side, layer, step, positions))
            pointer[layer] = (pointer[layer] + count) % config.rank


def _plan_independent(config: ScheduleConfig, state: SwitchState, step: int, plan: StepPlan) -> None:
    counts = {side: _counts(config, side, step) for side in "AB"}
    for layer, candidates in enumerate(config.candidates):
        for side in "AB":
            eligible = np.flatnonzero(state.frozen[side][layer] == 0)
            count = min(int(counts[side][layer]), len(eligible), candidates - config.rank)
            if count > 0:
                positions = _choose(config, POSITION_STREAM[side], step, layer, eligible, count)
                plan.switches.append(_switch_side(config, state, side, layer, step, positions))


def plan_step(config: ScheduleConfig, state: SwitchState, step: int) -> StepPlan:
    """Plan the switches of `step` and advance `state`.

    Afterwards `state.frozen > 0` marks the vectors masked in this step. Call `end_step` once the optimizer has stepped.
    """
    plan = StepPlan()
    planner = _plan_independent if config.selection == "independent" else _plan_ring
    planner(config, state, step, plan)
    return plan


def end_step(state: SwitchState) -> None:
    """Count the freezes down at the end of a masked step."""
    for frozen in state.frozen.values():
        np.maximum(frozen - 1, 0, out=frozen)
