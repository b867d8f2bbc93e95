"""The one exit of a rank: every error is reported once, and every rank ends.

Mistakes of the user and known failures print a sentence and end with status 2. Unknown errors print their traceback, on
the rank where they happened first, and end with status 1. No rank ends with status 0 unless its work is done.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
import traceback
from collections.abc import Iterator
from typing import Optional

import torch
import torch.distributed as dist

from megatron_switchlora.config.errors import UserError
from megatron_switchlora.disk import settle_home
from megatron_switchlora.distributed.consensus import PeerError
from megatron_switchlora.startup.environment import RankError, Ranks, end_rank
from megatron_switchlora.startup.launchers import is_first, own_host
from megatron_switchlora.startup.preflight import by_agent, report_error
from megatron_switchlora.startup.signals import REQUEUE, Stopped
from megatron_switchlora.startup.watch import Watch


class Door:
    """Hold the watch over the other ranks, once this rank has met them."""

    def __init__(self) -> None:
        self.watch: Optional[Watch] = None

    def watch_others(self, ranks: Ranks, timeout_s: float, store: Optional[dist.Store] = None) -> None:
        """Start reporting ranks that stop, through the store in which all have met.

        The store is by default that of the process groups.
        """
        if ranks.world_size > 1:
            env = os.environ
            keeper = f"torchrun, which keeps the ranks' store on {env['MASTER_ADDR']}," if by_agent(env) else "rank 0"
            store = store or dist.distributed_c10d._get_default_store()
            self.watch = Watch(store, ranks, own_host(env), keeper, timeout_s, leave_now)

    def close(self) -> None:
        """End the watch and leave the process groups: this rank's work is done."""
        if self.watch is not None:
            self.watch.stop()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # finish NCCL's work before its communicators go
        if dist.is_initialized():
            dist.destroy_process_group()


def leave_now(message: Optional[str]) -> None:
    """Print a message, if there is one, and end the process from a thread, whatever its main thread waits for."""
    if message:
        print(f"error: {message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(2)


@contextlib.contextmanager
def the_door() -> Iterator[Door]:
    """Run the body of a process; end the process here if it raises anything but SystemExit."""
    door = Door()
    try:
        settle(is_first(os.environ))
        yield door
    except SystemExit:
        raise
    except Stopped as stop:
        if is_first(os.environ):
            text = f"stopped by {stop}: all ranks end; what was saved and recorded so far is in the run folder"
            print(f"\n{text}", file=sys.stderr, flush=True)
        end_rank(130 if str(stop) == "SIGINT" else REQUEUE)
    except BaseException as error:
        status = 1
        with contextlib.suppress(KeyboardInterrupt):  # launchers signal all ranks once one has ended
            status = leave(door.watch, error)
        end_rank(status)


def settle(first: bool) -> None:
    """Call `settle_home`, and print its notice on the first rank.

    Raises:
        UserError: there is no home folder and none can be made.
    """
    try:
        notice = settle_home(os.environ)
    except (OSError, ValueError) as error:
        raise UserError(f"There is no home folder, and none can be made: {error}.") from None
    if notice and first:
        print(f"warning: {notice}.", flush=True)


def leave(watch: Optional[Watch], error: BaseException) -> int:
    """Report an error, publish it for the other ranks, and return the exit status."""
    if isinstance(error, (UserError, PeerError)):
        status = report_mistake(watch, error)
    elif is_out_of_memory(error):
        status = report_failure(watch, out_of_memory(error))
    elif is_collective(error):
        status = report_failed_collective(watch, error)
    else:
        status = report_unexpected(watch, error)
    if watch is not None and watch.ranks.rank == 0:
        watch.linger()
    return status


def report_mistake(watch: Optional[Watch], error: UserError | PeerError) -> int:
    """Report a mistake of the user, or leave its report to the rank that found it."""
    if watch is not None and isinstance(error, UserError):
        watch.end(str(error), printed=isinstance(error, RankError) or is_first(os.environ))
    report_error(os.environ, error)
    return 2


def report_failure(watch: Optional[Watch], text: str) -> int:
    """Report a failure that this rank alone sees, unless another rank has just ended for the same reason."""
    ending = watch.end(text) if watch is not None else None
    if watch is None or ending is None or ending.rank == watch.ranks.rank or OUT_OF_MEMORY not in ending.text:
        report_error(os.environ, RankError(text))
    return 2


def report_failed_collective(watch: Optional[Watch], error: BaseException) -> int:
    """Report why the other ranks did not come to a collective."""
    reason = first_line(error)
    if watch is None:
        return report_failure(None, f"{this_rank()} could not exchange data with the other ranks ({reason}).")
    message = watch.message_here(watch.explain(reason))
    if message:
        print(f"error: {message}", file=sys.stderr, flush=True)
    return 2


def report_unexpected(watch: Optional[Watch], error: BaseException) -> int:
    """Print a traceback; on ranks that fail after another, print one line."""
    text = "".join(traceback.format_exception_only(error)).strip()
    ending = watch.end(text) if watch is not None else None
    if watch is None and not is_first(os.environ) and not report_error(os.environ, UserError(text)):
        return 1  # rank 0 has failed before, most likely for the same reason
    if watch is None or ending is None or ending.rank == watch.ranks.rank:
        traceback.print_exception(error)
    else:
        print(f"error: {this_rank()} failed too: {text}", file=sys.stderr)
    return 1


OUT_OF_MEMORY = "ran out of"


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the host or the GPU is out of memory: torch has a class only for its own CUDA allocator."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    marks = ("allocate memory", "not enough memory", "out of memory", "_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in marks)


def out_of_memory(error: BaseException) -> str:
    """Return a message with the options that lower memory."""
    cuda = isinstance(error, torch.OutOfMemoryError) or re.search("CUDA|CUBLAS|CUSOLVER|NCCL", str(error))
    return (
        f"{this_rank()} {OUT_OF_MEMORY} {'GPU' if cuda else 'host'} memory ({first_line(error)}): lower "
        "train.micro_batch_size, set train.activation_checkpointing true or method.merged_cache recompute, or raise "
        "parallel.tp; --dry_run prints what a run needs."
    )


def is_collective(error: BaseException) -> bool:
    """Return whether a collective has failed: gloo's errors have no class of their own, but name its file."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def this_rank() -> str:
    return f"Rank {os.environ.get('RANK', '0')}, on {own_host(os.environ)},"
