#!/usr/bin/env python3
"""Analyse how the weights of a run have moved: see megatron_switchlora/study/analysis/command.py."""

import sys

from megatron_switchlora.study.analysis.command import main

if __name__ == "__main__":
    main(sys.argv[1:])
