"""Table and bar chart of tools/gradient_volume.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_switchlora.planning.counts import PARTS
from megatron_switchlora.run.figures import new_figure, save_figure
from megatron_switchlora.study.markdown import markdown

Result = dict[str, Any]
OTHERS = ("parameters", "bank", "tensor parallel", "merges", "control")
HEAD = ["method", "ZeRO", "micro-batches", "mesh", "", *PARTS, "gradients", "against full-rank", *OTHERS, "on the wire",
        "sent, against full-rank"]  # fmt: skip


def table(results: list[Result]) -> str:
    """Return Markdown. MB are 10^6 bytes that a rank gives to collectives per step; "on the wire" is what it sends."""
    rows, notes = [], []
    for result in results:
        rows.append(_row(result, "predicted"))
        if "recorded" in result:
            rows.append(_row(result, "recorded"))
            notes.append(_logged(result))
            if "wire" in result:
                notes.append(_sent(result))
    used = [column for column in range(len(HEAD)) if any(row[column] not in ("-", "") for row in rows)]
    head, *shown = ([row[column] for column in used] for row in (HEAD, *rows))
    return "\n".join([markdown(head, shown), "", "MB per rank and step (1 MB = 1,000,000 bytes).", *notes])


def by_kind(result: Result, what: str) -> dict[str, float]:
    """Return the bytes of each kind, as predicted or recorded."""
    counts: dict[str, float] = {}
    for flow in result[what]:
        counts[flow["kind"]] = counts.get(flow["kind"], 0.0) + flow["bytes"]
    return counts


def by_part(result: Result, what: str) -> dict[str, float]:
    """Return the bytes of gradients of each group of parameters."""
    if what == "recorded":
        return result["parts"]
    return {flow["part"]: flow["bytes"] for flow in result[what] if flow["kind"] == "gradients"}


def _row(result: Result, what: str) -> list[str]:
    kinds, parts = by_kind(result, what), by_part(result, what)
    given, full = kinds.get("gradients", 0.0), result["full_rank_gradients"]
    wire = result["wire_predicted"] if what == "predicted" else result.get("wire")
    mesh = " x ".join(f"{axis} {size}" for axis, size in result["mesh"].items())
    cells = [result["name"], str(result["zero"]), str(result["micro_batches"]), mesh, what]
    cells += [_mb(parts.get(part, 0.0)) for part in PARTS]
    cells += [_mb(given), f"{given / full - 1:+.1%}" if full else "-"]
    cells += [_mb(kinds.get(kind, 0.0)) for kind in OTHERS]
    cells.append("" if wire is None else _mb(wire))
    sent, full_sent = result["wire_predicted"], result["full_rank_wire"]
    cells.append(f"{sent / full_sent - 1:+.1%}" if what == "predicted" and full_sent else "")
    return cells


def _logged(result: Result) -> str:
    """Return DeepSpeed's own log, which sees what DeepSpeed itself communicates: gradients, parameters, norms."""
    log = result["deepspeed_log"]
    counts = ", ".join(f"{name} {_mb(count)}" for name, count in sorted(log.items()))
    return f"- DeepSpeed's log of {result['name']}, ZeRO {result['zero']}: {counts or 'nothing'}"


def _sent(result: Result) -> str:
    """Describe what rank 0's host has sent: what is comparable with the prediction, and the rest."""
    payload, headers, again = (_mb(result[f"wire_{name}"]) for name in ("payload", "headers", "repeated"))
    return (
        f"- Sent for {result['name']}, ZeRO {result['zero']}: {payload} of new payload, {headers} of headers, {again} "
        f"once more after losses or late answers; rings of what was recorded: "
        f"{_mb(result['wire_of_recorded'])}. (RDMA, as InfiniBand's, passes the interface's counter by.)"
    )


def _mb(count: float) -> str:
    return f"{count / 1e6:,.3f}" if count else "-"


def chart(results: list[Result], path: Path) -> None:
    """Draw a bar per case: gradients by group, then everything else; predicted, and recorded beside it."""
    measured = any("recorded" in result for result in results)
    figure = new_figure(10, 1.2 + 0.45 * len(results) * (1 + measured))
    axes, seen = figure.subplots(), set()
    for place, result in enumerate(results):
        for shift, what in ((0, "predicted"), (1, "recorded")):
            if what not in result:
                continue
            kinds, left = by_kind(result, what), 0.0
            parts = [(part, f"C{i}", by_part(result, what).get(part, 0.0)) for i, part in enumerate(PARTS)]
            others = [(kind, f"C{5 + i}", kinds.get(kind, 0.0)) for i, kind in enumerate(OTHERS)]
            for label, color, count in [*parts, *others]:
                if count:
                    axes.barh(place + shift * 0.42, count / 1e6, 0.38 if measured else 0.7, left, color=color,
                              edgecolor="white", hatch="//" if shift else None,
                              label=None if label in seen else label)  # fmt: skip
                    seen.add(label)
                    left += count / 1e6
    axes.set_yticks([place + 0.21 * measured for place in range(len(results))])
    many = len({(result["zero"], result["micro_batches"]) for result in results}) > 1
    axes.set_yticklabels([
        r["name"] + (f"\nZeRO {r['zero']}, {r['micro_batches']} micro-batches" if many else "") for r in results
    ], fontsize=8, parse_math=False)  # fmt: skip
    axes.invert_yaxis()
    axes.set_xlabel("MB that a rank gives to collectives per step")
    axes.set_title("predicted" + (" (plain) and recorded (hatched)" if measured else ""))
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    save_figure(figure, path, dpi=110)
