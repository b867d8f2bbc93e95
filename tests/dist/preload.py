"""What takes long to import, for the process that the tests' ranks are forked from: a run of a few steps spends more
time on that than on everything else. A fork takes no threads along, so what starts any must not need them: jemalloc,
which pyarrow brings, does not.

The package is among it; `launch.script_main` forgets it where a script has another tree's package beside it.
"""

import gc
import os

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", DS_ACCELERATOR="cpu")

import datasets  # noqa: F401
import deepspeed.ops.op_builder.all_ops  # the first engine imports these
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
import matplotlib.backends.backend_agg  # noqa: F401
import PIL.Image
import pyarrow.parquet  # noqa: F401
import setuptools  # noqa: F401
import torch._inductor.compile_fx  # noqa: F401
from deepspeed.module_inject import auto_ep_layer  # noqa: F401
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast  # noqa: F401

import megatron_switchlora.train.pretrain
import megatron_switchlora.train.trainer  # noqa: F401
from megatron_switchlora.config.command_line import build_parser
from megatron_switchlora.run.figures import new_figure

PIL.Image.preinit()
build_parser()  # is kept, with the docstrings of all options
new_figure(4, 3).subplots().figure.savefig(os.devnull, format="png")  # reads the fonts
# DeepSpeed's BF16_Optimizer collects garbage eight times an engine: what is imported here need not be looked through.
gc.collect()
gc.freeze()
