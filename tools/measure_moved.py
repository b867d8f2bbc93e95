#!/usr/bin/env python3
"""Count the bytes that elementwise kernels move: see megatron_switchlora/study/benchmarks/moved.py."""

import sys

from megatron_switchlora.study.benchmarks.moved import main

if __name__ == "__main__":
    main(sys.argv[1:])
