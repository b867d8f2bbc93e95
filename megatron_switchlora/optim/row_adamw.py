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

from collections.abc import Iterator
from typing import Any, Optional

import torch
from torch import Tensor, nn

from megatron_switchlora.distributed.precision import at_least_fp32
from megatron_switchlora.distributed.shard import has_rows
from megatron_switchlora.distributed.slices import TensorSlice, flat_slices
from megatron_switchlora.optim.head_clip import HeadClip, gradient
from megatron_switchlora.optim.layout import Piece, RowLayout


def adamw_(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, frozen: Optional[Tensor],
    *, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
) -> None:  # fmt: skip
    """Take one AdamW step on a block, in place.

    param, grad, exp_avg, exp_avg_sq [rows, width]; step [rows] floats, advanced first. `frozen` holds the indices of
    rows that must not move, or None; their rows of `grad` are zeroed.
    """
    step += 1
    if frozen is not None:
        grad.index_fill_(0, frozen, 0.0)
    if weight_decay != 0:
        decay = torch.full_like(step, 1 - lr * weight_decay, dtype=param.dtype)
        if frozen is not None:
            decay.index_fill_(0, frozen, 1.0)
        param.mul_(decay[:, None])
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    steps = step.double()
    step_size = (-lr / (1 - beta1**steps)).to(param.dtype)
    correction = (1 - beta2**steps).sqrt().to(param.dtype)
    denominator = exp_avg_sq.sqrt().div_(correction[:, None]).add_(eps)
    param.addcdiv_(exp_avg * step_size[:, None], denominator)


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
        self.frozen: dict[nn.Parameter, Tensor] = {}
        self.found_nonfinite = False
        self.refuse_step = False
        self.head_clip: Optional[HeadClip] = None

    def attach(self, layout: RowLayout) -> None:
        """Adopt the layout and create all state now: DeepSpeed does not link all of the state that is created later."""
        self.layout = layout
        for master, count in layout.step_counts.items():
            self.state[master] = self._new_state(master, count)

    def _new_state(self, master: Tensor, rows: int) -> dict[str, Tensor]:
        return new_state(master, rows)

    def set_frozen(self, frozen: dict[nn.Parameter, Tensor]) -> None:
        """Set the rows (CPU index tensors) that must not move in the next step."""
        self.frozen = frozen

    def pieces(self, param: nn.Parameter) -> list[Piece]:
        """Return this rank's pieces of a parameter."""
        assert self.layout is not None, "attach() first"
        return self.layout.by_param.get(param, [])

    def _views(self, piece: Piece) -> tuple[Tensor, Tensor, Tensor]:
        state = self.state[piece.master]
        steps = state["row_step"][piece.step_offset : piece.step_offset + piece.rows]
        return piece.block(state["exp_avg"]), piece.block(state["exp_avg_sq"]), steps

    def _frozen_in(self, piece: Piece) -> Optional[Tensor]:
        rows = self.frozen.get(piece.param)
        local = piece.local_rows(rows) if rows is not None else None
        return local.to(piece.master.device) if local is not None and len(local) else None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        if self.layout is None:
            return
        if self.head_clip is not None:
            self._clip_heads(self.head_clip, self.layout)
        masters = [m for group in self.param_groups for m in group["params"] if m.grad is not None]
        if self.refuse_step or (
            masters and not torch.isfinite(torch.nn.utils.get_total_norm([m.grad for m in masters]))
        ):
            self.found_nonfinite = True
            return
        for group in self.param_groups:
            for master in group["params"]:
                if master.grad is not None and master in self.layout.by_master:
                    self._update(master, group)

    def _update(self, master: Tensor, group: dict[str, Any]) -> None:
        """Step a master that has a gradient."""
        assert self.layout is not None and master.grad is not None
        for piece in self.layout.by_master[master]:
            adamw_(
                piece.block(master), piece.block(master.grad), *self._views(piece),
                frozen=self._frozen_in(piece), lr=group["lr"], weight_decay=group["weight_decay"],
                beta1=self.betas[0], beta2=self.betas[1], eps=self.eps,
            )  # fmt: skip

    def _clip_heads(self, clip: HeadClip, layout: RowLayout) -> None:
        """Clip the gradients that this call steps.

        ZeRO calls once per group, so the engine measures the norms over all groups before. Otherwise they are measured
        here.
        """
        held = [p for pieces in layout.by_master.values() for p in pieces if p.master.grad is not None]
        if not clip.measured:
            clip.measure((piece.param, gradient(piece)) for piece in held)
            clip.measured = False
        clip.scale(held)

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
