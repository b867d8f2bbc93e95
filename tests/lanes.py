"""Which tests run beside which others.

With `-n 2` one worker is the lane of ranks: tests that keep two cores busy run there one after the other, since two
launches at a time would take more than twice as long. The other worker takes all else, a file at a time: tests of one
process, and those that start ranks and mostly wait, for Slurm, for a time-out, or for a launcher's imports. Where there
are more workers, they share these files; without, all run in order.
"""

from __future__ import annotations

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

RANKS = "ranks"
OF_RANKS = ("tests/dist/", "tests/system/")
BESIDE = (
    "tests/dist/test_alone.py",
    "tests/system/test_command_line.py",
    "tests/system/test_compare_batch.py",
    "tests/system/test_compare_run.py",
    "tests/system/test_examples.py",
    "tests/system/test_hand_over.py",
    "tests/system/test_lora_ga_run.py",
    "tests/system/test_lost_ranks.py",
    "tests/system/test_package.py",
    "tests/system/test_sbatch_script.py",
    "tests/system/test_signals.py",
    "tests/system/test_slurm.py",
    "tests/system/test_two_hosts.py",
)


def lane_of(nodeid: str) -> str:
    """Return what a test is kept together with, in one worker: the lane of ranks, or its own file."""
    file = nodeid.split("::")[0]
    return RANKS if file.startswith(OF_RANKS) and file not in BESIDE else file


class Lanes(LoadScopeScheduling):
    """Hand out lanes. A worker that has nothing left of its own takes the next file of the others."""

    def _split_scope(self, nodeid: str) -> str:
        return lane_of(nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling | None:
    """Replace what `-n` alone would choose; a --dist of one's own is respected."""
    if config.getoption("dist") != "load":
        return None
    config.option.loadscopereorder = False  # ranks first, since they take longest, not the file of most tests
    return Lanes(config, log)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests into the order of their lanes: ranks, then what waits, then single processes."""
    items.sort(key=lambda item: (lane_of(item.nodeid) != RANKS, not item.nodeid.startswith(BESIDE)))
