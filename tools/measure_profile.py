#!/usr/bin/env python3
"""Show where the time of a step goes: see megatron_switchlora/study/benchmarks/profile.py."""

import sys

from megatron_switchlora.study.benchmarks.profile import main

if __name__ == "__main__":
    main(sys.argv[1:])
