#!/usr/bin/env python3
"""Measure what a step costs: see megatron_switchlora/study/benchmarks/step.py."""

import sys

from megatron_switchlora.study.benchmarks.step import main

if __name__ == "__main__":
    main(sys.argv[1:])
