"""Trainers of other libraries as entries of a comparison: transformers' LLaMA with somebody's optimizer.

All start from the weights of the package's own model, without its padding, and compute the same loss of the same
tokens: SDPA attention, no cache, gradients clipped at the same norm, the same rate. In bf16 the weights and both
moments are bf16, without fp32 masters, which is the least work that is in use. Under data parallelism torch's DDP
reduces the gradients. A step is the plain loop of micro-batches, clip, optimizer and zero_grad.

    transformers          torch.optim.AdamW, fused
    transformers compiled the same, the model under torch.compile
    peft lora             PEFT's LoRA on every linear of the decoder; embedding, norms and head train, too, as ours do
    galore                GaLore's AdamW for the decoder's matrices and all else
    muon                  torch.optim.Muon for the decoder's matrices, fused AdamW for the rest
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Optional

import torch
import torch.distributed as dist
from torch import nn

from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.distributed.precision import PRECISIONS
from megatron_switchlora.distributed.shard import without_padding
from megatron_switchlora.model.protocol import build_model, family_of, initialize_weights
from megatron_switchlora.study.benchmarks.turns import Batches, Clock, Entry

PEERS = {  # whether an entry has a rank
    "transformers": False, "transformers compiled": False, "peft lora": True, "galore": True, "muon": False,
}  # fmt: skip


class Missing(Exception):
    """A peer cannot run here; the text is the reason."""


@contextmanager
def needing(package: str) -> Iterator[None]:
    """Raise Missing if what the body imports is not there, or does not load."""
    try:
        yield
    except Exception as error:  # bitsandbytes, which GaLore imports, fails in many ways
        raise Missing(f"{package} does not load here ({error})") from None


def transformers_model(config: RunConfig, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Return transformers' model of this configuration, with the weights from which ours starts."""
    with needing("transformers"):
        from transformers import AutoConfig, AutoModelForCausalLM
    size = config.model.vocab_size
    assert size is not None
    entries = family_of(config.model).hf_config(config.model, size, config.train.seq_len, {}, "float32")
    hf_config = AutoConfig.for_model(**{**entries, "use_cache": False})
    model = AutoModelForCausalLM.from_config(hf_config, attn_implementation="sdpa", dtype=torch.float32)
    ours = build_model(config.model)
    initialize_weights(ours, config.train.seed)
    model.load_state_dict({name: without_padding(param, param.data) for name, param in ours.named_parameters()})
    return model.train().to(device=device, dtype=dtype)


def with_peft(model: nn.Module, rank: int) -> nn.Module:
    """Return the model with PEFT's LoRA on its linears; its dense tensors train, too."""
    with needing("peft"):
        from peft import LoraConfig, get_peft_model
    adapters = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules="all-linear")
    wrapped = get_peft_model(model, adapters, autocast_adapter_dtype=False)
    for name, param in wrapped.named_parameters():
        if ".base_layer." not in name:
            param.requires_grad_(True)
    return wrapped


def decoder_matrices(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the parameters that are matrices of the decoder's layers, and all others."""
    named = list(model.named_parameters())
    matrices = [param for name, param in named if ".layers." in name and param.dim() == 2]
    others = [param for name, param in named if not (".layers." in name and param.dim() == 2)]
    return matrices, others


def fused_adamw(params: list[nn.Parameter], config: RunConfig) -> torch.optim.Optimizer:
    """Return torch's fused AdamW."""
    o = config.optim
    return torch.optim.AdamW(
        params, lr=config.lr, betas=(o.beta1, o.beta2), eps=o.eps, weight_decay=o.weight_decay, fused=True
    )


def galore_adamw(model: nn.Module, config: RunConfig, rank: int) -> list[torch.optim.Optimizer]:
    """Return GaLore's AdamW, with the settings of its README."""
    with needing("galore_torch"):
        from galore_torch import GaLoreAdamW
    matrices, others = decoder_matrices(model)
    projected = {"params": matrices, "rank": rank, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
    return [GaLoreAdamW([{"params": others}, projected], lr=config.lr, no_deprecation_warning=True)]


def muon(model: nn.Module, config: RunConfig) -> list[torch.optim.Optimizer]:
    """Return torch's Muon for the decoder's matrices, and fused AdamW."""
    kind = getattr(torch.optim, "Muon", None)
    if kind is None:
        raise Missing(f"torch {torch.__version__} has no Muon")
    matrices, others = decoder_matrices(model)
    return [kind(matrices, lr=config.lr, weight_decay=0.0), fused_adamw(others, config)]


def peer_entry(
    name: str, config: RunConfig, rank: Optional[int], device: torch.device, backend: str = "inductor"
) -> Entry:
    """Return a trainer of another library.

    Raises:
        Missing: a package that it needs is not installed.
    """
    model = transformers_model(config, device, PRECISIONS[config.train.precision])
    if name == "peft lora":
        model = with_peft(model, rank or 0)
    params = [param for param in model.parameters() if param.requires_grad]
    if name == "galore":
        optimizers = galore_adamw(model, config, rank or 0)
    elif name == "muon":
        optimizers = muon(model, config)
    else:
        optimizers = [fused_adamw(params, config)]
    facts = {"trained_parameters": sum(param.numel() for param in params)}
    sent = {"gradient": 0}
    if dist.is_initialized() and dist.get_world_size() > 1:
        model = reduced(model, sent)
    computed = torch.compile(model, backend=backend) if name == "transformers compiled" else model
    loop = plain_loop(model, computed, params, optimizers, config.optim.clip, Clock(device), sent)
    return Entry(*loop, facts, lambda: dict(sent))


def reduced(model: nn.Module, sent: dict[str, int]) -> nn.Module:
    """Return the model under DDP, which issues collectives from C++: a hook counts what it hands to them."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    wrapped = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)

    def count(group: Any, bucket: Any) -> Any:
        sent["gradient"] += bucket.buffer().numel() * bucket.buffer().element_size()
        return allreduce_hook(group, bucket)

    # DDP reads a hook's annotations, and takes no text for one
    wrapped.register_comm_hook(None, lambda group, bucket: count(group, bucket))
    return wrapped


def unreduced(model: nn.Module) -> AbstractContextManager[None]:
    """Return a context in which DDP, if the model is under it, reduces nothing."""
    return model.no_sync() if isinstance(model, nn.parallel.DistributedDataParallel) else nullcontext()


def plain_loop(
    model: nn.Module, computed: Callable[..., Any], params: list[nn.Parameter], optimizers: list[torch.optim.Optimizer],
    clip: float, clock: Clock, sent: dict[str, int],
) -> tuple[Callable[[int, Batches], float], Clock]:  # fmt: skip
    """Return the step of a plain training loop, and its clock."""

    def step(number: int, batches: Batches) -> float:
        sent["gradient"], total = 0, torch.zeros((), dtype=torch.float64, device=clock.device)
        for index, tokens in enumerate(batches):
            tokens = tokens.to(clock.device, non_blocking=True)
            inputs, targets = tokens[:, :-1], tokens[:, 1:].contiguous()
            with nullcontext() if index == len(batches) - 1 else unreduced(model):
                with clock.part("forward"):
                    loss = computed(input_ids=inputs, labels=targets, shift_labels=targets, use_cache=False).loss
                with clock.part("backward"):
                    (loss / len(batches)).backward()
            total += loss.detach()
        with clock.part("optimizer"):
            torch.nn.utils.clip_grad_norm_(params, clip)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        return float(total) / len(batches)

    return step, clock
