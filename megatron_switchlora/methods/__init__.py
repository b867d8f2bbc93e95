"""Training methods: where low-rank layers, optimizer and model meet. One short file each."""

from typing import Optional

from megatron_switchlora.config import MethodConfig, RunConfig
from megatron_switchlora.methods.base import Method
from megatron_switchlora.methods.full import Full
from megatron_switchlora.methods.lora import Lora, MhLora
from megatron_switchlora.methods.lte import LocalLte, Lte, LteSwitchLora
from megatron_switchlora.methods.switchlora import SwitchLora
from megatron_switchlora.model.llama import LlamaForCausalLM
from megatron_switchlora.parallel.mesh import Mesh, lone_mesh

__all__ = ["Full", "LocalLte", "Lora", "Lte", "LteSwitchLora", "Method", "MhLora", "SwitchLora", "build_method"]


def build_method(config: RunConfig, model: LlamaForCausalLM, mesh: Optional[Mesh] = None) -> Method:
    """Adapt `model` (initialised, on the CPU) to `config.method` and return what drives it. Without a mesh the process
    is alone."""
    kinds: dict[str, type[Method]] = {
        "full": Full, "lora": Lora, "switchlora": SwitchLora, "mhlora": MhLora, "lte": _kind_of_heads(config.method)
    }  # fmt: skip
    return kinds[config.method.name](config, model, mesh or lone_mesh())


def _kind_of_heads(method: MethodConfig) -> type[Method]:
    if method.shares_base:
        return LocalLte
    return LteSwitchLora if method.switches else Lte
