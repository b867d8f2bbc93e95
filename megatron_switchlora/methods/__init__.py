"""Training methods: where low-rank layers, optimizer and model meet. One short file each."""

from typing import Optional

from torch import Tensor

from megatron_switchlora.config import RunConfig
from megatron_switchlora.methods.base import Method
from megatron_switchlora.methods.full import Full
from megatron_switchlora.methods.lora import Lora
from megatron_switchlora.methods.switchlora import SwitchLora
from megatron_switchlora.model.llama import LlamaForCausalLM
from megatron_switchlora.parallel.mesh import Mesh, lone_mesh

__all__ = ["Full", "Lora", "Method", "SwitchLora", "build_method"]


def build_method(
    config: RunConfig,
    model: LlamaForCausalLM,
    mesh: Optional[Mesh] = None,
    factors: Optional[dict[str, tuple[Tensor, Tensor]]] = None,
) -> Method:
    """Adapt `model` (initialised, on the CPU) to `config.method` and return what drives it. Without a mesh the process
    is alone. `factors` are the initial ones that `train.ga_gradients.find_factors` found; with `method.init` lora_ga
    and without them A and B are zero, for a checkpoint to fill."""
    kinds = {"full": Full, "lora": Lora, "switchlora": SwitchLora}
    return kinds[config.method.name](config, model, mesh or lone_mesh(), factors)
