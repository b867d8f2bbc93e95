#!/usr/bin/env python3
"""Measure how long a checkpoint keeps training waiting: see megatron_switchlora/study/benchmarks/checkpoint.py."""

import sys

from megatron_switchlora.study.benchmarks.checkpoint import main

if __name__ == "__main__":
    main(sys.argv[1:])
