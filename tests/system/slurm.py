"""A throw-away Slurm cluster on virtual hosts: munged and slurmctld on n1, a slurmd on each, no systemd, no cgroups."""

from __future__ import annotations

import contextlib
import getpass
import re
import secrets
import subprocess
import time

from tests.dist.launch import clean_environment
from tests.system.hosts import Hosts

CONF = """\
ClusterName=test
SlurmctldHost=n1(10.77.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
SwitchType=switch/none
ReturnToService=2
MailProg=/bin/true
KillWait=5
MessageTimeout=10
SlurmdTimeout=30
JobRequeue=1
{nodes}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE OverSubscribe=NO State=UP PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=ALL MaxTime=INFINITE OverSubscribe=NO State=UP PriorityTier=2 PreemptMode=OFF
"""


class Slurm:
    """The cluster on `hosts`; a context manager. Its files, and the jobs' caches, are in the hosts' folder."""

    def __init__(self, hosts: Hosts, cpus: int = 2) -> None:
        self.hosts, self.folder = hosts, hosts.folder
        self.env = clean_environment(self.folder) | {
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "XDG_CACHE_HOME": str(self.folder / "cache"),
            "PYTHONUNBUFFERED": "1",
        }
        nodes = [f"NodeName={name} NodeAddr=10.77.0.{i + 1} CPUs={cpus} RealMemory=2000 State=UNKNOWN"
                 for i, name in enumerate(hosts.names)]  # fmt: skip
        text = CONF.format(user=getpass.getuser(), folder=self.folder, nodes="\n".join(nodes))
        (self.folder / "slurm.conf").write_text(text)
        # slurmd 22.05 looks for cgroups without it, and ends where there are none
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")

    def __enter__(self) -> Slurm:
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        self.folder.chmod(0o755)
        (self.folder / "state").mkdir()
        for name in self.hosts.names:
            (self.folder / f"spool-{name}").mkdir()
        at = f"{self.folder}/munge"
        self._serve("n1", ["munged", "--foreground", "--force", f"--socket={at}.sock", f"--key-file={at}.key",
                           f"--pid-file={at}.pid", f"--seed-file={at}.seed", "--num-threads=2"])  # fmt: skip
        self._wait(lambda: (self.folder / "munge.sock").exists(), 20, "munged")
        self._serve("n1", ["slurmctld", "-D"])
        for name in self.hosts.names:
            self._serve(name, ["slurmd", "-D", "-N", name])
        count = len(self.hosts.names)
        self._wait(
            lambda: self.run("sinfo", "-h", "-N", "-p", "debug", "-o", "%T").split() == ["idle"] * count,
            30,
            "idle nodes",
        )
        return self

    def __exit__(self, *exc: object) -> None:
        """The daemons end with their hosts."""

    def _serve(self, host: str, words: list[str]) -> None:
        with open(self.folder / f"{words[0]}-{host}.out", "w") as out:
            self.hosts.start(host, words, env=self.env, stdout=out, stderr=subprocess.STDOUT)

    def _wait(self, done: object, seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with contextlib.suppress(AssertionError):  # a command that does not reach its daemon yet
                if done():  # type: ignore[operator]
                    return
            time.sleep(0.1)
        logs = "\n".join(f"--- {path.name}\n{path.read_text()[-2000:]}" for path in self.folder.glob("*.out"))
        raise AssertionError(f"no {what} within {seconds} s\n{logs}")

    def run(self, *words: str, **more: str) -> str:
        """Output of a Slurm command on n1, with more variables in its environment."""
        return self.hosts.run("n1", list(words), env=self.env | more)

    def submit(self, *words: str, **more: str) -> str:
        """The job's number."""
        return self.run("sbatch", "--parsable", *words, **more).split(";")[0].strip()

    def state(self, job: str) -> str:
        """RUNNING, COMPLETED, ..."""
        found = re.search(r"JobState=(\S+)", self.run("scontrol", "show", "job", job))
        assert found is not None
        return found[1]

    def wait_for(self, job: str, *states: str, seconds: float = 120) -> str:
        """Wait until the job is in one of the states."""
        self._wait(lambda: self.state(job) in states, seconds, f"{states} of job {job}")
        return self.state(job)

    def wait_for_start(self, job: str, number: int, seconds: float = 60) -> None:
        """Wait until a requeued job runs for the `number`th time. Slurm lets its credential of the time before expire
        first: here in five seconds, else in two minutes."""
        again = rf"JobState=(RUNNING|COMPLETED)[^$]*Restarts={number - 1}\b"
        self._wait(lambda: re.search(again, self.run("scontrol", "show", "job", job)), seconds, f"restart of job {job}")
