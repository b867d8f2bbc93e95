"""Ranks meet before they work: whoever is missing, different or unable is named to all of them."""

from __future__ import annotations

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from megatron_switchlora.distributed.consensus import PeerError
from megatron_switchlora.startup.environment import RankError, Ranks
from megatron_switchlora.startup.preflight import Verdict, meet, publish_error, spans
from tests.dist.launch import free_port

SAME = {"optim.lr": 0.02, "the code's digest": "abc"}


def on_host(name: str, port: int) -> dict[str, str]:
    """Environment of a rank that srun started on a host."""
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "SLURM_STEP_ID": "0", "SLURMD_NODENAME": name}


def call(hosts: str, sames: list[dict[str, Any]], timeout: float = 20, port: int = 0, **env: str) -> list[Any]:
    """What each rank gets of `meet`; one rank a host."""
    port = port or free_port()

    def one(rank: int) -> Any:
        place = on_host(hosts.split()[rank], port) | env
        try:
            return meet(place, Ranks(rank, len(hosts.split()), 0, 1), sames[rank], timeout)
        except Exception as error:
            return error

    with ThreadPoolExecutor() as pool:
        return list(pool.map(one, range(len(sames))))


def test_ranks_that_are_alike_get_a_store() -> None:
    first, second = call("n1 n2", [SAME, SAME])
    first.set("word", "yes")
    assert second.get("word") == b"yes"


def test_the_odd_one_is_named_to_everyone() -> None:
    told = call("n1 n2 n3", [SAME | {"optim.lr": 0.5}, SAME, SAME])
    assert {type(error) for error in told} == {Verdict} and len({str(error) for error in told}) == 1
    assert "optim.lr is 0.5 on ranks 0 (n1) and 0.02 on the others" in str(told[0])
    assert "digest" not in str(told[0])


def test_of_two_rank_0_counts_and_a_lacking_option_differs() -> None:
    told = call("n1 n2", [SAME, {"optim.lr": 0.02}])
    assert 'the code\'s digest is null on ranks 1 (n2) and "abc" on the others' in str(told[0])


def test_hosts_with_other_numbers_of_ranks() -> None:
    port = free_port()

    def one(rank: int) -> str:
        ranks = [Ranks(0, 3, 0, 2), Ranks(1, 3, 1, 2), Ranks(2, 3, 0, 1)][rank]
        with pytest.raises(Verdict) as told:
            meet(on_host(["n1", "n1", "n2"][rank], port), ranks, SAME, 20)
        return str(told.value)

    with ThreadPoolExecutor() as pool:
        for text in pool.map(one, range(3)):
            assert "Every host must run the same number of ranks, but there are n1 2, n2 1:" in text


def test_rank_0_knows_of_other_numbers() -> None:
    port = free_port()
    with ThreadPoolExecutor() as pool:
        first, second = (
            pool.submit(meet, on_host(f"n{rank}", port), Ranks(rank, 2, 0, 1), SAME, 20) for rank in (0, 1)
        )
        with pytest.raises(RankError, match="Rank 2, on n3, counts 3 ranks and rank 0 counts 2:"):
            meet(on_host("n3", port), Ranks(2, 3, 0, 1), SAME, 20)
        assert first.result() and second.result()


def test_restarts_by_torchrun_on_several_hosts() -> None:
    env = on_host("n1", free_port()) | {"TORCHELASTIC_MAX_RESTARTS": "3"}
    with pytest.raises(Verdict, match="torchrun --max-restarts must be 0 on several hosts, not 3"):
        meet(env, Ranks(0, 2, 0, 1), SAME, 1)


def test_a_rank_that_does_not_come_is_named_with_its_host() -> None:
    told = call("n1 n2 n3", [SAME, SAME], timeout=1, LAUNCH_HOSTS="n1,n2.example.org,n3")
    assert {type(error) for error in told} == {Verdict}
    assert "Of 3 ranks 2 did not come within 1 s" in str(told[0])
    assert "Ranks came from n1, n2; none came from n3:" in str(told[0])
    by_address = call("n1 n2 n3", [SAME, SAME], timeout=1, LAUNCH_HOSTS="10.0.0.1,10.0.0.2,10.0.0.3")
    assert "none came from" not in str(by_address[0])


def test_a_rank_that_cannot_start_tells_why() -> None:
    port = free_port()
    with ThreadPoolExecutor() as pool:
        others = pool.submit(call, "n1 n2 n3", [SAME, SAME], 20, port)
        assert publish_error(on_host("n3", port), Ranks(2, 3, 0, 1), "data.files: there is no corpus.txt")
        for error in others.result():
            assert isinstance(error, Verdict) and "rank 2, on n3, cannot start: data.files: there is no" in str(error)


def test_nobody_at_the_place() -> None:
    began = time.monotonic()
    with pytest.raises(RankError, match=r"Rank 1, on n2, found nobody at 127\.0\.0\.1:\d+ within 1 s"):
        meet(on_host("n2", free_port()), Ranks(1, 2, 0, 1), SAME, 1)
    with pytest.raises(PeerError):  # its host's first rank has said it
        meet(on_host("n2", free_port()), Ranks(2, 3, 1, 2), SAME, 1)
    assert not publish_error(on_host("n2", free_port()), Ranks(2, 3, 1, 2), "never heard", 1)
    assert time.monotonic() - began < 30


def test_a_port_in_use() -> None:
    """Before a service that never answers other ranks give up, too."""
    with socket.socket() as stranger:
        stranger.bind(("0.0.0.0", 0))
        stranger.listen()
        port = stranger.getsockname()[1]
        with pytest.raises(RankError, match=f"Rank 0, on n1, must listen on port {port}, but another process"):
            meet(on_host("n1", port), Ranks(0, 2, 0, 1), SAME, 2)
        with pytest.raises(RankError, match="Rank 1, on n2, found nobody"):
            meet(on_host("n2", port), Ranks(1, 2, 0, 1), SAME, 1)


def test_ranks_that_meet_within_the_host_listen_there_alone() -> None:
    port = free_port()
    stores = call("n1 n2", [SAME, SAME], port=port)
    rows = [line.split() for kind in ("tcp", "tcp6") for line in Path("/proc/net", kind).read_text().splitlines()]
    places = {row[1].split(":")[0] for row in rows if row[3] == "0A" and row[1].endswith(f":{port:04X}")}
    assert places == {"0100007F"} and len(stores) == 2, places


def test_spans() -> None:
    assert spans([3, 0, 1, 2, 7, 9, 8]) == "0-3, 7-9" and spans([5]) == "5"
