#!/usr/bin/env python3
"""Compare training methods at swept rates: see megatron_switchlora/study/comparison/command.py."""

import sys

from megatron_switchlora.study.comparison.command import main

if __name__ == "__main__":
    main(sys.argv[1:])
