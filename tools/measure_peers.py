#!/usr/bin/env python3
"""Compare a step with those of other libraries: see megatron_switchlora/study/benchmarks/peers.py."""

import sys

from megatron_switchlora.study.benchmarks.peers import main

if __name__ == "__main__":
    main(sys.argv[1:])
