"""An independent reference of SwitchLoRA training, for tests only.

A single-process, float64, deliberately naive LLaMA with SwitchLoRA adapters on all seven projections of a layer,
written from the description of the algorithm (arXiv 2406.06564 as settled in the project's design notes) and from the
LLaMA architecture alone. It imports nothing of the package that it is used to check and shares no code with it. Vectors
are switched, frozen and updated one at a time in Python loops: readable first, slow by intent, for tiny models.

Notation: W (m, n) is the frozen weight, already W0 - s B A at the start; B (m, r); A (r, n); y = W x + s B A x.
A "vector" is a row of A or a column of B. `frozen_left_A[name][i]` says for how many more steps row i of A is masked,
and `frozen_left_B` says the same of B's columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

PROJECTIONS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


@dataclass
class RefConfig:
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    rope_theta: float
    rms_norm_eps: float
    rank: int
    scaling: float
    interval0: float
    switch_ratio: float
    switch_total_steps: int
    freeze_steps: int
    selection: str  # "ring", "random" or "independent"
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    clip: float
    switching: bool = True  # False: plain LoRA


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * (x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps))


def rotate(x: Tensor, theta: float) -> Tensor:
    """Rotary position embedding of x (batch, heads, S, head_dim), halves rotated, all in float64."""
    length, dim = x.shape[-2], x.shape[-1]
    frequencies = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies[None, :]
    angles = torch.cat([angles, angles], dim=-1)
    first, second = x[..., : dim // 2], x[..., dim // 2 :]
    return x * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()


class Reference:
    def __init__(
        self,
        cfg: RefConfig,
        dense: dict[str, Tensor],
        frozen: dict[str, Tensor],
        A: dict[str, Tensor],
        B: dict[str, Tensor],
        bank_A: dict[str, Tensor],
        bank_B: dict[str, Tensor],
        uniform: Callable[[int, int, str], float],
        sample: Callable[[int, int, str, list[int], int], list[int]],
    ) -> None:
        """Tensors are cloned to float64. `frozen` is W, from which s B A is already subtracted.

        uniform(step, layer, side): the Bernoulli draw, in [0, 1).
        sample(step, layer, what, eligible, count): `count` of the ascending list `eligible`, without replacement.
        `layer` counts adapted linears: decoder layer 0 q, k, v, o, gate, up, down, then decoder layer 1.
        """
        if cfg.selection not in ("ring", "random", "independent"):
            raise ValueError(f"unknown selection {cfg.selection!r}")
        self.cfg = cfg
        self.uniform, self.sample = uniform, sample
        self.names = [f"model.layers.{i}.{p}" for i in range(cfg.num_layers) for p in PROJECTIONS]

        def copies(tensors: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
            return {name: tensors[name].detach().clone().to(torch.float64) for name in names}

        self.W = copies(frozen, self.names)
        self.A, self.B = copies(A, self.names), copies(B, self.names)
        self.bank_A, self.bank_B = copies(bank_A, self.names), copies(bank_B, self.names)
        self.dense = copies(dense, list(dense))

        r = cfg.rank
        self.slot_of_A: dict[str, list[int]] = {}
        self.slot_of_B: dict[str, list[int]] = {}
        self.frozen_left_A = {name: [0] * r for name in self.names}
        self.frozen_left_B = {name: [0] * r for name in self.names}
        self.pointer_A = dict.fromkeys(self.names, 0)
        self.pointer_B = dict.fromkeys(self.names, r // 2)
        for name in self.names:
            m, n = self.W[name].shape
            c = min(m, n)
            assert self.A[name].shape == (r, n) and self.B[name].shape == (m, r), name
            assert self.bank_A[name].shape == (c, n) and self.bank_B[name].shape == (c, m), name
            # Live vectors own the last r slots. B's list is turned so that the position just before B's pointer owns
            # the last slot, as the position before A's pointer does: the next slot, 0, is then free on both sides.
            # (Where c < r nothing is ever switched and slots have no meaning.)
            self.slot_of_A[name] = [c - r + i for i in range(r)]
            self.slot_of_B[name] = [c - r + (i - r // 2) % r for i in range(r)]

        self.m: dict[tuple[str, str], Tensor] = {}
        self.v: dict[tuple[str, str], Tensor] = {}
        self.t: dict[tuple[str, str], int | list[int]] = {}
        for key, parameter in self.parameters().items():
            parameter.requires_grad_(True)
            self.m[key] = torch.zeros_like(parameter, requires_grad=False)
            self.v[key] = torch.zeros_like(parameter, requires_grad=False)
            self.t[key] = 0 if key[0] == "dense" else [0] * r

    def parameters(self) -> dict[tuple[str, str], Tensor]:
        """Every trainable tensor, keyed as the optimizer's state is."""
        out = {("dense", name): tensor for name, tensor in self.dense.items()}
        for name in self.names:
            out[("A", name)] = self.A[name]
            out[("B", name)] = self.B[name]
        return out

    # ------------------------------------------------------------------ model

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.W[name].T + self.cfg.scaling * ((x @ self.A[name].T) @ self.B[name].T)

    def attention(self, prefix: str, x: Tensor) -> Tensor:
        cfg = self.cfg
        batch, length, _ = x.shape
        dim = cfg.hidden_size // cfg.num_heads

        def heads(y: Tensor, count: int) -> Tensor:
            return y.reshape(batch, length, count, dim).transpose(1, 2)

        q = rotate(heads(self.linear(prefix + "q_proj", x), cfg.num_heads), cfg.rope_theta)
        k = rotate(heads(self.linear(prefix + "k_proj", x), cfg.num_kv_heads), cfg.rope_theta)
        v = heads(self.linear(prefix + "v_proj", x), cfg.num_kv_heads)
        # Query head h reads key/value head h // (num_heads / num_kv_heads).
        group = cfg.num_heads // cfg.num_kv_heads
        k = torch.stack([k[:, h // group] for h in range(cfg.num_heads)], dim=1)
        v = torch.stack([v[:, h // group] for h in range(cfg.num_heads)], dim=1)
        scores = q @ k.transpose(-1, -2) / math.sqrt(dim)
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        weights = torch.softmax(scores.masked_fill(future, -math.inf), dim=-1)
        merged = (weights @ v).transpose(1, 2).reshape(batch, length, cfg.num_heads * dim)
        return self.linear(prefix + "o_proj", merged)

    def mlp(self, prefix: str, x: Tensor) -> Tensor:
        gate, up = self.linear(prefix + "gate_proj", x), self.linear(prefix + "up_proj", x)
        return self.linear(prefix + "down_proj", gate * torch.sigmoid(gate) * up)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits (batch, S, vocabulary) in float64; autograd reaches A, B and the dense tensors."""
        eps = self.cfg.rms_norm_eps
        x = self.dense["model.embed_tokens.weight"][input_ids]
        for i in range(self.cfg.num_layers):
            p = f"model.layers.{i}."
            x = x + self.attention(p + "self_attn.", rms_norm(x, self.dense[p + "input_layernorm.weight"], eps))
            x = x + self.mlp(p + "mlp.", rms_norm(x, self.dense[p + "post_attention_layernorm.weight"], eps))
        return rms_norm(x, self.dense["model.norm.weight"], eps) @ self.dense["lm_head.weight"].T

    def loss(self, tokens: Tensor) -> Tensor:
        """Mean cross entropy; tokens (batch, S + 1) hold inputs and, shifted by one, targets."""
        log_p = torch.log_softmax(self.forward(tokens[:, :-1]), dim=-1)
        return -log_p.gather(-1, tokens[:, 1:, None]).mean()

    def effective_weight(self, name: str) -> Tensor:
        return (self.W[name] + self.cfg.scaling * self.B[name] @ self.A[name]).detach()

    # -------------------------------------------------------------- switching

    def expected_count(self, step: int) -> float:
        """x: the mean number of vectors to switch on each side of a matrix in this step, before the cap."""
        cfg = self.cfg
        rate = 0.3 ** ((step + 1) / (cfg.switch_ratio * cfg.switch_total_steps))
        interval = cfg.interval0 / rate
        if interval < 2 * cfg.freeze_steps:
            raise ValueError(f"switching interval {interval} is below twice the {cfg.freeze_steps} frozen steps")
        return cfg.rank / interval

    def draw_count(self, step: int, layer: int, side: str) -> int:
        x = self.expected_count(step)
        return math.floor(x) + (1 if self.uniform(step, layer, side) < x - math.floor(x) else 0)

    @torch.no_grad()
    def switch_A(self, name: str, i: int, slot: int) -> None:
        old, new = self.A[name][i].clone(), self.bank_A[name][slot].clone()
        self.W[name] += self.cfg.scaling * torch.outer(self.B[name][:, i], old - new)
        self.bank_A[name][self.slot_of_A[name][i]] = old
        self.A[name][i] = new
        self.slot_of_A[name][i] = slot
        # The counterpart, column i of B, starts afresh and is frozen, this step included.
        self.m["B", name][:, i] = 0
        self.v["B", name][:, i] = 0
        self.t["B", name][i] = 0
        self.frozen_left_B[name][i] = max(1, self.cfg.freeze_steps)

    @torch.no_grad()
    def switch_B(self, name: str, i: int, slot: int) -> None:
        old, new = self.B[name][:, i].clone(), self.bank_B[name][slot].clone()
        self.W[name] += self.cfg.scaling * torch.outer(old - new, self.A[name][i])
        self.bank_B[name][self.slot_of_B[name][i]] = old
        self.B[name][:, i] = new
        self.slot_of_B[name][i] = slot
        self.m["A", name][i] = 0
        self.v["A", name][i] = 0
        self.t["A", name][i] = 0
        self.frozen_left_A[name][i] = max(1, self.cfg.freeze_steps)

    def free_slots(self, name: str, side: str) -> list[int]:
        live = (self.slot_of_A if side == "A" else self.slot_of_B)[name]
        return [slot for slot in range(min(self.W[name].shape)) if slot not in live]

    def switch_sequential(self, step: int, layer: int, name: str) -> int:
        """Positions in turn from the two pointers; slots in turn round the ring or ("random") drawn."""
        r, c = self.cfg.rank, min(self.W[name].shape)
        i_A, i_B = self.pointer_A[name], self.pointer_B[name]
        by_A = sum(left > 0 for left in self.frozen_left_B[name])  # columns of B that A's switches froze, behind i_A
        by_B = sum(left > 0 for left in self.frozen_left_A[name])  # rows of A that B's switches froze, behind i_B
        cap = min((i_A - by_A - i_B) % r, (i_B - by_B - i_A) % r, c - r)
        count = min(self.draw_count(step, layer, "A"), cap)
        if count == 0:
            return 0
        random = self.cfg.selection == "random"

        drawn = self.sample(step, layer, "slots_A", self.free_slots(name, "A"), count) if random else None
        for k in range(count):
            i = (i_A + k) % r
            self.switch_A(name, i, drawn[k] if random else (self.slot_of_A[name][(i - 1) % r] + 1) % c)
        drawn = self.sample(step, layer, "slots_B", self.free_slots(name, "B"), count) if random else None
        for k in range(count):
            i = (i_B + k) % r
            self.switch_B(name, i, drawn[k] if random else (self.slot_of_B[name][(i - 1) % r] + 1) % c)

        self.pointer_A[name] = (i_A + count) % r
        self.pointer_B[name] = (i_B + count) % r
        return 2 * count

    def switch_independent(self, step: int, layer: int, name: str) -> int:
        """The paper's Algorithm 2: counts, positions and slots drawn for A and then for B."""
        r, c = self.cfg.rank, min(self.W[name].shape)
        switched = 0
        for side in ("A", "B"):
            # For B this is looked up after A's switches: a position switched on A just now is frozen on B.
            frozen_left = (self.frozen_left_A if side == "A" else self.frozen_left_B)[name]
            positions = [i for i in range(r) if frozen_left[i] == 0]
            count = min(self.draw_count(step, layer, side), len(positions), c - r)
            if count == 0:
                continue
            positions = self.sample(step, layer, f"positions_{side}", positions, count)
            slots = self.sample(step, layer, f"slots_{side}", self.free_slots(name, side), count)
            for i, slot in zip(positions, slots, strict=True):
                (self.switch_A if side == "A" else self.switch_B)(name, i, slot)
            switched += count
        return switched

    def switch_all(self, step: int) -> int:
        if not self.cfg.switching:
            return 0
        switched = 0
        for layer, name in enumerate(self.names):
            if min(self.W[name].shape) <= self.cfg.rank:
                continue
            one = self.switch_independent if self.cfg.selection == "independent" else self.switch_sequential
            switched += one(step, layer, name)
        return switched

    # -------------------------------------------------------------- optimizer

    def adam(self, p: Tensor, g: Tensor, m: Tensor, v: Tensor, t: int, lr: float, decay: float) -> None:
        """One Adam update, in place, of a tensor or of a vector given as views; t counts its steps with this one."""
        cfg = self.cfg
        p.mul_(1 - lr * decay)
        m.copy_(cfg.beta1 * m + (1 - cfg.beta1) * g)
        v.copy_(cfg.beta2 * v + (1 - cfg.beta2) * g * g)
        m_hat = m / (1 - cfg.beta1**t)
        v_hat = v / (1 - cfg.beta2**t)
        p.sub_(lr * m_hat / (v_hat.sqrt() + cfg.eps))

    def step(self, step: int, tokens_list: list[Tensor], lr: float, dense_lr: float) -> dict:
        """One optimizer step: backward of all micro-batches, clip, switch, mask the frozen vectors, Adam."""
        parameters = self.parameters()
        loss = sum(self.loss(tokens) for tokens in tokens_list) / len(tokens_list)
        gradients = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))

        norm = math.sqrt(sum(float((g * g).sum()) for g in gradients.values()))
        if self.cfg.clip > 0:
            factor = min(1.0, self.cfg.clip / (norm + 1e-6))
            gradients = {key: factor * g for key, g in gradients.items()}

        switched = self.switch_all(step)

        with torch.no_grad():
            for key, p in parameters.items():
                side, name = key
                g, m, v = gradients[key], self.m[key], self.v[key]
                if side == "dense":
                    self.t[key] += 1
                    self.adam(p, g, m, v, self.t[key], dense_lr, self.cfg.weight_decay if p.dim() > 1 else 0.0)
                    continue
                frozen_left = (self.frozen_left_A if side == "A" else self.frozen_left_B)[name]
                for i in range(self.cfg.rank):
                    vector = (i,) if side == "A" else (slice(None), i)
                    self.t[key][i] += 1  # a frozen vector's steps are counted too
                    gradient, decay = g[vector], self.cfg.weight_decay
                    if frozen_left[i] > 0:
                        gradient, decay = torch.zeros_like(gradient), 0.0
                        frozen_left[i] -= 1
                    self.adam(p[vector], gradient, m[vector], v[vector], self.t[key][i], lr, decay)

        return {"loss": loss.item(), "grad_norm": norm, "switched": switched}
