"""One command with subcommands: `switchlora`."""
