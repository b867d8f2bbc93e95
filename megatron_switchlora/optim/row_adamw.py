"""AdamW with one step counter per LoRA vector (SwitchLoRA, section 2.3).

When a vector is switched, its counterpart's moments and step counter are reset to zero. The counter is one float per
row, so the optimizer state of a LoRA parameter takes 8 bytes per element and a remainder; the paper's full step matrix
takes 12.

Frozen rows get a zero gradient and no weight decay while their counter runs on. With zeroed moments they stay exactly
where they are, and start again with a warm-up.

Without resets the step equals `torch.optim.AdamW` (foreach) bit for bit on the CPU in fp32. The operations and their
order are the same, and bias corrections are formed in float64 and cast once. The mask acts inside `step()`, that is
after DeepSpeed's norm and clip. `optim/layout.py` describes the tensors that are stepped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor, nn

from megatron_switchlora.config.errors import require
from megatron_switchlora.distributed.precision import at_least_fp32
from megatron_switchlora.distributed.shard import has_rows
from megatron_switchlora.distributed.slices import TensorSlice, flat_slices
from megatron_switchlora.lowrank.indices import Indices
from megatron_switchlora.lowrank.rows import RowNumbers, adjacent, joined
from megatron_switchlora.optim.head_clip import HeadClip
from megatron_switchlora.optim.layout import Block, Piece, RowLayout
from megatron_switchlora.optim.row_states import RowChanges, RowStates


@dataclass(frozen=True)
class Rates:
    """AdamW's rates for moments; with a flag `refused` on the device tensors, which change nothing if it is set."""

    weight: float | Tensor  # of the gradient in the first moment
    beta2: float | Tensor
    eps: float
    refused: Optional[Tensor] = None
    advance: int | Tensor = 1  # of the step counters
    refused_vectors: Optional[Tensor] = None  # [2, 1]: the step size and correction of a refused step


def adamw_(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    step_sizes: list[Tensor], corrections: list[Tensor], decays: Optional[list[Tensor]],
    factors: Optional[list[Tensor]], rates: Rates, square_weight: float,
) -> None:  # fmt: skip
    """Take one AdamW step on blocks [rows, width], in place: a pure function of tensors, in one pass over them.

    step_sizes, corrections and decays [rows, 1] are those of `row_vectors`; without decays there is no weight decay.
    factors scale the gradients; without them nothing is clipped.
    """
    if factors is not None and all(factor is factors[0] for factor in factors):
        torch._foreach_mul_(grads, factors[0])
    elif factors is not None:
        for grad, factor in zip(grads, factors, strict=True):
            grad.mul_(factor)
    if rates.refused is not None:
        for grad in grads:
            grad.masked_fill_(rates.refused, 0.0)
    if decays is not None:
        for param, decay in zip(params, decays, strict=True):
            param.mul_(decay)
    if isinstance(rates.weight, Tensor):
        for exp_avg, grad in zip(exp_avgs, grads, strict=True):
            exp_avg.lerp_(grad, rates.weight)
    else:
        torch._foreach_lerp_(exp_avgs, grads, rates.weight)
    torch._foreach_mul_(exp_avg_sqs, rates.beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, square_weight)
    denominators = torch._foreach_sqrt(exp_avg_sqs)
    for denominator, correction in zip(denominators, corrections, strict=True):
        denominator.div_(correction)
    torch._foreach_add_(denominators, rates.eps)
    updates = [exp_avg * step_size for exp_avg, step_size in zip(exp_avgs, step_sizes, strict=True)]
    torch._foreach_addcdiv_(params, updates, denominators)


def row_vectors(steps: Tensor, betas: Tensor, lr: float, dtype: torch.dtype, rates: Rates) -> tuple[Tensor, Tensor]:
    """Advance the counters [rows], and return each row's step size and bias correction [rows, 1].

    betas [2, 1] are float64. Both results are formed in float64 and cast once. A refused step advances nothing, and has
    step sizes of zero.
    """
    steps += rates.advance
    rests = 1 - betas ** steps.double()
    rests[0].reciprocal_().mul_(-lr)
    rests[1].sqrt_()
    vectors = rests.to(dtype)
    if rates.refused is not None and rates.refused_vectors is not None:
        vectors = torch.where(rates.refused, rates.refused_vectors, vectors)
    step_size, correction = vectors[..., None]
    return step_size, correction


