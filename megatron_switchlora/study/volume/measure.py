"""The measuring half of tools/gradient_volume.py: what this rank gives to collectives in steps of the real engine.

Which group of parameters a byte of a gradient belongs to is not to be seen at the process group, where DeepSpeed hands
over flat buckets. So one more step is made at the end in which every gradient is replaced by a constant that stands for
its group, spaced so far apart that sums over micro-batches and means over ranks do not mix them up, and the values
given to the data-parallel group are counted.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import torch
import torch.distributed as dist

from megatron_switchlora.config.errors import UserError, require
from megatron_switchlora.distributed.consensus import gather_texts, on_all_ranks
from megatron_switchlora.distributed.mesh import AXES, Mesh
from megatron_switchlora.distributed.recorder import Record
from megatron_switchlora.planning.counts import PARTS, by_part
from megatron_switchlora.planning.dry_run import planned_vocabulary
from megatron_switchlora.planning.traffic import on_the_wire
from megatron_switchlora.startup.launchers import own_host
from megatron_switchlora.study.benchmarks.common import make_engine
from megatron_switchlora.study.volume.cases import Case

if TYPE_CHECKING:
    from megatron_switchlora.train.engine import Engine

MARK_BITS = 20  # between the marks of two groups
IP_HEADERS, ETHERNET = 20 + 32, 14  # of IPv4 and TCP with time stamps; in each packet that an interface counts


def merges(case: Case) -> int:
    """Return the steps from merge to merge, 0 without any."""
    return case.config.method.facts.merge_interval or 0


def check_steps(case: Case, steps: int) -> None:
    """Check that the steps hold whole merges.

    Raises:
        UserError: they do not.
    """
    require(
        not merges(case) or steps % merges(case) == 0,
        f"--steps {steps} must be a multiple of method.lte.merge_interval {merges(case)} of {case.name}: it then holds "
        "whole merges.",
    )


def measure(case: Case, device: torch.device, steps: int, interface: Optional[str]) -> dict[str, Any]:
    """Return the bytes of this rank per step, in the mean over `steps` after a warm-up, and of its host on the wire."""
    from megatron_switchlora.train.engine import communication_log

    vocab_size, _ = planned_vocabulary(case.config)
    logged = case.ds_config | {"comms_logger": {"enabled": True, "prof_all": True, "verbose": False, "debug": False}}
    engine = make_engine(case.config, vocab_size, device, logged)
    tokens = random_tokens(case, vocab_size)
    warm_up = merges(case) or 1  # then as many merges lie in the steps
    for step in range(warm_up):
        engine.train_step(step, tokens)
    communication_log()
    recorded: Counter[Record] = Counter()
    before = sent(interface)
    for step in range(warm_up, warm_up + steps):
        engine.train_step(step, tokens)
        recorded.update(engine.recorder.bytes)
    after = sent(interface)
    log = {name: count / steps for name, count in communication_log().items()}
    given = by_flow(recorded, engine.mesh, steps)
    result: dict[str, Any] = {
        "recorded": given,
        "parts": marked_step(engine, tokens, warm_up + steps, case.micro_batches),
        "deepspeed_log": log,
    }
    if interface is not None:
        result |= on_interface(before, after, steps)
        result["wire_of_recorded"] = wire_of(given, engine.mesh, outgoing(engine.mesh))
    engine.ds.destroy()
    return result


def by_flow(recorded: Counter[Record], mesh: Mesh, steps: int) -> list[dict[str, Any]]:
    """Return the records with what they were for, largest first; bytes per step."""
    axes = [axis for axis in ("world", "data", "head", "node", *AXES) if axis in mesh.groups]
    names: dict[str, str] = {str(mesh.group(axis).group_name): axis for axis in axes}
    return [
        {
            "kind": kind_of(record, names.get(record.group, "world")),
            "axis": names.get(record.group, "world"),
            "op": "all_gather" if "gather" in record.op else "all_reduce" if record.op == "allreduce" else record.op,
            "dtype": record.dtype,
            "bytes": count / steps,
        }
        for record, count in recorded.most_common()
    ]


def wire_of(given: list[dict[str, Any]], mesh: Mesh, edges: dict[str, int]) -> float:
    """Return the bytes that this host would send per step, in rings of the ranks in their order."""
    return sum(
        on_the_wire(flow["op"], flow["bytes"], mesh.axis(flow["axis"]).size) * edges[flow["axis"]] for flow in given
    )


def random_tokens(case: Case, vocab_size: int) -> list[torch.Tensor]:
    train = case.config.train
    shape = (case.micro_batches, train.micro_batch_size, train.seq_len + 1)
    return list(torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(0)))


def kind_of(record: Record, axis: str) -> str:
    """Return what a recorded collective was for, by the phase of the step and the axis of the mesh."""
    if record.phase == "switch":
        return "bank"
    if record.phase == "merge":
        return "merges"
    if record.phase == "base":
        return "base"
    if record.phase == "gradient" and axis == "dp":
        return "gradients"
    if record.phase in ("gradient", "other") and axis == "tp":
        return "tensor parallel"
    if record.phase == "step" and "gather" in record.op:
        return "parameters"
    return "control"


def marked_step(engine: Engine, tokens: list[torch.Tensor], step: int, micro_batches: int) -> dict[str, float]:
    """Return the bytes of gradients given to the data-parallel group by group of parameters; "padding" is ZeRO's."""
    counts: Counter[str] = Counter()
    dp_group = engine.mesh.group("dp").group_name

    def look(record: Record, tensor: torch.Tensor) -> None:
        if record.phase != "gradient" or record.group != dp_group:
            return
        size, values = tensor.element_size(), tensor.detach().double().abs()
        counts["padding"] += size * int((values == 0).sum())
        exponents = torch.log2(values[values > 0])
        for part in PARTS:
            below = math.log2(mark(part)) + 1 - exponents  # 1 where nothing was averaged
            counts[part] += size * int(((below > 0) & (below <= MARK_BITS)).sum())

    require(
        micro_batches * engine.mesh.size("dp") < 2 ** (MARK_BITS - 2),
        f"{micro_batches} micro-batches on {engine.mesh.size('dp')} data-parallel ranks are too many to distinguish "
        "groups of parameters: measure fewer.",
    )
    hooks = [
        param.register_hook(partial(torch.full_like, fill_value=mark(part) / micro_batches))
        for param, part in part_of(engine).items()
    ]
    engine.recorder.watch = look
    engine.train_step(step, tokens)
    engine.recorder.watch = None
    for hook in hooks:
        hook.remove()
    return {part: float(count) for part, count in counts.items() if count}


