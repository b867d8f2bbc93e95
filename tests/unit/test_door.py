"""How a process leaves: what is said of an error, and with what status; the home folder that caches need."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_switchlora.config.errors import UserError
from megatron_switchlora.disk import settle_home, user_path
from megatron_switchlora.distributed.consensus import PeerError
from megatron_switchlora.startup.door import the_door
from megatron_switchlora.startup.signals import Stopped

ALLOCATOR = "[enforce fail at alloc_cpu.cpp:116] DefaultCPUAllocator: can't allocate memory"
HOST_MEMORY, GPU_MEMORY, NO_EXCHANGE = "ran out of host memory (", "ran out of GPU memory (", "could not exchange data"


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (UserError("give another"), 2, "error: give another"),
        (PeerError("somebody has said it"), 2, ""),
        (MemoryError(), 2, f"{HOST_MEMORY}MemoryError): lower train.micro_batch_size"),
        (RuntimeError(ALLOCATOR), 2, f"{HOST_MEMORY}[enforce fail"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), 2, HOST_MEMORY),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), 2, f"{GPU_MEMORY}CUDA"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), 2, GPU_MEMORY),
        (dist.DistBackendError("NCCL error in x.cpp:1\nmore"), 2, "with the other ranks (NCCL error in x.cpp:1)."),
        (RuntimeError("[/x/gloo/transport/tcp/pair.cc:553] Connection closed"), 2, NO_EXCHANGE),
        (TypeError("odd"), 1, "TypeError: odd"),
        (KeyboardInterrupt(), 1, "KeyboardInterrupt"),
        (Stopped("SIGTERM"), 75, "stopped by SIGTERM"),
        (Stopped("SIGINT"), 130, "stopped by SIGINT"),
    ],
)  # fmt: skip
def test_what_is_said_and_the_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, status: int, words: str
) -> None:
    def end(given: int) -> None:
        raise SystemExit(given)

    monkeypatch.setattr("megatron_switchlora.startup.door.end_rank", end)
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as left, the_door():
        raise error
    said = capsys.readouterr().err
    assert left.value.code == status
    assert words in said and ("Traceback" in said) == (status == 1), said
    assert len(said.splitlines()) <= 2 or status == 1, said


@pytest.mark.parametrize("home", [None, "/", "/nowhere/x"])
def test_without_a_home_folder_caches_have_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Any) -> None:
    """As in a container with a user id of its own; root could write anywhere."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(os.path, "expanduser", lambda text: home or text)
    env: dict[str, str] = {}
    assert "there is no home folder" in str(settle_home(env))
    assert Path(env["HOME"]).parent == tmp_path and Path(env["HOME"]).stat().st_mode & 0o777 == 0o700


def test_a_home_folder_is_left_alone_and_a_taken_place_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "made later"))
    env: dict[str, str] = {}
    assert settle_home(env) is None and env == {}
    monkeypatch.setenv("HOME", "/")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / f"megatron_switchlora-{os.getuid()}").symlink_to(tmp_path)
    with pytest.raises((ValueError, OSError)):
        settle_home(env)
    with pytest.raises(ValueError, match="nobody-here/x' begins with a home folder that this machine does not know"):
        user_path("~nobody-here/x")
