#!/usr/bin/env python3
"""Predict or measure the bytes that a step gives to collectives: see megatron_switchlora/study/volume/command.py."""

import sys

from megatron_switchlora.study.volume.command import main

if __name__ == "__main__":
    main(sys.argv[1:])
