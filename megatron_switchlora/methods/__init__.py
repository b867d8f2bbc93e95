"""Training methods: where low-rank layers, optimizer and model meet. Importing this package registers them.

A method is a file (or a folder): its options, its facts and rules, and the class that drives it. `base.py` says what
the trainer asks of that class, `config/method.py` what the rest of the package asks of the facts.
"""

from typing import Optional

from torch import Tensor

from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.distributed.mesh import Mesh, lone_mesh
from megatron_switchlora.methods.base import Method
from megatron_switchlora.methods.full import Full

from megatron_switchlora.methods.lora import Lora, MhLora  # isort: skip  # the order of the help
from megatron_switchlora.methods.relora import Relora  # isort: skip
from megatron_switchlora.methods.switchlora import SwitchLora  # isort: skip
from megatron_switchlora.methods.lte.heads import LocalLte, Lte, LteSwitchLora  # isort: skip
from megatron_switchlora.methods.galore import Galore  # isort: skip
from megatron_switchlora.model.protocol import LanguageModel

__all__ = [
    "Full", "Galore", "LocalLte", "Lora", "Lte", "LteSwitchLora", "Method", "MhLora", "Relora", "SwitchLora",
    "build_method",
]  # fmt: skip


def build_method(
    config: RunConfig,
    model: LanguageModel,
    mesh: Optional[Mesh] = None,
    factors: Optional[dict[str, tuple[Tensor, Tensor]]] = None,
) -> Method:
    """Adapt `model` (initialised, on the CPU) to `config.method` and return what drives it. Without a mesh the process
    is alone. `factors` are the initial ones that `methods.ga_gradients.find_factors` found; with `method.init` lora_ga
    and without them A and B are zero, for a checkpoint to fill."""
    return config.method.facts.kind(config, model, mesh or lone_mesh(), factors)
