"""Attach a method to a model and give back its optimizer: two lines in somebody's own training loop.

    run = attach(model, "switchlora", rank=64, steps=40_000)
    for step in range(40_000):
        loss = model(batch)
        loss.backward()
        run.optimizer.step()
        run.optimizer.zero_grad()

The method's work before and after each step hangs on the optimizer as hooks. So it happens in every loop that steps the
optimizer, and not where a step is skipped. The optimizer's `state_dict` carries the method's state, as the candidate
bank. W and the factors are in the model's.
"""

from __future__ import annotations

import warnings
from dataclasses import fields, is_dataclass
from typing import Any, Optional

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

import megatron_switchlora.methods  # noqa: F401  # registers them
from megatron_switchlora.config.errors import UserError, require
from megatron_switchlora.config.facts import walk
from megatron_switchlora.config.field_checks import check_fields
from megatron_switchlora.config.method import METHODS, make_method, method_config_class
from megatron_switchlora.config.optim import OptimConfig, check_optim
from megatron_switchlora.config.rules import check_rates, refuse_foreign_sections
from megatron_switchlora.config.run import AttachedConfig, RunConfig
from megatron_switchlora.config.train import TrainConfig, check_train
from megatron_switchlora.distributed.mesh import lone_mesh, the_world
from megatron_switchlora.distributed.replica_check import differing
from megatron_switchlora.library.host import Host
from megatron_switchlora.library.targets import Target, Targets, find_targets, some
from megatron_switchlora.lowrank.linear import LowRankLinear
from megatron_switchlora.methods import build_method
from megatron_switchlora.methods.lora import Lora
from megatron_switchlora.optim.layout import plain_layout
from megatron_switchlora.optim.row_adamw import RowAdamW

TRAINERS = ("name", "full_rank_steps", "full_rank_lr", "base_spread", "base_precision", "ga", "merged_cache")
IGNORED = "_ddp_params_and_buffers_to_ignore"  # where DDP looks
STATE = "switchlora"  # the key of the method's state in the optimizer's


