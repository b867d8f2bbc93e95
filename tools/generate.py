#!/usr/bin/env python3
"""Continue a text with a trained model: see megatron_switchlora/hf/generate.py."""

import sys

from megatron_switchlora.hf.generate import main

if __name__ == "__main__":
    main(sys.argv[1:])
