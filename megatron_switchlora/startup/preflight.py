"""Check before the first collective that every rank is there and that all run the same.

Ranks meet in torch's key-value store at MASTER_ADDR:MASTER_PORT, from which process groups are made afterwards. Each
rank publishes what it is: host, position, device, configuration, digest of the code. Rank 0 waits for all of them,
compares, and publishes a verdict. So a host that does not come, or runs other code or options, is reported within a
time-out. A collective would hang, or mix data that does not belong together.

A rank that cannot start at all, as for a file that its host lacks, publishes its error (`publish_error`). Nothing is
pickled.
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
    """Why the ranks cannot start together, known to all of them."""


@dataclass
class Presence:
    """What a rank publishes about itself.

    `same` must be equal on all ranks; `problem` is why this rank cannot start.
    """

    host: str
    local_rank: int
    local_size: int
    same: dict[str, Any] = field(default_factory=dict)
    problem: Optional[str] = None


def meet(env: Mapping[str, str], ranks: Ranks, same: dict[str, Any], timeout_s: float) -> Store:
    """Wait for all ranks of a completed environment; return the store for their process groups. Collective.

    Raises:
        Verdict: on every rank: ranks have not come, cannot start, or differ.
        RankError: rank 0 cannot listen or be reached, or counts another number of ranks, and only this rank knows.
        PeerError: on other ranks: rank 0 is gone.
    """
    if int(env.get("TORCHELASTIC_MAX_RESTARTS", 0)) and ranks.local_size < ranks.world_size:
        raise Verdict(
            f"torchrun --max-restarts must be 0 on several hosts, not {env['TORCHELASTIC_MAX_RESTARTS']}: its agents "
            "count restarts separately. After a failure start it again: it resumes from its newest checkpoint."
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
                raise PeerError("rank 0 does not answer")
            time.sleep(0.1)
        verdict = json.loads(store.get("verdict"))
        if verdict["text"] and ranks.rank == 0:
            time.sleep(0.5)  # rank 0 keeps the store: let the others read why, too
    except DistError as error:
        raise PeerError(f"rank 0 is gone: {error}") from None
    if verdict["text"]:
        raise Verdict(verdict["text"])
    if verdict["world_size"] != ranks.world_size:
        raise RankError(
            f"Rank {ranks.rank}, on {own_host(env)}, counts {ranks.world_size} ranks and rank 0 counts "
            f"{verdict['world_size']}: start all with one launcher and the same numbers."
        )
    return PrefixStore("groups", store)


def report_error(env: MutableMapping[str, str], error: UserError | PeerError) -> bool:
    """Print why this start ends, once; return whether this rank printed it, or rank 0 has received it.

    Rank 0 prints it, except for what only another rank knows. Launchers end all ranks as soon as one has ended, so the
    others return after rank 0 has printed.
    """
    met = dist.is_initialized() or isinstance(error, (Verdict, RankError, PeerError))
    if is_first(env):
        if isinstance(error, UserError):
            print(f"error: {error}", file=sys.stderr, flush=True)
        if not met and env.get("RANK") == "0" and by_agent(env):
            with contextlib.suppress(UserError):
                publish_error(env, discover_ranks(env), str(error))
        return True
    heard = False
    with contextlib.suppress(KeyboardInterrupt):  # the launcher's signal: rank 0 has printed
        if isinstance(error, RankError):
            print(f"error: {error}", file=sys.stderr, flush=True)
            heard = True
        elif not met:
            heard = _report_to_rank_0(env, str(error))
        time.sleep(1.0)
    return heard


def _report_to_rank_0(env: MutableMapping[str, str], problem: str) -> bool:
    """Publish an error that rank 0 may not see, such as a file that this host lacks, before the ranks have met."""
    try:
        ranks = discover_ranks(env)
        complete_environment(env)
    except UserError:  # it cannot even find the others, who may see nothing wrong: once per host
        if is_first_here(env):
            print(f"error: on {own_host(env)}: {problem}", file=sys.stderr, flush=True)
        return False
    heard = publish_error(env, ranks, problem)
    if not heard and ranks.local_size < ranks.world_size and ranks.local_rank == 0:
        # Rank 0 printed the same, or is too far behind to receive it: better twice than never.
        print(f"error: rank {ranks.rank}, on {own_host(env)}: {problem}", file=sys.stderr, flush=True)
    return heard


def publish_error(
    env: Mapping[str, str], ranks: Ranks, problem: str, timeout_s: float = 5, patience_s: float = 120
) -> bool:
    """Publish this rank's start-up error so that rank 0 can print it; return whether it was received.

    Under torchrun, whose agent keeps the store, rank 0 publishes its own error for the others.
    """
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
        return False  # rank 0 is gone, for the same reason or another, or is far behind
    return True


def _key(rank: int) -> str:
    return f"here/{rank}"


def by_agent(env: Mapping[str, str]) -> bool:
    """Return whether torchrun's agent keeps the store; it outlives its ranks."""
    return env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _open_store(env: Mapping[str, str], ranks: Ranks, timeout_s: float) -> Store:
    """Open the store: rank 0 serves it, except under torchrun, whose agent does.

    Raises:
        RankError: rank 0 cannot listen, or this host cannot reach it.
        PeerError: this host cannot reach it, and its first rank reports that.
    """
    host, port = env["MASTER_ADDR"], int(env["MASTER_PORT"])
    serves = ranks.rank == 0 and not by_agent(env)
    try:
        store = _connect(host, port, ranks.world_size, serves, timeout_s)
    except (DistError, RuntimeError) as error:
        place, reason = f"{host}:{port}", str(error).strip().splitlines()[0]
        if serves and "EADDRINUSE" in reason:
            raise RankError(
                f"Rank 0, on {own_host(env)}, must listen on port {port}, but another process already does: set "
                "MASTER_PORT (torchrun, deepspeed: --master_port) to a free one."
            ) from None
        if ranks.local_rank:
            raise PeerError(f"nobody at {place}") from None  # its host's first rank reports it
        raise RankError(
            f"Rank {ranks.rank}, on {own_host(env)}, found nobody at {place} within {timeout_s:g} s ({reason}): rank 0 "
            "must run on that host, and this host must reach it there: check the name, the network and firewalls, or "
            "set MASTER_ADDR; parallel.start_timeout waits longer."
        ) from None
    return PrefixStore(f"preflight {env.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _connect(host: str, port: int, world: int, serves: bool, timeout_s: float) -> Store:
    """Connect once somebody listens.

    The connection is made in a thread: before an unrelated service it never returns, and it does not notice signals.

    Raises:
        DistError: nobody listens in time, or nobody answers.
    """
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
    """Return a socket that listens within this host, owned by whoever gets it.

    torch's own socket would listen on every interface.

    Raises:
        DistError: the port cannot be used.
    """
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
        except OSError as error:
            raise DistError(f"{errno.errorcode.get(error.errno or 0)}: {error.strerror}") from None
        listener.listen(2048)
        return listener.detach()


def _wait_for_listener(host: str, port: int, deadline: float) -> None:
    """Wait until somebody listens.

    Raises:
        DistError: nobody listens in time.
    """
    while True:
        try:
            return socket.create_connection((host, port), timeout=5).close()
        except OSError as error:
            if time.monotonic() > deadline:
                raise DistError(str(error)) from None
        time.sleep(0.1)


def _verdict(env: Mapping[str, str], store: Store, world: int, timeout_s: float) -> Optional[str]:
    """Return what is wrong with the ranks that come within the time-out, or with their number."""
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
    """Return the message for ranks that did not come."""
    hosts = {presence.host for presence in present.values()}
    here, all_hosts = {_short(host) for host in hosts}, expected_hosts(env)
    known = here <= {_short(host) for host in all_hosts}  # else they go by other names, or are incomplete
    silent = [host for host in all_hosts if known and _short(host) not in here]
    return (
        f"Of {len(present) + len(missing)} ranks {spans(missing)} did not come within {timeout_s:g} s (parallel."
        f"start_timeout). Ranks came from {', '.join(sorted(hosts))}"
        + (f"; none came from {', '.join(silent)}" if silent else "")
        + ": look at the output of the missing ranks, and whether their hosts are up and reach "
        f"{env['MASTER_ADDR']}:{env['MASTER_PORT']}."
    )


def _short(host: str) -> str:
    """Return a host's name without its domain; an address stays whole."""
    return host if host.replace(".", "").isdigit() else host.split(".")[0]


def _odd_ones(present: dict[int, Presence]) -> Optional[str]:
    """Return which ranks differ, and in what, from most of the ranks; from rank 0 in a draw."""
    sizes = {presence.host: presence.local_size for presence in present.values()}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{host} {size}" for host, size in sorted(sizes.items()))
        return (
            f"Every host must run the same number of ranks, but there are {listed}: start as many "
            "on each, or leave a host out."
        )
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
    """Format numbers as spans, such as "0-3, 7"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)
