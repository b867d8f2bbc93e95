#!/usr/bin/env python3
"""Compute how much of the gradient rank r covers: see megatron_switchlora/study/coverage.py."""

import sys

from megatron_switchlora.study.coverage import main

if __name__ == "__main__":
    main(sys.argv[1:])
