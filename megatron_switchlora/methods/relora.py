"""ReLoRA (arXiv 2307.05695): LoRA that is folded into W and begun anew every K steps.

A restart, after the optimizer's step number K, 2K, ...:
    W <- W + s B A (from the factors as the forward uses them);  A drawn anew, classic;  B <- 0
so the function stays while the next cycle adds another r ranks. The adapters' moments are zeroed or pruned
by magnitude, their step counters begin at zero (published code lets its counter run on, so that the first
updates after a reset are three times too large and lean on the warm-up alone), and all learning rates, the
dense tensors' too, climb back to the cosine from zero (the jagged cosine schedules the whole optimizer).
The draws are pure functions of (seed, layer, restart), so a checkpoint needs no state beyond LoRA's.
Published code starts with A = B = 0, which trains nothing in the first cycle; this does not.
"""

from __future__ import annotations

from megatron_switchlora.distributed.shard import named_generator
from megatron_switchlora.lowrank.init import draw_vectors, factor_std
from megatron_switchlora.methods.lora import Lora
from megatron_switchlora.optim.pruning import prune_moments
from megatron_switchlora.optim.schedules import jagged_factor


class Relora(Lora):
    """Restarts after steps K, 2K, ..., K = `method.restart_interval`."""

    def lr_factor(self, step: int) -> float:
        train, method = self.config.train, self.config.method
        return jagged_factor(step, train.warmup_steps, train.steps, method.restart_interval, method.restart_warmup)

    def after_step(self, step: int) -> None:
        number, rest = divmod(step + 1, self.config.method.restart_interval)
        if rest == 0:
            self._restart(number)
        super().after_step(step)

    def _restart(self, number: int) -> None:
        """Restart `number`, counted from 1. Collective over the head where moments are pruned."""
        for name, linear in self.linears.items():
            linear.add_product(1.0)
            std = factor_std("A", "classic", linear.out_features, linear.in_features, linear.rank)
            generator = named_generator(self.config.train.seed, f"{name}.lora_A, restart {number}")
            self._fill_factor(linear.lora_A, draw_vectors(linear.rank, linear.in_features, std, generator))
            linear.lora_B.data.zero_()
            self.optimizer.rows_rewritten(linear.lora_A)
            self.optimizer.rows_rewritten(linear.lora_B)
        if self.config.method.restart_moments == "prune":
            prune_moments(self.optimizer, self.matrices(), self.config.method.restart_keep, self.mesh)
            for factor in self.matrices():
                self.optimizer.reset_steps(factor)
        else:
            for factor in self.matrices():
                self.optimizer.reset_rows(factor)
