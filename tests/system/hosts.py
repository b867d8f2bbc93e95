"""Several hosts on this machine: network namespaces with addresses and names of their own, on one bridge.

All of it lives in one island of namespaces (processes, mounts, network): when the island's first process ends, and it
does with the one that started it, the kernel ends every process inside and takes the interfaces and mounts away. Files
are those of this machine; hosts are called n1, n2, ... at 10.77.0.1, ... on the interface eth0. Needs root.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any, Optional

from tests.dist.launch import end

SETUP = """
set -e
mkdir -p /run/netns
mount -t tmpfs none /run/netns
mount --bind "$1" /etc/hosts
ip link add br0 type bridge
ip link set br0 up
for i in $(seq "$2"); do
  ip netns add "n$i"
  ip link add "p$i" type veth peer name eth0 netns "n$i"
  ip link set "p$i" master br0 up
  ip -n "n$i" addr add "10.77.0.$i/24" dev eth0
  ip -n "n$i" link set eth0 up
  ip -n "n$i" link set lo up
done
touch "$3"
sleep infinity &
while :; do wait; done  # and reap what is left behind
"""
SSH = """#!/bin/sh
while true; do
  case "$1" in
    -[bcDEeFIiJLlmOopQRSWw]) shift 2 ;;
    -*) shift ;;
    *) break ;;
  esac
done
host="${1#*@}"
shift
exec ip netns exec "$host" unshare --uts sh -c 'hostname "$0"; exec sh -c "$*"' "$host" "$@"
"""
ISLAND = ["unshare", "--mount", "--net", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child=KILL"]
ENTER_HOST = 'hostname "$0"; exec "$@"'


def missing_parts(*programs: str) -> Optional[str]:
    """Why there can be no such hosts here, with these programs."""
    if os.geteuid() != 0:
        return "needs root for network namespaces"
    lacking = [name for name in ("ip", "unshare", "nsenter", "setpriv", *programs) if shutil.which(name) is None]
    if lacking:
        return f"needs {', '.join(lacking)} (Debian: iproute2, util-linux, slurmctld, slurmd, munge)"
    island = [*ISLAND, "ip", "link", "add", "probe", "type", "veth", "peer", "name", "other"]
    tried = subprocess.run(island, capture_output=True, text=True, timeout=20)
    return (
        f"needs network namespaces, which root may not make here: {tried.stderr.strip()}" if tried.returncode else None
    )


class Hosts:
    """`count` hosts; a context manager. `folder` is for its files."""

    def __init__(self, folder: Path, count: int = 2) -> None:
        self.folder, self.names = folder, [f"n{i + 1}" for i in range(count)]

    def __enter__(self) -> Hosts:
        lines = [f"10.77.0.{i + 1} {name}" for i, name in enumerate(self.names)]
        (self.folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *lines]) + "\n")
        ready = self.folder / "ready"
        words = ["sh", "-c", SETUP, "sh", str(self.folder / "hosts"), str(len(self.names)), str(ready)]
        with open(self.folder / "island.out", "w") as out:
            self.process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *ISLAND, *words], stdout=out, stderr=subprocess.STDOUT
            )
        deadline = time.monotonic() + 20
        while not ready.exists():
            if self.process.poll() is not None or time.monotonic() > deadline:
                end([self.process])
                raise RuntimeError(f"no hosts: {(self.folder / 'island.out').read_text()}")
            time.sleep(0.02)
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        self.first_pid = int(children.split()[0])
        return self

    def __exit__(self, *exc: object) -> None:
        end([self.process])

    def command(self, host: str, words: list[str]) -> list[str]:
        """The words as a command on a host."""
        inside = ["nsenter", f"--target={self.first_pid}", "--mount", "--net", "--pid", f"--wd={os.getcwd()}"]
        return [*inside, "ip", "netns", "exec", host, "unshare", "--uts", "sh", "-c", ENTER_HOST, host, *words]

    def start(self, host: str, words: list[str], **options: Any) -> subprocess.Popen:
        return subprocess.Popen(self.command(host, words), stdin=subprocess.DEVNULL, **options)

    def run(self, host: str, words: list[str], timeout: float = 60, **options: Any) -> str:
        """Output of a command that must succeed."""
        options |= {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
        done = subprocess.run(self.command(host, words), timeout=timeout, **options)
        assert done.returncode == 0, f"{words} on {host} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
        return done.stdout

    def pids(self, pattern: str) -> list[int]:
        """Processes on the hosts whose command line matches."""
        return [int(pid) for pid in self.run("n1", ["sh", "-c", f"pgrep -f '{pattern}' || true"]).split()]

    def sent_bytes(self, host: str) -> int:
        """What the host has sent to others, as its interface counts it."""
        return int(self.run(host, ["cat", "/sys/class/net/eth0/statistics/tx_bytes"]))

    def lose_packets(self, host: str) -> None:
        """From here on some of what is sent to the host fast does not reach it: the bridge's queue is short."""
        shape = ["root", "tbf", "rate", "400mbit", "burst", "128kb", "latency", "1ms"]
        bridge = ["nsenter", f"--target={self.first_pid}", "--net"]
        subprocess.run([*bridge, "tc", "qdisc", "add", "dev", host.replace("n", "p"), *shape], check=True, timeout=60)

    def ssh(self) -> Path:
        """A folder for PATH inside the island, with an `ssh` that starts commands on other hosts."""
        folder = self.folder / "bin"
        folder.mkdir(exist_ok=True)
        script = folder / "ssh"
        script.write_text(SSH)
        script.chmod(0o755)
        return folder
