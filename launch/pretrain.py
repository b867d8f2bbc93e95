#!/usr/bin/env python3
"""Pre-train a LLaMA: see megatron_switchlora/train/pretrain.py."""

import sys

from megatron_switchlora.train.pretrain import main

if __name__ == "__main__":
    main(sys.argv[1:])
