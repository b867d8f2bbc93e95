"""Connect low-rank layers, optimizer and model in training methods. Importing this package registers them.

A method is a file or a folder. It holds the method's options, facts and rules, and the class that drives training.
`base.py` documents what the trainer asks of that class. `config/method.py` documents what the rest of the package asks
of the facts.
"""

from typing import Optional

from torch import Tensor

from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.distributed.mesh import Mesh, lone_mesh
from megatron_switchlora.methods.base import Method
from megatron_switchlora.methods.full import Full

from megatron_switchlora.methods.lora import Lora  # isort: skip  # the order of the help
from megatron_switchlora.methods.mhlora import MhLora  # isort: skip
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
    """Adapt `model` to `config.method` and return the method that drives it.

    The model must be initialised and on the CPU. Without a mesh the process trains alone. `factors` are LoRA-GA's
    initial values from `methods.ga_gradients.find_factors`. With `method.init` lora_ga and no `factors`, A and B are
    zero until a checkpoint fills them.
    """
    return config.method.facts.kind(config, model, mesh or lone_mesh(), factors)
