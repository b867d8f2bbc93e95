"""One rank alone listens to nobody outside, and every process group has the run's time-out, DeepSpeed's own too."""

from __future__ import annotations

from tests.dist.launch import run_ranks


def test_it_listens_within_the_host_alone_and_all_groups_have_the_time_out() -> None:
    (found,) = run_ranks(1, "tests.dist.alone_worker", {"timeout": 77.0}, timeout=60)
    assert set(found["listening"]) <= {"0100007F"}, found
    assert found["waits"] == [77.0], found  # the world: other axes of one rank need no communicator
