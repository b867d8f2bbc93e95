"""Train one run from configuration to final model.

`Trainer` builds mesh, data, model, method, engine and run folder, and fills them from the checkpoint of a resumed run.
`fit` runs the loop: step, record, evaluate, save, export. A batch is a pure function of the step, so the step is the
whole position in the data. Every rank runs the same code. Only rank 0 prints and writes, except for checkpoints.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Optional

import torch
import torch.distributed as dist

from megatron_switchlora.checkpoint.engine_state import load_state, state_file
from megatron_switchlora.checkpoint.files import Checkpoint, published
from megatron_switchlora.checkpoint.lte_regroup import load_regrouped, regroups
from megatron_switchlora.checkpoint.resume import ResumePoint, open_together
from megatron_switchlora.checkpoint.resume_rules import compare_data
from megatron_switchlora.checkpoint.saver import Saver
from megatron_switchlora.checkpoint.weights import Weights, find_folder, load_initial
from megatron_switchlora.config.errors import UserError, require
from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.data.loader import eval_batches
from megatron_switchlora.data.packing import PreparedData
from megatron_switchlora.distributed.consensus import await_all, gather_texts, on_all_ranks, on_one_rank
from megatron_switchlora.distributed.mesh import AXES, Mesh
from megatron_switchlora.methods import Method
from megatron_switchlora.model.protocol import LanguageModel, build_initialized
from megatron_switchlora.run.folder import RunFolder, create_folder, default_folder, in_folder, lock_folder
from megatron_switchlora.run.machine import versions
from megatron_switchlora.run.metrics_log import perplexity
from megatron_switchlora.run.terminal import Terminal
from megatron_switchlora.startup.device import gpu_identity, release_cached
from megatron_switchlora.startup.environment import Ranks
from megatron_switchlora.startup.signals import StopRequest
from megatron_switchlora.train.context import open_context
from megatron_switchlora.train.dataset import require_tokenizer
from megatron_switchlora.train.diagnose import find_bad_layer
from megatron_switchlora.train.engine import Engine, StepResult
from megatron_switchlora.train.phases import Phase, build_engine, build_phases
from megatron_switchlora.train.results import Companions, step_record, write_results, write_tokenizer
from megatron_switchlora.train.summary import describe_start


class Trainer:
    """A run.

    `given_ds_config` is the user's DeepSpeed JSON. `resume_point` comes from `resume.find_resume_point`; by default the
    run starts at step 0. `stop` receives the signals that end the run. `data` is what it reads; by default the prepared
    `config.data`.
    """

    engine: Engine
    phase: Phase

    def __init__(
        self,
        config: RunConfig,
        given_ds_config: dict[str, Any],
        ranks: Ranks,
        device: torch.device,
        resume_point: Optional[ResumePoint] = None,
        stop: Optional[StopRequest] = None,
        data: Optional[PreparedData] = None,
    ) -> None:
        self.config, self.ranks, self.device = config, ranks, device
        self.resume_point, self.stop = resume_point or ResumePoint(), stop or StopRequest()
        self.terminal = Terminal(ranks.rank == 0)
        self.print_line = self.terminal.print_line
        on_all_ranks(config.method.facts.require_packages)
        self.context = open_context(config, ranks, device, data)
        self._build_phases(given_ds_config)
        self._build_engine()
        folder = self._claim_folder()
        on_all_ranks(partial(self._open_folder, folder))
        self.saver = Saver(folder / "checkpoints", self.engine, config.checkpoint, self.print_line)
        self._log_start()

    @property
    def mesh(self) -> Mesh:
        return self.phase.mesh

    @property
    def method(self) -> Method:
        return self.engine.method

    def _build_engine(self) -> None:
        """Build the engine of the phase in which the run starts or resumes, from initial weights or the checkpoint."""
        train, checkpoint = self.config.train, self.resume_point.checkpoint
        model = self._fresh_model()
        begins = checkpoint is None or 0 < self.phase.first == checkpoint.step
        self.imported: dict[str, Any] = {}  # marks of the imported model
        regrouped = False
        if checkpoint is None and train.init_from:
            initial = open_together(find_folder(Path(train.init_from)))
            require_tokenizer(initial, self.context.data)
            weights = Weights(initial)
            self.imported = weights.imported
            on_all_ranks(partial(load_initial, model, weights))
        elif checkpoint is not None:
            self.imported = checkpoint.state().get("imported") or {}
            self._check_checkpoint(checkpoint)
            in_method = not begins and self.phase is self.phases[-1]
            regrouped = in_method and regroups(self.config, checkpoint.state())
            if begins or regrouped:  # from the end of the previous phase, or from the model for new heads
                on_all_ranks(partial(load_initial, model, Weights(checkpoint)))
        self.engine = build_engine(self.phase, model, self.context.train_samples, self.device, begins or regrouped)
        if checkpoint is not None and not begins:
            self._load_checkpoint(checkpoint, regrouped)

    def _fresh_model(self) -> LanguageModel:
        vocab_size, seed = self.context.vocab_size, self.config.train.seed
        return build_initialized(self.config.model, vocab_size, self.mesh.axis("tp"), seed, self.device)

    def _hand_over(self) -> None:
        """Start the method from the weights of the finished full-rank phase."""
        self.saver.finish()
        named = self.engine.model.named_parameters(remove_duplicate=False)  # include a tied output layer by its name
        weights = {name: param.detach().cpu() for name, param in named}
        del self.engine, self.saver.engine  # DeepSpeed's hooks keep it in reference cycles
        gc.collect()
        release_cached(self.device)
        self.phase = self.phases[-1]
        model = self._fresh_model()
        model.load_state_dict(weights)
        self.engine = build_engine(self.phase, model, self.context.train_samples, self.device)
        self.saver = Saver(self.saver.folder, self.engine, self.config.checkpoint, self.print_line)
        self.print_line(f"after {self.phase.first} steps of full-rank training {self.config.method.name} begins")

    def _check_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Require that the run can resume from the checkpoint.

        Raises:
            UserError: the data differs, or no step is left.
        """
        compare_data(self.config, checkpoint.state(), self.context.identity)
        last = self.context.last_step
        require(
            checkpoint.step < last + self.resume_point.keeps_records,  # equal if the run was killed before its export
            f"{checkpoint.folder} is of step {checkpoint.step}, so none of the {last} steps is left to train: "
            "raise train.steps, with --checkpoint.allow_changes '[\"train.steps\"]'.",
        )

    def _load_checkpoint(self, checkpoint: Checkpoint, regrouped: bool) -> None:
        """Fill the fresh engine from the checkpoint; with `regrouped` its LTE heads differ from the run's."""
        if regrouped:
            on_all_ranks(partial(load_regrouped, self.engine, checkpoint))
            self.method.regrouped()  # type: ignore[attr-defined]
        else:
            on_all_ranks(partial(load_state, self.engine, checkpoint.archive(), checkpoint.step))
        self.method.loaded()
        differences = self.engine.differing_replicas()
        require(not differences, f"After loading {checkpoint.folder} ranks differ: {'; '.join(differences[:5])}.")

    def _build_phases(self, given_ds_config: dict[str, Any]) -> None:
        self.phases = build_phases(self.context, given_ds_config)
        checkpoint, method_phase = self.resume_point.checkpoint, self.phases[-1]
        in_method = checkpoint is not None and checkpoint.step >= method_phase.first
        self.phase = method_phase if in_method else self.phases[0]
        self._validation_batches()  # raises if the validation set has no sample

    def _claim_folder(self) -> Path:
        """Choose, create and lock the folder on rank 0, or return that of the resumed run."""

        def create() -> str:
            given = self.config.output_dir
            if self.resume_point.keeps_records:
                return str(given)
            folder = create_folder(Path(given)) if given else default_folder(self.config.method.name)
            self.resume_point.lock = lock_folder(folder)
            return str(folder)

        self.config.output_dir = on_one_rank(self.ranks.rank == 0, create)
        return Path(self.config.output_dir)

    def _open_folder(self, folder: Path) -> None:
        """Open the folder with the records to keep, and write what does not change during the run.

        Raises:
            UserError: the disk is full or read-only.
        """
        with in_folder(folder):
            keep = self.resume_point.step if self.resume_point.keeps_records else None
            self.run = RunFolder(folder, self.ranks.rank == 0, keep, self._heads_written())
            self._write_settings()
            self.run.open_loggers(self.config, self.print_line)

    def _heads_written(self) -> list[int]:
        """Return the LTE heads whose records this rank writes."""
        mesh = self.phases[-1].mesh
        writes = self.config.heads > 1 and mesh.axis("head").rank == 0
        return list(mesh.heads(self.config.method.facts.heads_here)) if writes else []

    def _write_settings(self) -> None:
        config, counts, checkpoint = self.config, self.context.counts, self.resume_point.checkpoint
        if checkpoint and checkpoint.folder.parent.resolve() != (self.run.path / "checkpoints").resolve():
            self.run.update_meta(branched_from=str(checkpoint.folder))
        self.run.write_config(config, self.phases[-1].ds_config)
        self.beside: Optional[Companions] = None  # set on the rank that writes
        if self.run.writes:
            source, folder = self.context.data.tokenizer_dir, self.run.path / "tokenizer"
            self.beside = write_tokenizer(source, folder, config.data.add_bos, self.imported)
        self.run.update_meta(
            versions=versions() | gpu_identity(self.device),
            mesh={axis: self.mesh.size(axis) for axis in AXES},
            device=str(self.device.type),
            resumed_at=[*self.run.meta.get("resumed_at", []), self.resume_point.step] if checkpoint else [],
            finished=False,
            data=self.context.identity["data"],
            vocab_size=self.context.vocab_size,
            parameters={"trainable": counts.trainable, "full_rank": counts.full_total},
            train_samples=len(self.context.train_samples),
            val_samples=len(self.context.val_samples),
            unigram_val_ppl=self.context.data.unigram_val_ppl,
        )

    def _log_start(self) -> None:
        kept = "\n".join(gather_texts("\n".join(self.run.notes))).split("\n")  # each rank's own files
        cleaned = self.saver.clean() if self.run.writes else []
        facts = describe_start(self.context, self.mesh, self.resume_point)
        for line in filter(None, [*facts, *self.resume_point.notes, *kept, *cleaned]):
            self.print_line(line)

    def _validation_batches(self) -> Iterator[torch.Tensor]:
        """Return this data rank's share of the validation samples."""
        size, limit = self.config.train.micro_batch_size, self.config.train.eval_samples
        readers = self.mesh.axis("data")
        return eval_batches(self.context.val_samples, size, readers.rank, readers.size, limit)

    def _evaluate_and_log(self, step: int) -> float:
        loss, sent = self.engine.evaluate(self._validation_batches())
        require(
            math.isfinite(loss),
            f"The validation loss after step {step} is {loss}: the last update has destroyed the model, and the run "
            "stops. Lower optim.lr, raise train.warmup_steps or set optim.clip.",
        )
        on_one_rank(self.run.writes, partial(self._require_folder, step))
        between_heads = {"eval_merge_bytes": sent} if self.mesh.size("lte") > 1 else {}
        self.run.log({"step": step, "val_loss": loss, "val_ppl": perplexity(loss), **between_heads})
        self.print_line(f"step {step}: validation loss {loss:.4f}, perplexity {perplexity(loss):.2f}")
        return loss

    def _require_folder(self, step: int) -> str:
        final = f"the final model cannot be written to {self.run.path / 'final'}"
        with in_folder(self.run.path):
            self.run.require_there(final if step == self.context.last_step else "nothing can be saved")
        return ""

    def _stop_unhealthy(self, step: int, result: StepResult, batches: list[torch.Tensor]) -> None:
        """Report the first tensor that is not finite, and stop every rank.

        Raises:
            UserError: always.
        """
        where = find_bad_layer(self.engine.model, batches, self.device) or ""
        places = [(rank, text) for rank, text in enumerate(gather_texts(where)) if text]
        place = f"first bad on rank {places[0][0]}: {places[0][1]}" if places else "a second pass gave finite values"
        raise UserError(
            f"Step {step + 1} gave loss {result.loss}, gradient norm {result.grad_norm}: not finite, so the step was "
            f"not applied and the run stops; {place}. Lower optim.lr, raise train.warmup_steps or check the data. "
            f"The records up to here are in {self.run.path}."
        )

    def _check_replicas(self, step: int) -> None:
        """Stop the run if tensors that must be equal on several ranks differ.

        Raises:
            UserError: they differ, because of memory or network damage, or a bug.
        """
        differences = self.engine.differing_replicas()
        require(
            not differences,
            f"After step {step + 1} tensors that must be equal on several ranks differ: {'; '.join(differences[:5])} "
            f"({len(differences)} such differences). A device, its memory or the network has failed, or library "
            f"versions differ. The records up to here are in {self.run.path}; train.check_interval sets how often they "
            "are compared.",
        )

    def fit(self) -> Optional[float]:
        """Train, record, save and export; return the final validation loss, or None if the run was asked to stop."""
        with self.run:
            return self._fit()

    def _fit(self) -> Optional[float]:
        self.terminal.begin(self.context.last_step)
        if self.resume_point.step == 0:
            self._evaluate_and_log(0)
        earlier = next((record["seconds"] for record in reversed(self.run.history) if "seconds" in record), 0.0)
        self.stop.training = True
        started_at = time.perf_counter()
        try:
            for step in range(self.resume_point.step, self.context.last_step):
                if self._one_step(step, started_at, earlier):
                    return None
        except UserError:  # raised on every rank, so the save in progress can still be published
            self.saver.finish()
            raise
        self.terminal.end()
        ends = (record for record in self.run.history if record["step"] == self.context.last_step)
        losses = [record["val_loss"] for record in ends if "val_loss" in record]
        val_loss = losses[-1] if losses else self._evaluate_and_log(self.context.last_step)
        self._finish(val_loss)
        return val_loss

    def _one_step(self, step: int, started_at: float, earlier: float) -> bool:
        """Train, record, evaluate and save; return whether the run was asked to stop here.

        Training started at `started_at`; earlier starts of the run trained for `earlier` seconds.
        """
        if step == self.phases[-1].first and self.phase is not self.phases[-1]:
            self._hand_over()
        votes = partial(self._votes, step, started_at)
        with self.run.trace.step(step + 1):
            step_started_at = time.perf_counter()
            batches = self.phase.loader.micro_batches(step)
            result = self.engine.train_step(step - self.phase.first, batches, votes)
        if not result.healthy:
            self._stop_unhealthy(step, result, batches)
        now = time.perf_counter()
        seconds, elapsed = now - step_started_at, earlier + now - started_at
        record = step_record(self.context, self.mesh, step, result, seconds, elapsed)
        self.run.log(record)
        by_head = zip(self.run.heads.values(), result.head_losses, result.head_norms, strict=False)
        for file, loss, norm in by_head if self.phase is self.phases[-1] else ():
            file.log({"step": step + 1, "loss": loss, "grad_norm": norm, "lr": result.lr})
        self.terminal.show(record, self.context.last_step)
        if self.config.train.check_interval and (step + 1) % self.config.train.check_interval == 0:
            self._check_replicas(step)
        last = step + 1 == self.context.last_step
        if (step + 1) % self.config.train.eval_interval == 0 or last:
            self._evaluate_and_log(step + 1)
        stops = result.votes[0] > 0 and not last
        self._save(step + 1, result.votes[1], due=last or stops)
        if stops:
            self._stop(step + 1)
        return stops

    def _votes(self, step: int, started_at: float) -> tuple[bool, bool]:
        """Return whether this rank wants to stop after this step, and whether it has written its share of a save.

        Training started at `started_at`.
        """
        steps, limit = self.config.train.stop_after_steps, self.config.train.stop_after_seconds
        stops = (
            self.stop.asked is not None
            or (steps is not None and step + 1 - self.resume_point.step >= steps)
            or (limit is not None and time.perf_counter() - started_at >= limit)
        )
        return stops, self.saver.written

    def _save(self, steps: int, written: int, due: bool) -> None:
        """Publish a save that all ranks have written; start a checkpoint if one is due."""
        if written == dist.get_world_size():
            self.saver.finish()
        interval = self.config.checkpoint.interval
        if due or (interval and steps % interval == 0):
            self.run.flush()
            self.saver.save(steps, self._state_files(steps))

    def _state_files(self, steps: int) -> dict[str, bytes]:
        """Return a checkpoint's other files beside tensors, on rank 0."""
        if self.beside is None:
            return {}
        mesh = {axis: self.mesh.size(axis) for axis in AXES}
        factor = self.method.lr_factor(steps - self.phase.first)
        more = {"lr_factor": factor, "ds_config": self.phase.ds_config, "mesh": mesh}
        more |= {"versions": self.run.meta["versions"], "imported": self.imported}
        return {"state.json": state_file(self.config, steps, self.context.identity | more), **self.beside.files}

    def _stop(self, steps: int) -> None:
        """Publish the last checkpoint of a run that was asked to stop, and print how to resume."""
        self.saver.finish()
        on_all_ranks(self._close_records)
        if self.run.writes:
            reason = self.stop.asked or "another rank or train.stop_after_*"
            kept = [path.name for path in published(self.saver.folder)]
            self.print_line(
                f"stopped after step {steps} as asked ({reason}); with --output_dir {self.run.path} the same options "
                + (f"resume from {kept[-1]}" if kept else "start from step 0: no checkpoint could be written")
            )
        await_all()

    def _close_records(self) -> None:
        with in_folder(self.run.path):
            self.run.close()

    def _finish(self, val_loss: float) -> None:
        """Write the last checkpoint, the final model, the plot and the outcome."""
        self.saver.finish()
        model = self.method.evaluated(exported=True)
        exports = self.mesh.axis("data").rank == 0 or self.config.method.base_spread != "none"  # all give their rows
        write = partial(write_results, self.context, self.run, self.beside, exports, val_loss, model)
        on_all_ranks(write)
