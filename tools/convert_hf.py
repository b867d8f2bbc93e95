#!/usr/bin/env python3
"""Convert between this project's checkpoints and Hugging Face's folders: see megatron_switchlora/hf/convert.py."""

import sys

from megatron_switchlora.hf.convert import main

if __name__ == "__main__":
    main(sys.argv[1:])
