"""What takes long to import, for the process that the tests' ranks are forked from. A fork takes no threads
along, so what starts any must not need them: jemalloc, which pyarrow brings, does not."""

import gc
import os

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", DS_ACCELERATOR="cpu")

import datasets  # noqa: F401
import deepspeed  # noqa: F401
import torch._inductor.compile_fx  # noqa: F401  # DeepSpeed's first engine imports it
import transformers  # noqa: F401

# DeepSpeed's BF16_Optimizer collects garbage eight times an engine: what is imported here need not be looked through.
gc.collect()
gc.freeze()
