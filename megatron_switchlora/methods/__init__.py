"""Training methods: where low-rank layers, optimizer and model meet. One short file each."""

from typing import Optional

from megatron_switchlora.config import RunConfig
from megatron_switchlora.methods.base import Method
from megatron_switchlora.methods.full import Full
from megatron_switchlora.methods.galore import Galore
from megatron_switchlora.methods.lora import Lora
from megatron_switchlora.methods.relora import Relora
from megatron_switchlora.methods.switchlora import SwitchLora
from megatron_switchlora.model.llama import LlamaForCausalLM
from megatron_switchlora.optim.galore import load_projector
from megatron_switchlora.parallel.mesh import Mesh, lone_mesh

__all__ = ["Full", "Galore", "Lora", "Method", "Relora", "SwitchLora", "build_method", "require_packages"]


def require_packages(config: RunConfig) -> None:
    """Raises: UserError, if an optional package that the method needs does not load."""
    if config.method.name == "galore":
        load_projector()


def build_method(config: RunConfig, model: LlamaForCausalLM, mesh: Optional[Mesh] = None) -> Method:
    """Adapt `model` (initialised, on the CPU) to `config.method` and return what drives it. Without a mesh the process
    is alone."""
    kinds = {"full": Full, "galore": Galore, "lora": Lora, "relora": Relora, "switchlora": SwitchLora}
    return kinds[config.method.name](config, model, mesh or lone_mesh())
