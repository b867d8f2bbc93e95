"""A table of subcommands: each is the `main(argv)` of a module that is imported on demand."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from megatron_switchlora import __version__

Table = dict[str, tuple[str, str]]  # name -> (module, what it does)


def run(command: str, table: Table, argv: Sequence[str]) -> None:
    """Run the subcommand that `argv` begins with; without one, or with --help, print the table.

    Exit with status 2 if there is no such subcommand.
    """
    name, rest = (argv[0], list(argv[1:])) if argv else ("--help", [])
    if name in ("--help", "-h"):
        width = max(map(len, table)) + 3
        lines = [f"  {each:<{width}}{about}" for each, (_, about) in table.items()]
        print("\n".join([f"usage: {command} COMMAND ...", "", *lines, "", f"Options: {command} COMMAND --help"]))
    elif name == "--version":
        print(__version__)
    elif name not in table:
        print(f"error: {command} has no command {name!r}: give one of {', '.join(table)}.", file=sys.stderr)
        sys.exit(2)
    else:
        sys.argv = [f"{command} {name}", *rest]  # argparse shows this name in its usage
        import_module(table[name][0]).main(rest)
