"""The watch over the other ranks, several in one process: who is silent, who does not come, whose words stand."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Optional

import pytest
from torch.distributed import TCPStore

from megatron_switchlora.startup.environment import Ranks
from megatron_switchlora.startup.watch import WAITING, Watch, place_of
from tests.dist.launch import free_port


class Cluster:
    """Watches of ranks 0, 1, ... on hosts n0, n1, ...; `left` has what each printed when it ended its process."""

    def __init__(self, count: int, timeout_s: float) -> None:
        port, self.left = free_port(), dict[int, Optional[str]]()
        self.stores = [self._connect(port, count, rank == 0) for rank in range(count)]
        self.watches = [
            Watch(store, Ranks(rank, count, 0, 1), f"n{rank}", "rank 0", timeout_s, self._leaver(rank))
            for rank, store in enumerate(self.stores)
        ]

    def _connect(self, port: int, count: int, serves: bool) -> TCPStore:
        return TCPStore("127.0.0.1", port, count, serves, timedelta(seconds=20), wait_for_workers=False)

    def _leaver(self, rank: int) -> Callable[[Optional[str]], None]:
        def leave(words: Optional[str]) -> None:
            self.left[rank] = words
            self.watches[rank].stop()

        return leave

    def wait(self, done: Callable[[], bool]) -> None:
        until = time.monotonic() + 20
        while not done():
            assert time.monotonic() < until, self.left
            time.sleep(0.02)


@pytest.fixture
def cluster() -> Any:
    made: list[Cluster] = []

    def make(count: int, timeout_s: float = 1.0) -> Cluster:
        made.append(Cluster(count, timeout_s))
        return made[-1]

    yield make
    for each in made:
        for watch in each.watches:
            watch.stop()


def test_a_silent_rank_is_named_once_and_all_others_leave(cluster: Any) -> None:
    three = cluster(3)
    three.wait(lambda: all(sign.text for sign in three.watches[0]._signs.values()))
    three.watches[2].stop()
    three.wait(lambda: {0, 1} <= set(three.left))
    told = three.left[0]
    assert told.startswith("No sign of life from rank 2 (on n2): stopped, or gone") and "parallel.timeout 1 s" in told
    assert three.left[1] is None


def test_a_silent_rank_0_is_named_by_the_others(cluster: Any) -> None:
    two = cluster(2)
    two.wait(lambda: bool(two.watches[1]._signs[0].text))
    two.watches[0].stop()
    two.wait(lambda: 1 in two.left)
    assert two.left[1].startswith("No sign of life from rank 0 (on n0)")


def test_the_first_words_stand_and_the_others_are_ended(cluster: Any) -> None:
    two = cluster(2)
    first, second = two.watches[1].end("no memory"), two.watches[0].end("later")
    assert first == second and (first.rank, first.text) == (1, "no memory")
    assert two.watches[0].message_here(first) is None and two.watches[1].message_here(first) == "no memory"
    two.watches[0].linger()
    two.wait(lambda: set(two.left) == {0, 1})  # main threads that hang on their way out
    assert set(two.left.values()) == {None}


def test_what_only_another_rank_found_is_said_by_rank_0(cluster: Any) -> None:
    two = cluster(2)
    ending = two.watches[1].end("data.files: nothing there", printed=False)
    assert two.watches[0].message_here(ending) == "rank 1, on n1: data.files: nothing there"
    two.wait(lambda: 0 in two.left)  # its main thread is in a collective
    assert two.left[0] == "rank 1, on n1: data.files: nothing there"


@pytest.mark.parametrize(
    ("place", "words"),
    [(WAITING, "could not exchange data with the others, which are all alive (reset)"),
     ("loader.py:70, in batch",
      "waited 1 s (parallel.timeout) for ranks that are alive and did not come: rank 1 (on n1)")],
)  # fmt: skip
def test_a_failed_collective_is_explained(
    cluster: Any, monkeypatch: pytest.MonkeyPatch, place: str, words: str
) -> None:
    monkeypatch.setattr("megatron_switchlora.startup.watch.place_of", lambda frame: place)
    two = cluster(2)
    ending = two.watches[0].explain("reset")
    assert ending.text.startswith(f"Rank 0, on n0, {words}") and ending.rank == 0
    assert two.watches[1].explain("reset") == ending


def test_places() -> None:
    here = place_of(sys._getframe())
    assert here.startswith("unit/test_watch.py:") and here.endswith(", in test_places")
    scope: dict[str, Any] = {"sys": sys, "place_of": place_of}
    code = "def act(): return place_of(sys._getframe())"
    exec(compile(code, "/x/site-packages/torch/distributed/distributed_c10d.py", "exec"), scope)
    assert scope["act"]() == WAITING


def test_whoever_is_done_is_not_missed_and_leaves_no_thread(cluster: Any) -> None:
    before = threading.active_count()
    two = cluster(2)
    for watch in two.watches:
        watch.stop()
    two.wait(lambda: threading.active_count() <= before)
    assert two.left == {}
