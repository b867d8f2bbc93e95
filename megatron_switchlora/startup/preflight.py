"""Before the first collective: is every rank there, and do all run the same?

Ranks meet in torch's key-value store at MASTER_ADDR:MASTER_PORT, of which process groups are made afterwards. Each
lays down what it is (host, position, device, configuration, digest of the code); rank 0 waits for all of them, compares
and lays down a verdict. So a host that does not come, or runs other code or options, is named within a time-out,
where a collective would hang or mix what does not belong together. A rank that cannot start at all (a file that
its host lacks) can still tell why (`publish_error`). Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import errno
import json
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from threading import Thread
from typing import Any, Optional

import torch.distributed as dist
from torch.distributed import DistError, PrefixStore, Store, TCPStore

from megatron_switchlora.config.errors import UserError
from megatron_switchlora.distributed.consensus import PeerError
from megatron_switchlora.startup.environment import (
    RankError,
    Ranks,
    complete_environment,
    discover_ranks,
    meets_on_loopback,
)
from megatron_switchlora.startup.launchers import expected_hosts, is_first, is_first_here, own_host


class Verdict(UserError):
    """Why the ranks cannot go on together, known to all of them."""


@dataclass
class Presence:
    """What a rank says of itself. `same` must be equal on all ranks; `problem` is why it cannot start."""

    host: str
    local_rank: int
    local_size: int
    same: dict[str, Any] = field(default_factory=dict)
    problem: Optional[str] = None


def meet(env: Mapping[str, str], ranks: Ranks, same: dict[str, Any], timeout_s: float) -> Store:
    """Wait for all ranks of a completed environment; returns the store for their process groups. Collective.

    Raises:
        Verdict: ranks have not come, cannot start, or differ; on every rank.
        RankError: rank 0 cannot listen or be reached, or counts other ranks, where only this rank knows.
        PeerError: on other ranks, if rank 0 has gone.
    """
    if int(env.get("TORCHELASTIC_MAX_RESTARTS", 0)) and ranks.local_size < ranks.world_size:
        raise Verdict(
            f"torchrun --max-restarts must be 0 on several hosts, not {env['TORCHELASTIC_MAX_RESTARTS']}: its agents "
            "count restarts apart. Start it again after a failure; it goes on from its newest checkpoint."
        )
    store = _open_store(env, ranks, timeout_s)
    presence = Presence(own_host(env), ranks.local_rank, ranks.local_size, same)
    try:
        store.set(_key(ranks.rank), json.dumps(asdict(presence)))
        if ranks.rank == 0:
            text = _verdict(env, store, ranks.world_size, timeout_s) or ""
            store.set("verdict", json.dumps({"text": text, "world_size": ranks.world_size}))
        deadline = time.monotonic() + 2 * timeout_s
        while not store.check(["verdict"]):  # not store.wait, in which signals would wait too
            if time.monotonic() > deadline:
                raise PeerError("rank 0 says nothing")
            time.sleep(0.1)
        verdict = json.loads(store.get("verdict"))
        if verdict["text"] and ranks.rank == 0:
            time.sleep(0.5)  # rank 0 keeps the store: let the others read why, too
    except DistError as error:
        raise PeerError(f"rank 0 has gone: {error}") from None
    if verdict["text"]:
        raise Verdict(verdict["text"])
    if verdict["world_size"] != ranks.world_size:
        raise RankError(
            f"Rank {ranks.rank}, on {own_host(env)}, was told of {ranks.world_size} ranks and rank 0 of "
            f"{verdict['world_size']}: start all with one launcher and the same numbers."
        )
    return PrefixStore("groups", store)


def report_error(env: MutableMapping[str, str], error: UserError | PeerError) -> bool:
    """Print why this start ends: once, by rank 0, but for what only another rank knows. Launchers end all ranks when
    one has ended, so the others return when rank 0 has spoken. Returns whether it was said here, or rank 0 has heard
    of it from here."""
    met = dist.is_initialized() or isinstance(error, (Verdict, RankError, PeerError))
    if is_first(env):
        if isinstance(error, UserError):
            print(f"error: {error}", file=sys.stderr, flush=True)
        if not met and env.get("RANK") == "0" and by_agent(env):
            with contextlib.suppress(UserError):
                publish_error(env, discover_ranks(env), str(error))
        return True
    heard = False
    with contextlib.suppress(KeyboardInterrupt):  # the launcher's signal: rank 0 has spoken
        if isinstance(error, RankError):
            print(f"error: {error}", file=sys.stderr, flush=True)
            heard = True
        elif not met:
            heard = _report_to_rank_0(env, str(error))
        time.sleep(1.0)
    return heard


def _report_to_rank_0(env: MutableMapping[str, str], problem: str) -> bool:
    """Before the ranks have met a rank may see what rank 0 does not: a file that its host lacks."""
    try:
        ranks = discover_ranks(env)
        complete_environment(env)
    except UserError:  # it cannot even find the others, who may see nothing wrong: once a host
        if is_first_here(env):
            print(f"error: on {own_host(env)}: {problem}", file=sys.stderr, flush=True)
        return False
    heard = publish_error(env, ranks, problem)
    if not heard and ranks.local_size < ranks.world_size and ranks.local_rank == 0:
        # Rank 0 said the same, or is too far behind to be told: better twice than never.
        print(f"error: rank {ranks.rank}, on {own_host(env)}: {problem}", file=sys.stderr, flush=True)
    return heard


def publish_error(
    env: Mapping[str, str], ranks: Ranks, problem: str, timeout_s: float = 5, patience_s: float = 120
) -> bool:
    """Lay down why this rank cannot start, for rank 0, which perhaps does not see it, and wait until it has said so;
    from rank 0, under torchrun, whose agent keeps the store, for the others. Returns whether it was heard."""
    try:
        store = _open_store(env, ranks, timeout_s)
        if ranks.rank == 0:
            store.set("verdict", json.dumps({"text": problem, "world_size": ranks.world_size}))
            return True
        presence = Presence(own_host(env), ranks.local_rank, ranks.local_size, {}, problem)
        store.set(_key(ranks.rank), json.dumps(asdict(presence)))
        deadline = time.monotonic() + patience_s
        while not store.check(["verdict"]):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
    except (DistError, RankError, PeerError):
        return False  # rank 0 has gone, for the same reason or another, or is far behind
    return True


def _key(rank: int) -> str:
    return f"here/{rank}"


def by_agent(env: Mapping[str, str]) -> bool:
    """Whether torchrun's agent, which outlives its ranks, keeps the store."""
    return env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _open_store(env: Mapping[str, str], ranks: Ranks, timeout_s: float) -> Store:
    """Rank 0 serves, but under torchrun, whose agent does."""
    host, port = env["MASTER_ADDR"], int(env["MASTER_PORT"])
    serves = ranks.rank == 0 and not by_agent(env)
    try:
        store = _connect(host, port, ranks.world_size, serves, timeout_s)
    except (DistError, RuntimeError) as error:
        place, reason = f"{host}:{port}", str(error).strip().splitlines()[0]
        if serves and "EADDRINUSE" in reason:
            raise RankError(
                f"Rank 0, on {own_host(env)}, must listen on port {port}, but another process there does: set "
                "MASTER_PORT (torchrun, deepspeed: --master_port) to a free one."
            ) from None
        if ranks.local_rank:
            raise PeerError(f"nobody at {place}") from None  # its host's first rank says it
        raise RankError(
            f"Rank {ranks.rank}, on {own_host(env)}, found nobody at {place} within {timeout_s:g} s ({reason}): rank 0 "
            "must run on that host, and this host must reach it there: check the name, the network and firewalls, or "
            "set MASTER_ADDR; parallel.start_timeout waits longer."
        ) from None
    return PrefixStore(f"roll call {env.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _connect(host: str, port: int, world: int, serves: bool, timeout_s: float) -> Store:
    """Once somebody listens. In a thread: before a stranger's service it never returns, and it hears no signals."""
    deadline = time.monotonic() + timeout_s
    outcome: list[Any] = []

    def connect() -> None:
        try:
            limit = timedelta(seconds=timeout_s)
            outcome.append(TCPStore(host, port, world, serves, limit, wait_for_workers=False, master_listen_fd=ours))
        except Exception as error:
            outcome.append(error)

    ours = _listen(port) if serves and meets_on_loopback({"MASTER_ADDR": host}) else None
    if not serves:
        _wait_for_listener(host, port, deadline)
    Thread(target=connect, daemon=True).start()
    while not outcome and time.monotonic() < deadline + 5:
        time.sleep(0.02)
    result: Any = outcome[0] if outcome else DistError("no answer")
    if isinstance(result, Exception):
        raise result
    return result


def _listen(port: int) -> int:
    """A socket within this host, whose owner is whoever gets it; torch's own would listen on every interface."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
        except OSError as error:
            raise DistError(f"{errno.errorcode.get(error.errno or 0)}: {error.strerror}") from None
        listener.listen(2048)
        return listener.detach()


def _wait_for_listener(host: str, port: int, deadline: float) -> None:
    """Raises: DistError, if there is none in time."""
    while True:
        try:
            return socket.create_connection((host, port), timeout=5).close()
        except OSError as error:
            if time.monotonic() > deadline:
                raise DistError(str(error)) from None
        time.sleep(0.1)


def _verdict(env: Mapping[str, str], store: Store, world: int, timeout_s: float) -> Optional[str]:
    """What is wrong with the ranks that come within the time-out, or with their number."""
    deadline, missing = time.monotonic() + timeout_s, set(range(world))
    present: dict[int, Presence] = {}
    while missing:
        for rank in [rank for rank in sorted(missing) if store.check([_key(rank)])]:
            present[rank] = Presence(**json.loads(store.get(_key(rank))))
            missing.discard(rank)
            if present[rank].problem:
                return f"rank {rank}, on {present[rank].host}, cannot start: {present[rank].problem}"
        if missing and time.monotonic() > deadline:
            return _absent(env, present, missing, timeout_s)
        time.sleep(0.02 if missing else 0)
    return _odd_ones(present)


def _absent(env: Mapping[str, str], present: dict[int, Presence], missing: set[int], timeout_s: float) -> str:
    hosts = {presence.host for presence in present.values()}
    here, all_hosts = {_short(host) for host in hosts}, expected_hosts(env)
    known = here <= {_short(host) for host in all_hosts}  # else they go by other names, or are a part
    silent = [host for host in all_hosts if known and _short(host) not in here]
    return (
        f"Of {len(present) + len(missing)} ranks {spans(missing)} did not come within {timeout_s:g} s (parallel."
        f"start_timeout). Here are ranks on {', '.join(sorted(hosts))}"
        + (f"; nothing was heard of {', '.join(silent)}" if silent else "")
        + ": look at the output of the missing ranks, and whether their hosts are up and reach "
        f"{env['MASTER_ADDR']}:{env['MASTER_PORT']}."
    )


def _short(host: str) -> str:
    """A host's name without its domain; an address is one word."""
    return host if host.replace(".", "").isdigit() else host.split(".")[0]


def _odd_ones(present: dict[int, Presence]) -> Optional[str]:
    """Who differs, and in what, from what most ranks say (from rank 0, where it is a draw)."""
    sizes = {presence.host: presence.local_size for presence in present.values()}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{host} {size}" for host, size in sorted(sizes.items()))
        return f"Every host must run the same number of ranks, but there are {listed}: give each as many, or leave out."
    names = sorted({name for presence in present.values() for name in presence.same})
    differences = []
    for name in names:
        values = {rank: json.dumps(presence.same.get(name)) for rank, presence in sorted(present.items())}
        counts = Counter(values.values())
        if len(counts) == 1:
            continue
        usual = max(counts, key=lambda value: (counts[value], value == values[0]))
        odd = [rank for rank, value in values.items() if value != usual]
        hosts = ", ".join(sorted({present[rank].host for rank in odd}))
        differences.append(f"{name} is {values[odd[0]]} on ranks {spans(odd)} ({hosts}) and {usual} on the others")
    if not differences:
        return None
    more = f"; and {len(differences) - 3} more" if len(differences) > 3 else ""
    return (
        f"All ranks must run the same, but {'; '.join(differences[:3])}{more}: start every host with the same command "
        "line, files and copy of the code."
    )


def spans(numbers: Iterable[int]) -> str:
    """0-3, 7"""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts)
