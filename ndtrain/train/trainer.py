"""One run on one rank: what it is made of, and its loop."""

from __future__ import annotations

import gc
import time
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist

from ndtrain.accelerators import peak_memory_bytes
from ndtrain.data import GlobalBatches
from ndtrain.engine import Batch, Engine
from ndtrain.errors import NdtrainError, Stopped
from ndtrain.hf import extra_states
from ndtrain.hf.tokenizer import ByteTokenizer, HubTokenizer
from ndtrain.load import model_tensors
from ndtrain.loggers import Logger, StepMetrics, check_loggers, open_loggers
from ndtrain.plan import Plan
from ndtrain.proof import check_same_batch
from ndtrain.recipe import Recipe, to_toml
from ndtrain.runs.messages import on_rank0
from ndtrain.runs.process import Runtime
from ndtrain.runs.seeds import random_seed
from ndtrain.runs.stop_signals import StopSignals, nothing_to_save, words
from ndtrain.runs.watch import Watch
from ndtrain.storage.paths import to_path
from ndtrain.train.inputs import open_batches, open_tokenizer
from ndtrain.train.measure import Measure, count_targets
from ndtrain.train.report import Reporter
from ndtrain.train.saving import Saving
from ndtrain.train.setup import Resumed, build, find_resumed, open_run_dir, try_extras
from ndtrain.train.skips import Skips, refuse_not_finite
from ndtrain.train.state import save_extras, versions

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Trainer:
    """One run on one rank. `prepare` builds everything and resumes; `train` is the loop."""

    tokenizer: ByteTokenizer | HubTokenizer
    batches: GlobalBatches
    _measure: Measure

    def __init__(
        self,
        recipe: Recipe,
        plan: Plan,
        model: PreTrainedModel,
        *,
        runtime: Runtime,
        reporter: Reporter,
        stop_signals: StopSignals | None = None,
    ):
        self.recipe, self.plan, self.sizes = recipe, plan, plan.sizes
        self.engine = Engine(recipe, plan, model, device=runtime.device)
        self.runtime, self.reporter = runtime, reporter
        self.run_dir = to_path(recipe.run.dir)
        self.stop_signals = stop_signals or StopSignals(self.run_dir)
        self.asked = [0, 0]  # stop and save, as all ranks know it since the last step
        self.saving = Saving(recipe.checkpoint, self.run_dir, reporter)
        self.step = 0
        self.cursor = 0
        self.due = False  # a checkpoint, once the steps are finite again
        self.skips = Skips(recipe.train.max_bad_steps)
        self.watch = Watch(recipe.run.step_timeout_s)
        self.loggers: list[Logger] = []
        self._same_batch = False  # whether tp and cp ranks are known to read the same
        self._told_left_out = False  # of extra states that are not saved

    # ---- before the first step

    def prepare(self) -> None:
        """Tokenize, shard, load or resume. Every refusal comes before the first weight is read."""
        recipe, reporter = self.recipe, self.reporter
        on_rank0(lambda: open_run_dir(self.run_dir))
        check_loggers(recipe, self.run_dir)
        self.open_inputs()
        resumed = find_resumed(self.saving.store, self.run_dir, self.engine, reporter, data=self.batches.fingerprint)
        reporter.info(self._arithmetic())
        for note in self.plan.notes:
            reporter.info(f"note: {note}")
        build(self.engine, resumed, runtime=self.runtime, reporter=reporter)
        if resumed is not None:
            self._go_on_from(resumed)
        self._measure = Measure(self.engine, ranks=self.runtime.world_size)
        if self.runtime.is_main:
            (self.run_dir / "recipe.toml").write_text(to_toml(recipe), encoding="utf-8")
            self.loggers = open_loggers(recipe, self.run_dir)

    def open_inputs(self) -> None:
        """Open the tokenizer and this rank's batches; collective."""
        self.tokenizer = open_tokenizer(self.recipe, self.engine.vocabulary)
        on_rank0(lambda: try_extras(self.engine.model, self.tokenizer))
        self.batches = open_batches(self.recipe, self.runtime, self.sizes, self.tokenizer, self.reporter)

    def _go_on_from(self, resumed: Resumed) -> None:
        self.step, self.cursor = resumed.state["step"], resumed.state["samples"]
        self.saving.step = self.step
        self.skips.restore(resumed.state, resumed.directory)
        self.engine.restore_optimizer(resumed.directory / "optim", updates=self.step - self.skips.total)
        self.reporter.info(f"resumed from {resumed.directory} (step {self.step}, sample {self.cursor})")

    def _arithmetic(self) -> str:
        train, micro = self.recipe.train, self.batches.micro_steps
        return (
            f"{self.plan.model_type}, {self.plan.numel:,} parameters on {self.sizes.describe()} "
            f"({self.runtime.world_size} x {self.runtime.device.type}); global batch {train.global_batch_size} x "
            f"{self.recipe.data.seq_len} = {train.global_batch_size * self.recipe.data.seq_len:,} tokens = "
            f"{self.sizes.batch} batch ranks x {micro} micro batches; {len(self.batches.samples):,} samples"
        )

    # ---- the loop

    def train(self) -> None:
        """Train to `train.steps`, saving every `checkpoint.every` steps and at the end."""
        steps = self.recipe.train.steps
        if self.step >= steps:
            if self.runtime.is_main and self.saving.step is not None:
                self.saving.store.prune(self.saving.step)  # which the end of the last save may have missed
            self.reporter.info(f"nothing to do: step {self.step} of {steps} is already trained")
            return
        gc.collect()
        gc.freeze()
        try:
            self._listen()
            started, first = time.perf_counter(), self.train_step()
            last = first
            while self.step < steps:
                last = self.train_step()
            self._close_loggers()
        except NdtrainError:
            with suppress(NdtrainError):
                self._close_loggers()
            # The save in flight is of an earlier, good step: let it finish.
            with suppress(NdtrainError):
                self.saving.store.settle()
            raise
        self.reporter.info(
            f"steps {first.step} to {last.step}: loss {first.loss:.4f} -> {last.loss:.4f} "
            f"in {time.perf_counter() - started:.0f} s"
        )

    def train_step(self) -> StepMetrics:
        """One optimizer step, logged, and its checkpoint where one is due or asked for.

        Raises `Stopped` after saving where any rank was asked to stop.
        """
        self.saving.settle(wait=False)
        metrics = self.optimize()
        self._log(metrics)
        self._save_where_due()
        return metrics

    def optimize(self) -> StepMetrics:
        """One optimizer step: data, forward and backward, clip, update. Collective."""
        engine, measure = self.engine, self._measure
        started = time.perf_counter()
        self.watch.beat(self.step + 1)
        batches = self._load()
        targets = count_targets(batches, engine)
        self._seed()
        sums = engine.gradients(batches, count=targets.tokens, rows=targets.rows, done=self._beat)
        norm = engine.clip()
        losses = measure.reduce(sums, norm, targets)
        # From sums that are the same on every rank, and so is the decision.
        self.skips.count(skipped=not losses.finite)
        lr = engine.update(self.step, skip=bool(self.skips.in_row))
        peak, *self.asked = self._agree(peak_memory_bytes(engine.device))
        self.step += 1
        self.cursor += self.recipe.train.global_batch_size
        seconds = time.perf_counter() - started
        return measure.metrics(
            losses, targets, step=self.step, lr=lr, seconds=seconds, peak=peak, skipped=self.skips.total
        )

    def _load(self) -> list[Batch]:
        batches = [
            {key: value.to(self.engine.device, non_blocking=True) for key, value in batch.items()}
            for batch in self.batches.load(self.cursor)
        ]
        if not self._same_batch:
            check_same_batch(batches[0], self.engine.meshes)
            self._same_batch = True
        return batches

    def _seed(self) -> None:
        """Keyed by step and coordinate: a resumed run draws the same dropout on any mesh with these batch and cp."""
        coordinate = self.sizes.coordinate(self.runtime.rank)
        torch.manual_seed(random_seed(self.recipe.train.seed, self.step, coordinate["batch"], coordinate["cp"]))

    def _beat(self) -> None:
        self.watch.beat(self.step + 1)

    # ---- what a step is followed by

    def _log(self, metrics: StepMetrics) -> None:
        try:
            for logger in self.loggers:
                logger.write(metrics)
        except OSError as error:
            raise self._not_logged(error) from error
        steps, every = self.recipe.train.steps, self.recipe.log.every
        self.reporter.step(metrics, steps=steps, show=self.step == steps or self.step % every == 0)
        if self.skips.in_row:
            self.reporter.info(
                f"step {self.step}: loss {metrics.loss}, gradient norm {metrics.grad_norm}: skipped, no weight changed "
                f"({self.skips.in_row} in a row, {self.skips.limit} end the run; {self.skips.total} in all)"
            )
        self.skips.refuse_more(self.step, metrics.loss, metrics.grad_norm)

    def _close_loggers(self) -> None:
        try:
            for logger in self.loggers:
                logger.close()
        except OSError as error:
            raise self._not_logged(error) from error

    def _not_logged(self, error: OSError) -> NdtrainError:
        return NdtrainError(f"step {self.step} was trained but not logged: {error}")

    def _save_where_due(self) -> None:
        """Save where a checkpoint is due or asked for; raises `Stopped` afterwards where a stop was asked for."""
        steps, every = self.recipe.train.steps, self.recipe.checkpoint.every
        last = self.step == steps
        self.due = self.due or bool(every and self.step % every == 0)
        # While steps are skipped the weights may be at fault: what is due waits for the next good step.
        if last or any(self.asked) or (self.due and not self.skips.in_row):
            with self.watch.saving():
                refuse_not_finite(model_tensors(self.engine.model), step=self.step)
                self.save()
                self.saving.settle(wait=last or any(self.asked))
            self.due = False
        if any(self.asked):
            self._answer()
        stop = words(self.asked[0]) if self.asked[0] and not last else None
        if (last or stop) and self.saving.step != self.step:
            why = f"stopped by {stop}" if stop else "the last"
            raise NdtrainError(f"step {self.step}, {why}, was trained but not saved; the warning above says why")
        if stop:
            raise Stopped(f"stopped by {stop} after step {self.step} of {steps}, which is saved; start again to go on")

    def save(self) -> None:
        """Write and publish the checkpoint of the current step, or begin to, unless it is there."""
        self.saving.settle(wait=True)
        if self.saving.step == self.step:
            return
        engine = self.engine
        states, left_out = extra_states.shared_states(engine.model)
        if left_out and not self._told_left_out:
            self._told_left_out = True
            self.reporter.info(f"note: {extra_states.left_out_note(left_out, 'not saved; after a resume')}")
        self.saving.begin(
            self.step,
            model=model_tensors(engine.model),
            optim=engine.optimizer_tensors(),
            state={
                "step": self.step,
                "samples": self.cursor,
                "data": self.batches.fingerprint,
                "seed": self.recipe.train.seed,
                **self.skips.state(),
                "mesh": asdict(self.sizes),
                "schedule": self.recipe.schedule.model_dump(),
                "versions": versions(),
            },
            extra_files=lambda directory: save_extras(directory, engine.model, self.tokenizer, states),
        )

    # ---- stop signals

    def _listen(self) -> None:
        """From here on what is asked waits for the end of a step; what was asked before ends the run."""
        self.stop_signals.training = True
        self.asked = self._agree(0)[1:]
        if self.asked[0]:
            self._answer()
            raise nothing_to_save(self.asked[0])

    def _agree(self, number: int) -> list[int]:
        """[the largest `number` of all ranks, stop, save]: what any rank was asked, on every rank."""
        own = [number, *self.stop_signals.seen(files=self.runtime.is_main)]
        shared = torch.tensor(own, dtype=torch.int64, device=self.engine.device)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        return cast("list[int]", shared.tolist())

    def _answer(self) -> None:
        if self.runtime.is_main:
            for path in self.stop_signals.answered():
                self.reporter.info(f"note: {path} cannot be removed; it is not looked at again")
