"""Watch the other ranks at work, so that none waits for ever for one that is gone.

Each rank has two daemon threads. One talks to the store in which the ranks have met, on a connection of its own. It
publishes a sign of life with the place of the main thread, and reads the sign of rank 0; rank 0 reads all. A rank
without a sign for three quarters of parallel.timeout is reported before the collectives of the others time out.

A store on a stopped host never answers. So the other thread waits for nothing, and reports the host that keeps the
store. Both threads count their own turns, not seconds: nobody has been silent when a scheduler suspends and continues a
whole job.

The first rank that ends publishes why, under "end". The rank that published it prints it, and all others leave.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from types import FrameType
from typing import Optional

from torch.distributed import DistError, PrefixStore, Store

from megatron_switchlora.startup.environment import Ranks

AGAIN = "Start again with the same command line: a run resumes from its newest checkpoint"
GRACE_S = 10.0  # for the main thread to leave by itself as soon as a rank's end is known
WAITING = "waits for others"


@dataclass(frozen=True)
class Ending:
    """Why a start ends; `printed` by `rank` itself, or else to be printed by rank 0."""

    rank: int
    host: str
    text: str
    printed: bool = True


@dataclass
class Sign:
    """A rank's latest sign of life, and the number of our exchange in which it came."""

    at: int
    host: str = ""
    text: str = ""
    place: str = ""


def place_of(frame: Optional[FrameType]) -> str:
    """Return where a thread is: WAITING within a collective, else its innermost line outside libraries."""
    innermost = ""
    while frame is not None:
        path, name = frame.f_code.co_filename, frame.f_code.co_name
        if f"{os.sep}torch{os.sep}distributed{os.sep}" in path or name == "await_all":
            return WAITING
        if not innermost and "site-packages" not in path and f"{os.sep}lib{os.sep}python" not in path:
            innermost = f"{os.sep.join(path.split(os.sep)[-2:])}:{frame.f_lineno}, in {name}"
        frame = frame.f_back
    return innermost


