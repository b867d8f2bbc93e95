"""A rank that is stopped, fails or runs out of memory: it is named with its host, and every other rank ends."""

from __future__ import annotations

import socket
from typing import Any, Optional

import pytest

from tests.dist.launch import REPOSITORY, end_ranks, free_port, script_main, warm_interpreters
from tests.system.commands import Place

WORKER = REPOSITORY / "tests" / "system" / "kill_worker.py"
HOST = socket.gethostname()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("lost"))


def struck(
    place: Place, run: str, rank: int, by: str, at: str, timeout: float = 4
) -> tuple[list[Optional[int]], list[str]]:
    """Two ranks of which one is struck: exit statuses (None: still there when the other has ended) and outputs."""
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    world |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    words = place.options(run, "--parallel.timeout", str(timeout), "--checkpoint.interval", "4")
    outputs = [place.folder / f"{run}-{number}.txt" for number in range(2)]
    ranks: list[Any] = []
    try:
        for number, output in enumerate(outputs):
            output.touch()
            own = {"KILL_AT": at, "KILL_BY": by} if number == rank else {}
            env = {**place.env, **world, "RANK": str(number), "LOCAL_RANK": str(number), **own}
            ranks.append(
                warm_interpreters().Process(target=script_main, args=(WORKER, words, place.folder, output, env))
            )
            ranks[-1].start()
        ranks[1 - rank].join(60)
        ranks[rank].join(0 if by == "SIGSTOP" else 20)
        statuses = [each.exitcode for each in ranks]
    finally:
        end_ranks(ranks)
    return statuses, [output.read_text(errors="replace") for output in outputs]


@pytest.mark.parametrize(
    ("rank", "at"),
    [
        (1, "step:3"),
        (0, "write:1"),
        pytest.param(0, "step:3", marks=pytest.mark.full),
        pytest.param(1, "evaluate:2", marks=pytest.mark.long),
    ],
)
def test_a_stopped_rank_is_named(place: Place, rank: int, at: str) -> None:
    """In training, in an evaluation, while a checkpoint is written; also the rank that keeps the store."""
    statuses, outputs = struck(place, f"stopped-{rank}-{at[:4]}", rank, "SIGSTOP", at)
    assert statuses[rank] is None and statuses[1 - rank] == 2, (statuses, outputs)
    told = outputs[1 - rank]
    assert told.count("error: ") == told.count(f"No sign of life from rank {rank} (on {HOST})") == 1, told
    assert "Traceback" not in told, told


@pytest.mark.parametrize(
    ("rank", "by", "statuses", "words"),
    [
        (1, "TypeError", [2, 1], [None, "TypeError: struck"]),
        *(
            pytest.param(*case, marks=pytest.mark.full)
            for case in [
                (1, "SIGKILL", [2, -9], [f"error: No sign of life from rank 1 (on {HOST})", None]),
                (0, "TypeError", [1, 2], ["TypeError: struck", None]),
                (0, "MemoryError", [2, 2], [f"error: Rank 0, on {HOST}, ran out of host memory (struck): lower", None]),
                (1, "UserError", [2, 2], [f"error: rank 1, on {HOST}: struck", None]),
            ]
        ),
        pytest.param(
            1,
            "cpu",
            [2, 2],
            [None, f"error: Rank 1, on {HOST}, ran out of host memory ([enforce fail"],
            marks=pytest.mark.long,
        ),
    ],
)
def test_a_failing_rank_says_why_and_the_other_ends(
    place: Place, rank: int, by: str, statuses: list[int], words: list[Optional[str]]
) -> None:
    """Once, by the rank that knows, but for a mistake that only another rank than 0 found."""
    found, outputs = struck(place, f"failed-{rank}-{by}", rank, by, "step:3")
    assert found == statuses, (found, outputs)
    for output, expected in zip(outputs, words, strict=True):
        assert output.count("Traceback") == (by == "TypeError" and expected is not None), output
        assert output.count("error: ") == (expected is not None and by != "TypeError"), output
        assert expected is None or output.count(expected) == 1, output


@pytest.mark.full
def test_a_rank_that_lives_and_does_not_come_is_named_with_its_place(place: Place) -> None:
    statuses, outputs = struck(place, "late", 1, "sleep 60", "data:3")
    assert statuses == [2, 2], (statuses, outputs)
    told = f"did not come: rank 1 (on {HOST}) is at system/kill_worker.py:"
    assert outputs[0].count("error: Rank 0, on") == outputs[0].count(told) == 1, outputs
    assert "in strike" in outputs[0] and "error" not in outputs[1], outputs


def test_what_one_rank_does_alone_may_take_longer_than_the_time_out(place: Place) -> None:
    statuses, outputs = struck(place, "alone", 0, "sleep 6", "publish:1")
    assert statuses == [0, 0], (statuses, outputs)