def mark(part: str) -> float:
    return 2.0 ** (MARK_BITS * (PARTS.index(part) - 2))


def part_of(engine: Engine) -> dict[torch.nn.Parameter, str]:
    """Return the part of the model to which each trainable parameter belongs."""
    matrices = [each.linear.weight for each in engine.model.decoder_linears()]
    return {param: part for part, param in by_part(engine.method, matrices) if param.requires_grad}


def sent(interface: Optional[str]) -> dict[str, int]:
    """Return what rank 0's host has sent, once all ranks are here.

    These are bytes and packets, as its interface counts them, and TCP's segments that were sent again.

    Raises:
        UserError: no such interface.
    """
    if interface is None:
        return {}
    folder = Path("/sys/class/net") / interface

    def read() -> dict[str, int]:
        try:
            names, values = (
                line.split() for line in Path("/proc/net/snmp").read_text().splitlines() if line[:4] == "Tcp:"
            )
            counters = {name: int((folder / "statistics" / f"tx_{name}").read_text()) for name in ("bytes", "packets")}
            return counters | {
                "repeated": int(values[names.index("RetransSegs")]), "mtu": int((folder / "mtu").read_text())
            }  # fmt: skip
        except OSError as error:
            interfaces = ", ".join(sorted(os.listdir("/sys/class/net")))
            raise UserError(
                f"--interface {interface}: {error.strerror} on {own_host(os.environ)}; there are {interfaces}."
            ) from None

    return on_all_ranks(read)


def on_interface(before: dict[str, int], after: dict[str, int], steps: int) -> dict[str, float]:
    """Return the bytes sent per step, and how much of them was new payload.

    Headers are no payload: their number depends on the kernel, which merges packets and acknowledges in packets of
    headers alone. Nor is what a busy host sent twice.
    """
    count, packets, repeated = ((after[name] - before[name]) / steps for name in ("bytes", "packets", "repeated"))
    headers, again = packets * (ETHERNET + IP_HEADERS), repeated * (after["mtu"] - IP_HEADERS)
    return {"wire": count, "wire_headers": headers, "wire_repeated": again, "wire_payload": count - headers - again}


def outgoing(mesh: Mesh) -> dict[str, int]:
    """Count the rings along each axis that leave this host: 1 where a host has one rank.

    A ring goes through its ranks in order.
    """
    lines = {axis: dist.get_process_group_ranks(group) for axis, group in mesh.groups.items()}
    own = {"host": own_host(os.environ), "lines": lines | {"world": list(range(dist.get_world_size()))}}
    everyone = [json.loads(text) for text in gather_texts(json.dumps(own))]
    hosts = [entry["host"] for entry in everyone]
    counts = {}
    for axis in own["lines"]:
        rings = {tuple(entry["lines"][axis]) for entry in everyone}
        steps = [(a, b) for ring in rings for a, b in zip(ring, ring[1:] + ring[:1], strict=True)]
        counts[axis] = sum(hosts[a] == own["host"] != hosts[b] for a, b in steps)
    return counts
