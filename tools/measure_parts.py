#!/usr/bin/env python3
"""Time norm, rotary embedding, activation and loss: see megatron_switchlora/study/benchmarks/parts.py."""

import sys

from megatron_switchlora.study.benchmarks.parts import main

if __name__ == "__main__":
    main(sys.argv[1:])
