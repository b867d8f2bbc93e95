#!/usr/bin/env python3
"""Check on one GPU that the package is right, then how fast: see megatron_switchlora/study/gpu_check.py."""

import sys

from megatron_switchlora.study.gpu_check import main

if __name__ == "__main__":
    main(sys.argv[1:])