def _shapes(tensors: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def new_state(master: Tensor, rows: int) -> dict[str, Tensor]:
    """Return the state that a master with this many rows has before the first step."""
    return {
        "exp_avg": master.new_zeros(master.shape),
        "exp_avg_sq": master.new_zeros(master.shape),
        "row_step": torch.zeros(rows, dtype=torch.float32, device=master.device),
    }


class RowAdamW(torch.optim.Optimizer):
    """AdamW over a `RowLayout`; groups carry `lr`, `weight_decay` and a `name`.

    `step` does nothing before `attach`, since DeepSpeed's bf16 stage 0 steps once at initialisation. A non-finite
    gradient leaves everything as it is and sets `found_nonfinite`. So does `refuse_step`, which the caller sets if
    another rank has a non-finite gradient.
    """

    def __init__(self, groups: list[dict[str, Any]], *, beta1: float, beta2: float, eps: float) -> None:
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0})
        self.betas, self.eps = (beta1, beta2), eps
        self.layout: Optional[RowLayout] = None
        self.numbers = RowNumbers(group["params"] for group in groups)
        self.frozen: list[tuple[Block, Tensor]] = []
        self.found_nonfinite = False
        self.refuse_step = False
        self.head_clip: Optional[HeadClip] = None
        self._last_rates: Optional[Rates] = None

    def attach(self, layout: RowLayout) -> None:
        """Adopt the layout and create all state now: DeepSpeed does not link all of the state that is created later."""
        self.layout = layout
        for master, count in layout.step_counts.items():
            self.state[master] = self._new_state(master, count)
        for group in self.param_groups:
            counters = [self.state[m]["row_step"] for m in group["params"] if self._has_blocks(m)]
            if counters:
                joined(counters)
        device = next((master.device for master in layout.by_master), torch.device("cpu"))
        self._betas = torch.tensor(self.betas, dtype=torch.float64, device=device)[:, None]
        self._refused_vectors = torch.tensor([[0.0], [1.0]], dtype=torch.float64, device=device)
        self._rows: Optional[RowStates] = None

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy a state of `state_dict` into the tensors that are there, of which blocks and rows are views.

        Raises:
            UserError: it is that of other parameters.
        """
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        masters = [master for group in self.param_groups for master in group["params"]]
        here = {number: self.state[each] for number, each in enumerate(masters) if each in self.state}
        given = state_dict["state"]  # by the numbers that `state_dict` gives
        alike = here.keys() == given.keys() and all(_shapes(here[key]) == _shapes(given[key]) for key in here)
        require(
            alike and len(state_dict["param_groups"]) == len(self.param_groups),
            "The optimizer's state is that of other parameters: attach with the options it was made with.",
        )
        for number, tensors in here.items():
            for name, tensor in tensors.items():
                tensor.copy_(given[number][name])
        for group, other in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group |= {key: value for key, value in other.items() if key != "params"}
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _has_blocks(self, master: Tensor) -> bool:
        """Return whether the master is stepped by blocks."""
        return self.layout is not None and master in self.layout.by_master

    def _new_state(self, master: Tensor, rows: int) -> dict[str, Tensor]:
        return new_state(master, rows)

    @property
    def rows(self) -> RowStates:
        """The adapters' rows in masters and state, by number."""
        assert self.layout is not None, "attach() first"
        if self._rows is None:
            self._rows = RowStates(self.numbers, self.layout, self.state)
        return self._rows

    def freeze(self, changes: RowChanges, indices: Indices) -> None:
        """Set the rows that must not move in the next step to those of `changes`."""
        self.frozen = [(block, indices[number]) for block, number in changes.frozen]

    def pieces(self, param: nn.Parameter) -> list[Piece]:
        """Return this rank's pieces of a parameter."""
        assert self.layout is not None, "attach() first"
        return self.layout.by_param.get(param, [])

    def _views(self, piece: Piece) -> tuple[Tensor, Tensor, Tensor]:
        state = self.state[piece.master]
        steps = state["row_step"][piece.step_offset : piece.step_offset + piece.rows]
        return piece.block(state["exp_avg"]), piece.block(state["exp_avg_sq"]), steps

    @torch.no_grad()
    def step(self, closure: Optional[Callable[[], Any]] = None) -> Any:
        """Take a step; return what `closure`, which may form the gradients, returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.layout is None:
            return loss
        refused = self._refused(self.layout)
        if refused is True:
            self.found_nonfinite = True
            return loss
        for group in self.param_groups:
            held = [m for m in group["params"] if m.grad is not None and m in self.layout.by_master]
            if held:
                self._update(held, group, None if refused is False else refused)
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group before `attach`; afterwards the layout is fixed, and that is an error."""
        require(
            getattr(self, "layout", None) is None,
            "Parameter groups cannot be added once the optimizer is attached: unfreeze the parameters before.",
        )
        super().add_param_group(param_group)

    def _refused(self, layout: RowLayout) -> bool | Tensor:
        """Return whether the gradients are refused, on the device where reading it would wait.

        ZeRO calls once per group, so the engine measures the norms over all groups before. Otherwise they are measured
        here.
        """
        clip = self.head_clip
        if self.refuse_step:
            return True
        if clip is None:
            grads = [m.grad for group in self.param_groups for m in group["params"] if m.grad is not None]
            return bool(grads) and not bool(torch.isfinite(torch.nn.utils.get_total_norm(grads)))
        if not clip.measured:
            held = [p for pieces in layout.by_master.values() for p in pieces if p.master.grad is not None]
            clip.measure((piece.param, piece.block(piece.master.grad)) for piece in held)  # type: ignore[arg-type]
            clip.measured = False
        known = clip.known_refusal()
        return clip.refused if known is None else known

    def _rates(self, refused: Optional[Tensor], dtype: torch.dtype) -> Rates:
        beta1, beta2 = self.betas
        if refused is None:
            return Rates(1 - beta1, beta2, self.eps)
        last = self._last_rates
        if last is None or last.refused is not refused:  # once for all groups
            weight, decay = (refused.new_full((), value, dtype=dtype) for value in (1 - beta1, beta2))
            weight, decay = weight.masked_fill_(refused, 0.0), decay.masked_fill_(refused, 1.0)
            vectors = self._refused_vectors.to(dtype)
            last = self._last_rates = Rates(weight, decay, self.eps, refused, refused.logical_not(), vectors)
        return last

    def _update(self, masters: list[Tensor], group: dict[str, Any], refused: Optional[Tensor]) -> None:
        """Step masters of a group that have gradients, or change nothing if the flag `refused` is set."""
        assert self.layout is not None
        rates = self._rates(refused, masters[0].dtype)
        sizes, corrections, decays = self._vectors(masters, group, rates)
        factors = self.head_clip.factors(masters[0].dtype) if self.head_clip is not None else None
        for block, rows in self.frozen:
            master = block.first.master
            if master in sizes:
                block.of(master.grad).index_fill_(0, rows, 0.0)  # type: ignore[arg-type]
                if decays:
                    block.steps_of(decays[master]).index_fill_(0, rows, 1.0)
        for blocks in self.layout.parts(masters):
            held = [(block, block.first.master, self.state[block.first.master]) for block in blocks]
            adamw_(
                [block.of(master.data) for block, master, _ in held],
                [block.of(master.grad) for block, master, _ in held],  # type: ignore[arg-type]
                [block.of(state["exp_avg"]) for block, _, state in held],
                [block.of(state["exp_avg_sq"]) for block, _, state in held],
                [block.steps_of(sizes[master]) for block, master, _ in held],
                [block.steps_of(corrections[master]) for block, master, _ in held],
                [block.steps_of(decays[master]) for block, master, _ in held] if decays else None,
                [factors[block.head] for block in blocks] if factors else None, rates, 1 - self.betas[1],
            )  # fmt: skip

    def _vectors(self, masters: list[Tensor], group: dict[str, Any], rates: Rates) -> tuple[dict[Tensor, Tensor], ...]:
        """Advance the masters' counters; return step sizes, corrections and weight decays [rows, 1] of each.

        Without weight decay there are none of the last. Counters of one group follow one another in memory.
        """
        counters = [self.state[master]["row_step"] for master in masters]
        together = adjacent(counters) if len({master.dtype for master in masters}) == 1 else None
        runs = (
            [(together, masters)]
            if together is not None
            else [(c, [m]) for c, m in zip(counters, masters, strict=True)]
        )
        found: tuple[dict[Tensor, Tensor], ...] = ({}, {}, {})
        for steps, members in runs:
            vectors: tuple[Tensor, ...] = row_vectors(steps, self._betas, group["lr"], members[0].dtype, rates)
            if group["weight_decay"] != 0:
                decay = torch.full_like(vectors[0], 1 - group["lr"] * group["weight_decay"])
                vectors += (decay if rates.refused is None else decay.masked_fill_(rates.refused, 1.0),)
            lengths = [len(self.state[master]["row_step"]) for master in members]
            for kind, vector in zip(found, vectors, strict=False):
                kind |= dict(zip(members, vector.split(lengths), strict=True))
        return found

    @torch.no_grad()
    def rows_rewritten(self, param: nn.Parameter, rows: Optional[Tensor] = None) -> None:
        """Copy rows of a parameter that were changed in place to the masters here.

        `rows` is a CPU index tensor; None means all rows.
        """
        for piece in self.pieces(param):
            local = piece.local_rows(rows).to(piece.master.device)
            if len(local) and piece.master is not param:
                values = piece.source(param).index_select(0, local).to(piece.master.dtype)
                piece.block(piece.master.data).index_copy_(0, local, values)

    @torch.no_grad()
    def reset_rows(self, param: nn.Parameter, rows: Optional[Tensor] = None) -> None:
        """Zero moments and step counters of rows (a CPU index tensor; None means all rows)."""
        for piece in self.pieces(param):
            local = piece.local_rows(rows).to(piece.master.device)
            if len(local):
                for view in self._views(piece):
                    view.index_fill_(0, local, 0.0)

    @property
    def partitioned(self) -> bool:
        """Whether data-parallel ranks hold different elements of the masters."""
        assert self.layout is not None, "attach() first"
        return self.layout.partitioned

    @torch.no_grad()
    def sum_of_masters(self, params: list[nn.Parameter]) -> Tensor:
        """Return the sum of the masters of parameters of one shape, in at least fp32.

        Elements that other ranks hold are zero.
        """
        like = params[0]
        total = torch.zeros(like.shape, dtype=at_least_fp32(like.dtype), device=like.device)
        for param in params:
            for piece in self.pieces(param):
                piece.source(total).add_(piece.block(piece.master.data))
        return total

    @torch.no_grad()
    def set_values(self, param: nn.Parameter, values: Tensor) -> None:
        """Set a parameter, and what this rank holds of its master."""
        param.copy_(values)
        for piece in self.pieces(param):
            if piece.master is not param:
                piece.block(piece.master.data).copy_(piece.source(values))

    @torch.no_grad()
    def reset_steps(self, param: nn.Parameter) -> None:
        """Zero the step counters of all rows, but not their moments."""
        for piece in self.pieces(param):
            self._views(piece)[2].zero_()

    def slices(self, name: str, param: nn.Parameter, group: Optional[str]) -> Iterator[TensorSlice]:
        """Yield what this rank holds of a parameter's master and of its state.

        The master has the parameter's name. The state's names are NAME:exp_avg, NAME:exp_avg_sq and, for the step
        counters, NAME:row_step [rows].
        """
        for piece in self.pieces(param):
            exp_avg, exp_avg_sq, steps = self._views(piece)
            blocks = {"": piece.block(piece.master.data), ":exp_avg": exp_avg, ":exp_avg_sq": exp_avg_sq}
            for suffix, block in blocks.items():
                yield from flat_slices(name + suffix, param, piece.start, block.view(-1), group)
            yield TensorSlice(f"{name}:row_step", (piece.row_count(),), (piece.first_row,), steps, group)

    @torch.no_grad()
    def load_rows(self, param: nn.Parameter, values: dict[str, Tensor]) -> None:
        """Set this rank's share of a parameter's state from full tensors.

        `master`, `exp_avg` and `exp_avg_sq` are shaped like the parameter; `row_step` has one entry per row.
        """
        for piece in self.pieces(param):
            exp_avg, exp_avg_sq, steps = self._views(piece)
            piece.block(piece.master.data).copy_(piece.source(values["master"]))
            exp_avg.copy_(piece.source(values["exp_avg"]))
            exp_avg_sq.copy_(piece.source(values["exp_avg_sq"]))
            steps.copy_(values["row_step"][piece.first_row : piece.first_row + piece.rows])

    @torch.no_grad()
    def read_rows(self, param: nn.Parameter) -> dict[str, Tensor]:
        """Return this rank's share of the same four tensors, zero where another rank owns the elements."""
        rows = param.size(0) if has_rows(param) else 1
        dtype = at_least_fp32(param.dtype)
        full = {key: torch.zeros(param.shape, dtype=dtype) for key in ("master", "exp_avg", "exp_avg_sq")}
        full["row_step"] = torch.zeros(rows)
        for piece in self.pieces(param):
            exp_avg, exp_avg_sq, steps = self._views(piece)
            blocks = {"master": piece.block(piece.master.data), "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
            for key, block in blocks.items():
                piece.source(full[key]).copy_(block)
            full["row_step"][piece.first_row : piece.first_row + piece.rows] = steps.cpu()
        return full
