"""Compare two commits bit by bit: `python -m tests.equality OLD NEW [--cases N] [--only WORD] [--out FILE]`.

Both run the same cases (`cases.py`) in checkouts of their own, on this machine. OLD or NEW may be a folder. Ends with
status 1 if anything differs; the table says what.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.dist.launch import REPOSITORY
from tests.equality.cases import name_of, rows
from tests.equality.observe import Observed, observe, open_tree
from tests.system.commands import write_corpus


def check_out(commit: str, folder: Path) -> Path:
    """Return a folder with the commit's files."""
    if Path(commit).is_dir():
        return Path(commit).resolve()
    subprocess.run(["git", "worktree", "add", "--detach", "-q", str(folder), commit], cwd=REPOSITORY, check=True)
    return folder


def remove(folder: Path) -> None:
    if folder.exists():
        subprocess.run(["git", "worktree", "remove", "--force", str(folder)], cwd=REPOSITORY, check=True)


def differences(old: Observed, new: Observed) -> list[str]:
    """Return what is not the same in both, or only in one."""
    return sorted(key for key in old.keys() | new.keys() if key not in old or key not in new or old[key] != new[key])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--cases", type=int, help="only the first N cases")
    parser.add_argument("--only", default="", help="only cases with this word in their name")
    parser.add_argument("--out", type=Path, help="write the table here, too")
    arguments = parser.parse_args()
    chosen = [row for row in rows() if arguments.only in name_of(row)][: arguments.cases]
    lines = [f"| case ({arguments.old} against {arguments.new}) | compared | differ |", "| :-- | --: | :-- |"]
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        scratch, corpus = Path(name), write_corpus(Path(name) / "corpus")
        try:
            folders = [check_out(arguments.old, scratch / "old"), check_out(arguments.new, scratch / "new")]
            trees = [open_tree(folder, scratch) for folder in folders]
            for row in chosen:
                began = time.perf_counter()
                places = [scratch / f"{side}-{name_of(row)}" for side in ("a", "b")]
                old, new = (observe(tree, row, place, corpus) for tree, place in zip(trees, places, strict=True))
                found = differences(old, new)
                failed += bool(found)
                lines.append(f"| {name_of(row)} | {len(old)} | {', '.join(found[:6]) or 'none'} |")
                print(lines[-1], f"{time.perf_counter() - began:.0f} s", flush=True)
                for key in found[:3]:
                    print(
                        f"    {key}: {json.dumps(old.get(key))[:300]} -> {json.dumps(new.get(key))[:300]}", flush=True
                    )
        finally:
            remove(scratch / "old")
            remove(scratch / "new")
    lines.append(f"\n{len(chosen)} cases, {failed} differ")
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
