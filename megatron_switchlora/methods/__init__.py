"""Training methods: where low-rank layers, optimizer and model meet. One short file each."""

from typing import Optional

from torch import Tensor

from megatron_switchlora.config.run import MethodConfig, RunConfig
from megatron_switchlora.distributed.mesh import Mesh, lone_mesh
from megatron_switchlora.methods.base import Method
from megatron_switchlora.methods.full import Full
from megatron_switchlora.methods.galore import Galore
from megatron_switchlora.methods.lora import Lora, MhLora
from megatron_switchlora.methods.lte import LocalLte, Lte, LteSwitchLora
from megatron_switchlora.methods.relora import Relora
from megatron_switchlora.methods.switchlora import SwitchLora
from megatron_switchlora.model.llama.model import LlamaForCausalLM
from megatron_switchlora.optim.galore import load_projector

__all__ = [
    "Full", "Galore", "LocalLte", "Lora", "Lte", "LteSwitchLora", "Method", "MhLora", "Relora", "SwitchLora",
    "build_method", "require_packages",
]  # fmt: skip


def require_packages(config: RunConfig) -> None:
    """Raises: UserError, if an optional package that the method needs does not load."""
    if config.method.name == "galore":
        load_projector()


def build_method(
    config: RunConfig,
    model: LlamaForCausalLM,
    mesh: Optional[Mesh] = None,
    factors: Optional[dict[str, tuple[Tensor, Tensor]]] = None,
) -> Method:
    """Adapt `model` (initialised, on the CPU) to `config.method` and return what drives it. Without a mesh the process
    is alone. `factors` are the initial ones that `train.ga_gradients.find_factors` found; with `method.init` lora_ga
    and without them A and B are zero, for a checkpoint to fill."""
    kinds: dict[str, type[Method]] = {
        "full": Full, "galore": Galore, "lora": Lora, "relora": Relora, "switchlora": SwitchLora, "mhlora": MhLora,
        "lte": _kind_of_heads(config.method),
    }  # fmt: skip
    return kinds[config.method.name](config, model, mesh or lone_mesh(), factors)


def _kind_of_heads(method: MethodConfig) -> type[Method]:
    if method.shares_base:
        return LocalLte
    return LteSwitchLora if method.switches else Lte
