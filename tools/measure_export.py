#!/usr/bin/env python3
"""Measure the memory that an export takes: see megatron_switchlora/study/benchmarks/export.py."""

import sys

from megatron_switchlora.study.benchmarks.export import main

if __name__ == "__main__":
    main(sys.argv[1:])
