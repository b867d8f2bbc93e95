#!/usr/bin/env python3
"""Measure what switching costs: see megatron_switchlora/study/benchmarks/switching.py."""

import sys

from megatron_switchlora.study.benchmarks.switching import main

if __name__ == "__main__":
    main(sys.argv[1:])
