#!/usr/bin/env python3
"""Plan what a run needs on a cluster: see megatron_switchlora/planning/command.py."""

import sys

from megatron_switchlora.planning.command import main

if __name__ == "__main__":
    main(sys.argv[1:])
