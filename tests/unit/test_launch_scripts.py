"""launch/mpi/pretrain.sh and `make pretrain` with stand-ins for what they start: which hosts, how many ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def mpi(folder: Path, hosts: str) -> subprocess.CompletedProcess[str]:
    """The words that the script gives to mpirun on 8 ranks a host."""
    program = executable(folder / "mpirun", '#!/bin/sh\n[ "$1" = --version ] && echo HYDRA || echo "$@"\n')
    env = {**os.environ, "MPIRUN": str(program), "PYTHON": sys.executable}
    words = [str(ROOT / "launch" / "mpi" / "pretrain.sh"), hosts, "8"]
    return subprocess.run(words, env=env, cwd=folder, capture_output=True, text=True, timeout=20)


@pytest.mark.parametrize(
    ("hosts", "wrong"),
    [("user@n1,n2", "user@n1"), ("fe80::1", "fe80::1"), ("n[1-4]", "n[1-4]"), ("n1,,n2", ""), ("n1,n2,", ""),
     (",n1", ""), ("n1 ,n2", "n1 "), ("n1:8", "n1:8"), ("-x", "-x"), ("n1;ls", "n1;ls")],
)  # fmt: skip
def test_what_is_no_name_of_a_host_is_refused(tmp_path: Path, hosts: str, wrong: str) -> None:
    done = mpi(tmp_path, hosts)
    assert done.returncode == 2 and done.stdout == "", done
    assert done.stderr.startswith(f"error: '{wrong}' in the hosts "), done.stderr


@pytest.mark.parametrize("line", ["user@n1", "fe80::1", "n[1-4]", "fe80::1:8"])
def test_nor_in_a_file(tmp_path: Path, line: str) -> None:
    (tmp_path / "hosts.txt").write_text(f"n0 slots=8\n{line} slots=8\n")
    done = mpi(tmp_path, "hosts.txt")
    assert done.returncode == 2 and done.stderr.startswith(f"error: '{line}' in the hosts n0,{line} is"), done


def test_a_host_named_twice_is_refused(tmp_path: Path) -> None:
    for hosts in ("n1,n1", "n1,n2,n1"):
        done = mpi(tmp_path, hosts)
        assert done.returncode == 2 and "error: the host n1 is named twice" in done.stderr, done.stderr


@pytest.mark.parametrize("in_file", [False, True])
def test_names_and_addresses_reach_mpirun(tmp_path: Path, in_file: bool) -> None:
    (tmp_path / "hosts.txt").write_text("# all\ngpu-01.example.org slots=8\n10.0.0.2:8 if=e\n\n10.0.0.2\nn3:8 \r\n")
    done = mpi(tmp_path, "hosts.txt" if in_file else "gpu-01.example.org,10.0.0.2,n3")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("-hosts gpu-01.example.org,10.0.0.2,n3 -ppn 8 -n 24 -genv MASTER_ADDR gpu-01.example")


@pytest.mark.parametrize(("gpus", "ranks"), [(0, 2), (1, 1), (2, 2), (8, 2)])
def test_make_pretrain_takes_a_rank_for_each_of_two_gpus(tmp_path: Path, gpus: int, ranks: int) -> None:
    """And two on the CPU without any."""
    torch = f"class cuda:\n    def device_count():\n        return {gpus}\n"
    executable(tmp_path / "modules" / "torch.py", torch)
    executable(tmp_path / "bin" / "python", f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    executable(tmp_path / "bin" / "deepspeed", '#!/bin/sh\necho "started $@"\n')
    (tmp_path / ".installed").touch()
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "modules"), "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    words = ["make", "-C", str(ROOT), "pretrain", f"VENV={tmp_path}"]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=30)
    assert f"\nstarted --num_gpus {ranks} launch/pretrain.py --config" in done.stdout, done