class Attached:
    """A method that drives a model; `model` is the model, `optimizer` steps its trainable tensors."""

    def __init__(self, host: Host, method: Lora, ignored: list[str]) -> None:
        self.model, self.method, self._host = host.module, method, host
        self.step = 0
        """Steps of the optimizer so far."""
        self.optimizer: RowAdamW = method.build_optimizer()
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] = group["base_lr"]
        params = [param for group in self.optimizer.param_groups for param in group["params"]]
        self.optimizer.attach(plain_layout(params))
        method.start(self.optimizer)
        weight = next(iter(method.linears.values())).weight
        self._was = weight.device, weight.dtype
        self._ignored, self._merged = ignored, False
        self._stashed: Optional[dict[str, Any]] = None
        self._hooks = [
            self.optimizer.register_step_pre_hook(self._before_step),
            self.optimizer.register_step_post_hook(self._after_step),
            self.optimizer.register_state_dict_post_hook(self._add_state),
            self.optimizer.register_load_state_dict_pre_hook(self._check_state),
            self.optimizer.register_load_state_dict_post_hook(self._take_state),
        ]

    def scheduler(self) -> LambdaLR:
        """Return the trainer's schedule: warm-up and cosine, with relora a jagged one. Step it after the optimizer."""
        return LambdaLR(self.optimizer, self.method.lr_factor, last_epoch=self.step - 1)

    def _before_step(self, *_: Any) -> None:
        weight = next(iter(self.method.linears.values())).weight
        require(
            (weight.device, weight.dtype) == self._was,
            f"W was on {self._was[0]} in {self._was[1]} when the method was attached, and is on {weight.device} in "
            f"{weight.dtype} now: move or cast the model first, then attach.",
        )
        self.method.before_step(self.step)

    def _after_step(self, *_: Any) -> None:
        self.method.after_step(self.step)
        self.step += 1
        if self.optimizer.found_nonfinite:
            self.optimizer.found_nonfinite = False
            warnings.warn(
                f"Step {self.step} had a gradient that is not finite and changed no weight.",
                RuntimeWarning,
                stacklevel=4,
            )

    def _facts(self) -> dict[str, Any]:
        """Return what must be the same where a state is loaded: options that change results, by name."""
        config, options = self.method.config, {}
        for name, entry, value in walk(config.method):
            if entry.metadata.get("results", True) and name.split(".")[0] not in TRAINERS:
                options[f"method.{name}"] = value
        scaling = config.method.scaling
        return {**options, "method": config.method.name, "scaling": scaling, "steps": config.train.steps,
                "seed": config.train.seed}  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """Return the method's own state: its step, and for switchlora the bank and the schedule's integers."""
        slices = {piece.name: piece.tensor.detach().clone() for piece in self.method.slices()}
        return {"step": self.step, "tensors": slices, "facts": self._facts()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the state of `state_dict`; load the model's own before it.

        Raises:
            UserError: the state is that of another method or model.
        """
        self._require_own(state)
        self._take(state)

    def _require_own(self, state: dict[str, Any]) -> None:
        here, given = self._facts(), state["facts"]
        other = [f"{key} {given.get(key)!r} there, {here.get(key)!r} here" for key in here.keys() | given.keys()
                 if here.get(key) != given.get(key)]  # fmt: skip
        require(
            not other, f"The state is that of another run ({'; '.join(sorted(other)[:3])}): attach with its options."
        )
        mine = {piece.name: piece.tensor.shape for piece in self.method.slices()}
        theirs = {name: tensor.shape for name, tensor in state["tensors"].items()}
        wrong = [name for name in sorted(mine.keys() | theirs.keys()) if mine.get(name) != theirs.get(name)]
        require(
            not wrong,
            f"The state is that of another model: {', '.join(wrong[:3])} differ in shape, or are in one alone.",
        )

    @torch.no_grad()
    def _take(self, state: dict[str, Any]) -> None:
        for piece in self.method.slices():
            piece.tensor.copy_(state["tensors"][piece.name])
        self.step = state["step"]
        self.method.loaded()

    def _add_state(self, _: Any, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, STATE: self.state_dict()}

    def _check_state(self, _: Any, state: dict[str, Any]) -> dict[str, Any]:
        if STATE not in state:
            raise UserError("The optimizer's state has none of an attached method: it is that of another optimizer.")
        self._require_own(state[STATE])
        self._stashed = state[STATE]
        return {key: value for key, value in state.items() if key != STATE}

    def _take_state(self, _: Any) -> None:
        if self._stashed is not None:
            self._take(self._stashed)
        self._stashed = None

    def merge(self) -> nn.Module:
        """Fold W + s B A into plain linears, put those back, and return the model. The optimizer steps no longer.

        Raises:
            UserError: it was done before.
        """
        require(not self._merged, "The adapters were merged into the model already.")
        self._merged = True
        self._host.restore(self.method.linears)
        for hook in self._hooks:
            hook.remove()
        self.optimizer.register_step_pre_hook(_ended)
        setattr(self.model, IGNORED, self._ignored)
        return self.model


def _ended(*_: Any) -> None:
    raise UserError("The adapters were merged into the model, so this optimizer has nothing to step: attach again.")


def attach(
    model: nn.Module,
    method: str = "switchlora",
    *,
    rank: int,
    steps: int,
    targets: Targets = "all-linear",
    lr: Optional[float] = None,
    dense_lr: Optional[float] = None,
    warmup_steps: int = 0,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    lora_plus_ratio: float = 1.0,
    seed: int = 0,
    skip_small: bool = False,
    **options: Any,
) -> Attached:
    """Replace linears of a model by adapted ones, in place, and return what trains it.

    The other trainable parameters train at `dense_lr`, by default `lr`; at 0 they are frozen. `options` are those of
    the configuration's section `method`, as `init="pissa"` or `switch={"interval0": 40}`. `targets` are described in
    `library/targets.py`. `steps` is the length of the schedules. A linear with fewer rows or columns than `rank` is an
    error, or with `skip_small` left as it is.

    Raises:
        UserError: with the rule, the values and what to change.
    """
    require(type(rank) is int and rank >= 1, f"rank must be a whole number from 1 on, not {rank!r}.")
    _check_model(model)
    section = _method_section(method, rank, options)
    found = _large_enough(find_targets(model, targets), rank, skip_small)
    optim = OptimConfig(
        lr=lr, dense_lr=dense_lr, lora_plus_ratio=lora_plus_ratio, beta1=betas[0], beta2=betas[1], eps=eps,
        weight_decay=weight_decay, clip=0.0,
    )  # fmt: skip
    train = TrainConfig(steps=steps, warmup_steps=warmup_steps, seed=seed)
    _check_options(RunConfig(method=section, optim=optim, train=train))
    shapes = [(each.weight.size(0), each.weight.size(1)) for each in found]
    config = AttachedConfig(method=section, optim=optim, train=train, shapes=shapes)
    section.facts.check(config)
    host = Host(model, found)
    if all(dtype == torch.bfloat16 for dtype in host.dtypes.values()):
        config.train.precision = "bf16"
    driven = build_method(config, host, lone_mesh())  # type: ignore[arg-type]
    assert isinstance(driven, Lora)
    host.cast(driven.linears)
    ignored = list(getattr(model, IGNORED, []))
    _keep_from_ddp(model, driven.linears, ignored)
    return Attached(host, driven, ignored)


def _check_options(config: RunConfig) -> None:
    """Check all that does not depend on the model, as for the trainer.

    Raises:
        UserError: with the rule, the values and what to change.
    """
    check_fields(config)
    check_optim(config.optim)
    check_train(config.train)
    refuse_foreign_sections(config.method)
    require(config.method.init != "lora_ga", "init lora_ga needs the trainer, which forms gradients: use another init.")
    check_rates(config)


def _check_model(model: nn.Module) -> None:
    for name, module in model.named_modules():
        require(
            not isinstance(module, LowRankLinear),
            f"{name} has an adapter already: attach once, or call `merge` before.",
        )
        kinds = [kind.__name__ for kind in type(module).__mro__]
        require(
            not any(kind == "DistributedDataParallel" or kind.startswith(("FSDP", "FullySharded")) for kind in kinds),
            f"The model is wrapped by {kinds[0]} already: attach first, then wrap it in DistributedDataParallel.",
        )
    for name, param in model.named_parameters():
        require(param.device == next(model.parameters()).device, f"{name} is on {param.device}: use a single device.")
        require(not param.is_meta, f"{name} is on the meta device: attach to a model with values.")
        require(
            param.dtype != torch.float16,
            f"{name} is in fp16, whose small range loses updates: load the model in fp32 or bf16, and use autocast.",
        )


def _large_enough(targets: list[Target], rank: int, skip_small: bool) -> list[Target]:
    small = [target for target in targets if rank > min(target.weight.shape)]
    require(
        skip_small or not small,
        f"rank {rank} is above min(m, n) of {some(each.name for each in small)}: lower it, leave them out of the "
        "targets, or pass skip_small=True.",
    )
    kept = [target for target in targets if target not in small]
    require(bool(kept), f"rank {rank} is above min(m, n) of every target: lower it.")
    return kept


def _method_section(name: str, rank: int, options: dict[str, Any]) -> Any:
    """Return the section `method` of a configuration, from the options of `attach`."""
    possible = [key for key, facts in METHODS.items() if facts.adapts and not facts.merges]
    require(name in possible, f"method must be one of {', '.join(possible)}, not {name!r}.")
    known = method_config_class()(name=name)
    flat: dict[str, Any] = {"merged_cache": "micro_batch"}  # a longer one would outlive a load of other weights
    for key, value in options.items():
        require(
            key not in TRAINERS and key in vars(known),
            f"attach has no option {key!r} for method {name}.",
        )
        is_section = is_dataclass(getattr(known, key))
        require(
            is_section == isinstance(value, dict),
            f"{key} takes {'a dict' if is_section else 'no dict'}, not {value!r}.",
        )
        if is_section:
            inner = [each.name for each in fields(getattr(known, key))]
            wrong = [each for each in value if each not in inner]
            require(not wrong, f"{key} has no option {', '.join(map(repr, wrong))}: it has {', '.join(inner)}.")
            flat |= {f"{key}__{each}": inner_value for each, inner_value in value.items()}
        else:
            flat[key] = value
    return make_method(name, rank=rank, **flat)


def _keep_from_ddp(model: nn.Module, linears: dict[str, LowRankLinear], ignored: list[str]) -> None:
    """Have DDP not send W in each forward pass, since ranks fold the same changes into it; they must begin alike.

    Collective where torch's process group is initialised.

    Raises:
        UserError: ranks have different weights.
    """
    weights = {id(linear.weight) for linear in linears.values()}
    named = {name: buffer for name, buffer in model.named_buffers() if id(buffer) in weights}
    if dist.is_available() and dist.is_initialized():
        problems = differing(named.items(), the_world(), next(iter(named.values())).device)
        require(
            not problems,
            f"Ranks attach to models with different weights: {'; '.join(problems[:1])}. Seed them alike, or "
            "load the same.",
        )
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [*ignored, *named])