class Watch:
    """Watch the other ranks, in threads that run until `stop`.

    `keeper` is the name of whoever keeps the store. `leave` ends this process; it is given the message to print first,
    if there is one.
    """

    def __init__(
        self,
        store: Store,
        ranks: Ranks,
        host: str,
        keeper: str,
        timeout_s: float,
        leave: Callable[[Optional[str]], None],
    ) -> None:
        self.ranks, self.host, self.keeper, self.timeout_s, self.leave = ranks, host, keeper, timeout_s, leave
        self.turn_s = min(2.0, timeout_s / 20)
        self.patience = round(0.75 * timeout_s / self.turn_s)  # turns
        self.ending: Optional[Ending] = None
        self._store = PrefixStore("watch", store.clone())  # type: ignore[attr-defined]
        self._exchanges = 0
        self._broken = False
        self._informed = 0  # ranks that know why a rank ends
        self._asked: Optional[int] = None  # the exchange at which a collective of this rank had failed
        self._failure = ""
        self._own_ending: Optional[Ending] = None
        self._at_door = False  # the main thread reports why it ends
        self._signs = {rank: Sign(0) for rank in range(ranks.world_size) if rank != ranks.rank}
        self._stopped, self._wake, self._decided = threading.Event(), threading.Event(), threading.Event()
        self._main = threading.main_thread().ident
        for target in (self._talk, self._count):
            threading.Thread(target=target, daemon=True).start()

    def stop(self) -> None:
        """End the watch: this rank's work is done, and from now on no rank is missed."""
        self._stopped.set()

    def end(self, text: str, printed: bool = True) -> Ending:
        """Publish why this rank ends, unless another rank was first; return what is published.

        For the main thread.
        """
        self._at_door, self._own_ending = True, Ending(self.ranks.rank, self.host, text, printed)
        self._wake.set()
        self._decided.wait(4 * self.turn_s)
        return self.ending or self._own_ending

    def explain(self, failure: str) -> Ending:
        """Return why a collective of this rank has failed.

        The reason is what another rank has published, a rank that is silent, a rank that has not come, or else
        `failure`. For the main thread.
        """
        self._at_door, self._failure, self._asked = True, failure, self._exchanges
        self._wake.set()
        self._decided.wait((self.patience + 4) * self.turn_s)
        return self.ending or Ending(self.ranks.rank, self.host, self._unanswered())

    def linger(self) -> None:
        """Give the others time to read why this rank ends, since the store may end with it."""
        until = time.monotonic() + 1.5 * self.turn_s
        while self._informed < self.ranks.world_size and time.monotonic() < until and not self._broken:
            self._wake.set()
            time.sleep(0.02)

    def message_here(self, ending: Ending) -> Optional[str]:
        """Return what this rank has to print of an ending, or None."""
        if ending.rank == self.ranks.rank:
            return ending.text
        if self.ranks.rank == 0 and not ending.printed:
            return f"rank {ending.rank}, on {ending.host}: {ending.text}"
        return None

    def _talk(self) -> None:
        while not self._stopped.is_set() and not self._broken:
            try:
                self._exchange()
            except DistError:  # whoever kept the store is gone
                self._broken = True
                if self.ending is None and self._at_door:
                    self._decide(self._own_ending or Ending(self.ranks.rank, self.host, self._unanswered()))
            self._wake.wait(self.turn_s)
            self._wake.clear()

    def _exchange(self) -> None:
        """Exchange once: publish our sign, read the others', and publish or read why a rank ends."""
        frame = sys._current_frames().get(self._main) if self._main else None
        sign = {"at": self._exchanges, "host": self.host, "place": place_of(frame)}
        self._store.set(f"sign/{self.ranks.rank}", json.dumps(sign))
        everyone = self.ranks.rank == 0 or self._asked is not None
        self._read([rank for rank in self._signs if everyone or rank == 0])
        self._exchanges += 1
        if self.ending is not None:
            self._informed = self._store.add("informed", 0)
            return
        self._own_ending = self._own_ending or self._judge()
        if self._own_ending is not None:
            standing = self._store.compare_set("end", "", json.dumps(asdict(self._own_ending)))
        elif self._store.check(["end"]):
            standing = self._store.get("end")
        else:
            return
        self._decide(Ending(**json.loads(standing)))
        self._informed = self._store.add("informed", 1)

    def _read(self, ranks: list[int]) -> None:
        known = [rank for rank in ranks if self._signs[rank].text or self._store.check([f"sign/{rank}"])]
        texts = self._store.multi_get([f"sign/{rank}" for rank in known]) if known else []
        for rank, text in zip(known, texts, strict=True):
            if text.decode() != self._signs[rank].text:
                sign = json.loads(text)
                self._signs[rank] = Sign(self._exchanges, sign["host"], text.decode(), sign["place"])

    def _decide(self, ending: Ending) -> None:
        self.ending = ending
        self._decided.set()

    def _judge(self) -> Optional[Ending]:
        """Return an ending that reports ranks, if there are any to report now."""
        age = {rank: self._exchanges - sign.at for rank, sign in self._signs.items()}
        if self._asked is not None:
            if self._exchanges < self._asked + 5:  # a live rank gives another sign meanwhile
                return None
            text = self._blame([rank for rank in age if age[rank] > 4])
        else:
            watched = age if self.ranks.rank == 0 else [0]
            silent = [rank for rank in watched if age[rank] > self.patience]
            if not silent:
                return None
            text = self._no_sign(silent)
        return Ending(self.ranks.rank, self.host, text)

    def _blame(self, silent: list[int]) -> str:
        """Return why a collective has failed."""
        if silent:
            return self._no_sign(silent)
        here = f"Rank {self.ranks.rank}, on {self.host},"
        late = [rank for rank, sign in self._signs.items() if sign.place != WAITING]
        if late:
            where = "; ".join(f"{self._name(rank)} is at {self._signs[rank].place}" for rank in late[:4])
            return (
                f"{here} waited {self.timeout_s:g} s (parallel.timeout) for ranks that are alive and did not come: "
                f"{where}. {AGAIN}; a longer parallel.timeout helps where they were only slow."
            )
        return (
            f"{here} could not exchange data with the others, which are all alive ({self._failure}): look at the "
            f"network between the hosts. {AGAIN}."
        )

    def _name(self, rank: int) -> str:
        host = self._signs[rank].host
        return f"rank {rank} (on {host})" if host else f"rank {rank}"

    def _no_sign(self, silent: list[int]) -> str:
        named = ", ".join(map(self._name, silent[:8])) + (f" and {len(silent) - 8} more" if len(silent) > 8 else "")
        return (
            f"No sign of life from {named}: stopped, or gone with its host, so all ranks end (parallel.timeout "
            f"{self.timeout_s:g} s). Look at that host and at the output of the rank. {AGAIN}."
        )

    def _unanswered(self) -> str:
        return self._no_sign([0]) if self.keeper == "rank 0" else f"{self.keeper} no longer answers. {AGAIN}."

    def _count(self) -> None:
        """Count turns without an answer, or since a rank's end is known, in a thread that nothing can delay."""
        seen, turns, grace = -1, 0, min(GRACE_S, self.timeout_s) / self.turn_s
        while not self._stopped.wait(self.turn_s):
            ending = self.ending
            turns = turns + 1 if ending is not None or self._exchanges == seen else 0
            seen = self._exchanges
            if ending is not None:
                own = ending.rank == self.ranks.rank and not self._at_door
                if turns > (2 if own else grace):  # let the others read it first, since the store may end with us
                    self.leave(None if self._at_door else self.message_here(ending))
            elif turns > (grace if self._broken else self.patience):
                self.leave(self._unanswered() if self.ranks.rank <= 1 or self.ranks.local_rank == 0 else None)
