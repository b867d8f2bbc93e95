"""mpirun and the deepspeed launcher across two hosts; hosts that are silent, or have other code."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.dist.launch import REPOSITORY, descendants, free_port
from tests.system.cluster import Cluster
from tests.system.commands import BIN
from tests.system.hosts import Hosts, missing_parts
from tests.system.soak import comparable

reason = missing_parts("pdsh")
pytestmark = [
    pytest.mark.full,
    pytest.mark.timeout(300),
    pytest.mark.skipif(reason is not None, reason=str(reason)),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Hosts(tmp_path_factory.mktemp("hosts")) as hosts:
        yield Cluster(hosts)


@pytest.fixture(autouse=True)
def nothing_is_left(cluster: Cluster) -> Iterator[None]:
    """A failed test must not disturb the next."""
    yield
    cluster.hosts.run("n1", ["sh", "-c", "pkill -KILL -f '[l]aunch/pretrain.py' || true"])


@pytest.fixture(scope="module")
def on_one_host(cluster: Cluster) -> list[dict[str, Any]]:
    """Records of the same run with both ranks on one host."""
    words = [str(BIN / "torchrun"), "--nproc_per_node", "2", "--master_port", str(free_port()), "launch/pretrain.py"]
    cluster.finish(cluster.start("n1", [*words, *cluster.options("one_host")]))
    return cluster.records("one_host")


def crossed(cluster: Cluster, words: list[str], run: str, *others: subprocess.Popen) -> list[dict[str, Any]]:
    """Records of a run on both hosts, which have sent each other what the ranks handed over. `others`: what was
    started for it before."""
    before = cluster.hosts.sent_bytes("n2")
    for process in (cluster.start("n1", words), *others):
        cluster.finish(process)
    records = cluster.records(run)
    handed_over = sum(record.get("dp_bytes", 0) for record in records)
    assert cluster.hosts.sent_bytes("n2") - before > handed_over > 0
    assert cluster.pids() == []
    return records


def test_mpirun_with_a_file_of_hosts(cluster: Cluster, on_one_host: list[dict[str, Any]]) -> None:
    """Hosts by name train in the test that kills a rank."""
    hosts = cluster.folder / "hosts.txt"
    hosts.write_text("# both\nn1 slots=1\nn1 slots=1\n\nn2:1\r\n")
    words = ["launch/mpi/pretrain.sh", str(hosts), "1", *cluster.options("mpi")]
    assert comparable(crossed(cluster, words, "mpi")) == comparable(on_one_host)


def test_a_mistyped_file_of_hosts_is_told(cluster: Cluster) -> None:
    process = cluster.start("n1", ["launch/mpi/pretrain.sh", str(cluster.folder / "host.txt"), "1"])
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 2 and "there is no file" in output, output


def test_deepspeed_with_a_hostfile(cluster: Cluster, on_one_host: list[dict[str, Any]]) -> None:
    """It hands the words to a shell on each host, which would expand a pattern: that stands in a file."""
    (cluster.folder / "hostfile").write_text("n1 slots=1\nn2 slots=1\n")
    (cluster.folder / "data.yaml").write_text(f"data:\n  files: {cluster.corpus}/*.txt\n")
    options = [word for word in cluster.options("deepspeed") if word != "--data.files" and "*" not in word]
    words = [str(BIN / "deepspeed"), "--hostfile", str(cluster.folder / "hostfile"), "--master_port", str(free_port()),
             "launch/pretrain.py", *options, "--config", str(cluster.folder / "data.yaml")]  # fmt: skip
    assert comparable(crossed(cluster, words, "deepspeed")) == comparable(on_one_host)


def test_torchrun(cluster: Cluster, on_one_host: list[dict[str, Any]]) -> None:
    words = [str(BIN / "torchrun"), "--nnodes", "2", "--nproc_per_node", "1", "--master_addr", "n1", "--master_port",
             str(free_port()), "launch/pretrain.py", *cluster.options("torchrun")]  # fmt: skip
    second = cluster.start("n2", [*words[:5], "--node_rank", "1", *words[5:]])
    assert comparable(crossed(cluster, words, "torchrun", second)) == comparable(on_one_host)


def test_a_killed_rank_ends_mpirun_on_both_hosts(cluster: Cluster) -> None:
    words = ["launch/mpi/pretrain.sh", "n1,n2", "1", *cluster.options("killed", "--train.steps", "100000")]
    process = cluster.start("n1", words)
    deadline = time.monotonic() + 60
    while len(cluster.records("killed")) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    ranks = cluster.pids()
    assert len(ranks) == 2
    cluster.hosts.run("n1", ["kill", "-9", str(ranks[1])])
    cluster.wait_until_gone(30)
    process.communicate(timeout=10)
    assert process.returncode != 0


def test_a_silent_host_is_named(cluster: Cluster) -> None:
    """Rank 0 waits in vain; of the other host rank 1 says that it found nobody."""
    first = cluster.rank("n1", 0, "silent", "--parallel.start_timeout", "3", LAUNCH_HOSTS="n1,n2")
    output, _ = first.communicate(timeout=60)
    assert first.returncode == 2 and "ranks 1 did not come within 3 s" in output, output
    assert "none came from n2" in output
    cluster.hosts.run("n2", ["ip", "link", "set", "eth0", "down"])
    try:
        second = cluster.rank("n2", 1, "silent", "--parallel.start_timeout", "3")
        output, _ = second.communicate(timeout=60)
    finally:
        cluster.hosts.run("n2", ["ip", "link", "set", "eth0", "up"])
    assert second.returncode == 2 and re.search(r"Rank 1, on n2, found nobody at n1:\d+ within 3 s", output), output
    assert cluster.pids() == []


def test_another_copy_of_the_code_is_refused(cluster: Cluster) -> None:
    copy = cluster.folder / "copy"
    for name in ("megatron_switchlora", "ds_configs"):
        shutil.copytree(REPOSITORY / name, copy / name)
    with open(copy / "megatron_switchlora" / "methods" / "full.py", "a") as file:
        file.write("# one more line\n")
    port = str(free_port())
    second = cluster.rank("n2", 1, "copies", MASTER_PORT=port, PYTHONPATH=str(copy))
    first = cluster.rank("n1", 0, "copies", MASTER_PORT=port)
    outputs = [process.communicate(timeout=60)[0] for process in (first, second)]
    assert (first.returncode, second.returncode) == (2, 2)
    assert re.search(r"the code's digest is \"\w+\" on ranks 1 \(n2\) and \"\w+\" on the others", outputs[0]), outputs
    assert "error:" not in outputs[1]
    assert not Path(cluster.folder / "copies").exists()


def test_a_rank_that_cannot_find_the_others_says_so_on_its_host(cluster: Cluster) -> None:
    """Rank 0 waits for it in vain."""
    port = str(free_port())
    first = cluster.rank("n1", 0, "unset", "--parallel.start_timeout", "4", MASTER_PORT=port)
    second = cluster.rank("n2", 1, "unset", MASTER_PORT="none")
    outputs = [process.communicate(timeout=60)[0] for process in (first, second)]
    assert (first.returncode, second.returncode) == (2, 2)
    assert "error: on n2: MASTER_PORT must be a whole number" in outputs[1], outputs
    assert "ranks 1 did not come within 4 s" in outputs[0], outputs


def test_what_was_started_goes_with_a_test_that_is_killed(tmp_path: Path) -> None:
    """The island's processes, its mounts and interfaces, after kill -9 of who made it."""
    code = (
        "import sys, time; from pathlib import Path; from tests.system.hosts import Hosts\n"
        "with Hosts(Path(sys.argv[1])) as hosts:\n"
        "    hosts.start('n2', ['sleep', '4321']); time.sleep(0.5)\n"
        "    print(hosts.first_pid, flush=True); time.sleep(60)"
    )
    maker = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    try:
        assert maker.stdout is not None
        first = int(maker.stdout.readline())
        inside = [pid for pid in descendants(maker.pid) if Path(f"/proc/{pid}/comm").read_text() == "sleep\n"]
        assert Path(f"/proc/{first}").exists() and inside
    finally:
        maker.kill()
        maker.wait()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in (first, *inside)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert "br0" not in Path("/proc/net/dev").read_text()
    assert str(tmp_path) not in Path("/proc/mounts").read_text()


def test_a_file_that_one_host_lacks(cluster: Cluster) -> None:
    port = str(free_port())
    second = cluster.rank("n2", 1, "lacking", "--config", "nowhere.yaml", MASTER_PORT=port)
    first = cluster.rank("n1", 0, "lacking", MASTER_PORT=port)
    outputs = [process.communicate(timeout=60)[0] for process in (first, second)]
    assert (first.returncode, second.returncode) == (2, 2)
    assert "rank 1, on n2, cannot start:" in outputs[0] and "nowhere.yaml" in outputs[0], outputs
