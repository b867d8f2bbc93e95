"""Print where the tests' time goes: a table per file, of wall and CPU seconds.

CPU seconds include the processes that a test started and that have ended, so they are the same on a busy machine.
They leave out what daemons on virtual hosts start.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from multiprocessing import forkserver

import pytest

LISTED = 25


def cpu_seconds() -> float:
    """Return the CPU seconds of this process, of the fork server, and of what both started and reaped."""
    spent = sum(os.times()[:4])
    server = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    if server is not None:
        spent += sum(map(int, _status_fields(server)[11:15])) / os.sysconf("SC_CLK_TCK")
    return spent


def _status_fields(pid: int) -> list[str]:
    """Read without `Path` and `open`, which tests replace."""
    try:
        handle = os.open(f"/proc/{pid}/stat", os.O_RDONLY)
    except OSError:  # it has ended
        return ["0"] * 15
    try:
        return os.read(handle, 4096).decode().rsplit(")", 1)[1].split()
    finally:
        os.close(handle)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    item.stash[BEGAN] = cpu_seconds()
    return (yield)


BEGAN = pytest.StashKey[float]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Add the CPU seconds since the test's last phase to its report, which xdist takes to the main process."""
    now = cpu_seconds()
    item.user_properties[:] = [("cpu_seconds", now - item.stash[BEGAN])]
    item.stash[BEGAN] = now
    return (yield)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the files that took longest, with their tests."""
    wall: dict[str, float] = defaultdict(float)
    cpu: dict[str, float] = defaultdict(float)
    tests: dict[str, set[str]] = defaultdict(set)
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                file = report.nodeid.split("::")[0]
                wall[file] += report.duration
                cpu[file] += dict(report.user_properties).get("cpu_seconds", 0.0)
                tests[file].add(report.nodeid)
    slowest = sorted(wall, key=wall.__getitem__, reverse=True)
    terminalreporter.section("seconds per file")
    rows = [(file, len(tests[file]), wall[file], cpu[file]) for file in slowest[:LISTED]]
    others = slowest[LISTED:]
    if others:
        of_others = [sum(part[file] for file in others) for part in (wall, cpu)]
        rows.append((f"{len(others)} other files", sum(len(tests[file]) for file in others), *of_others))
    rows.append(("all", sum(map(len, tests.values())), sum(wall.values()), sum(cpu.values())))
    terminalreporter.line(f"{'file':<44} {'tests':>6} {'wall':>8} {'CPU':>8}")
    for name, count, seconds, busy in rows:
        terminalreporter.line(f"{name:<44} {count:>6} {seconds:>8.1f} {busy:>8.1f}")
