"""Train: the parts of a run on one rank, and its loop."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist

from ndtrain.accelerators import peak_memory_bytes
from ndtrain.data import GlobalBatches
from ndtrain.data.prefetch import Prefetch
from ndtrain.engine import Batch, Engine
from ndtrain.errors import NdtrainError, Stopped
from ndtrain.hf import extra_states
from ndtrain.hf.tokenizer import ByteTokenizer, HubTokenizer
from ndtrain.hf.weight_names import model_tensors
from ndtrain.loggers import Logger, Metrics, StepMetrics, check_loggers, open_loggers
from ndtrain.plan import Plan
from ndtrain.proof import check_same_batch
from ndtrain.recipe import Recipe, to_toml
from ndtrain.runs.messages import on_rank0, rank0_first
from ndtrain.runs.phases import EVALUATE, FIND, RESUME, SAVE, TOKENIZE
from ndtrain.runs.process import Runtime
from ndtrain.runs.seeds import random_seed
from ndtrain.runs.stop_signals import Steps, StopSignals, nothing_to_save, request_name
from ndtrain.storage.paths import to_path
from ndtrain.train.data_files import fetch_data, with_format
from ndtrain.train.encoding import save_templates
from ndtrain.train.evaluation import Evaluation, nothing_to_do, open_evaluation, restore_evaluations
from ndtrain.train.inputs import data_progress, open_batches, open_tokenizer
from ndtrain.train.length import arithmetic, with_steps
from ndtrain.train.measure import Measure, count_targets
from ndtrain.train.origin import origin_of
from ndtrain.train.report import Reporter
from ndtrain.train.saving import Saving
from ndtrain.train.setup import Resumed, build, find_resumed, open_run_dir, slow_dtype
from ndtrain.train.skips import Skips, refuse_not_finite
from ndtrain.train.state import extras, save_extras, versions

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# What `origin_of` returns that a checkpoint records beside the recipe.
_IDENTITIES = ("base", "tokenizer", "packages", "template", "content", "files")


class Trainer:
    """Train one run on one rank. `prepare` builds everything and resumes; `train` is the loop."""

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
        self.requested = [0, 0]  # stop and save, as all ranks agreed after the last step
        self.watch = runtime.watch
        self.saving = Saving(recipe.checkpoint, self.run_dir, reporter, progress=self.watch.advance)
        self.watch.saved = lambda: self.saving.step
        self.step = 0
        self.steps = recipe.train.steps or 0  # known once the data is, where the recipe says epochs
        self.cursor = 0
        self._prefetch = Prefetch(lambda cursor: self.batches.load(cursor), device=runtime.device)
        self.save_due = False  # stays True while steps are skipped
        self.skips = Skips(recipe.train.max_bad_steps)
        self.evaluation: Evaluation | None = None
        self._is_best = False  # whether the step's held-out loss is the lowest, so that it is saved
        self.loggers: list[Logger] = []
        self.origin: dict[str, Any] = {}  # on rank 0
        self._asks_at = 0  # the step at whose end the ranks next ask each other
        self._same_batch = False  # whether tp and cp ranks were checked to read the same samples
        self._extras: dict[str, bytes] = {}  # on rank 0, the files beside the tensors of every checkpoint
        self._noted_left_out = False  # whether the user knows of extra states that are not saved

    # ---- before the first step

    def prepare(self) -> None:
        """Tokenize, shard, load or resume. Unusable recipes and meshes are refused before the first weight is read."""
        recipe, reporter = self.recipe, self.reporter
        on_rank0(lambda: open_run_dir(self.run_dir))
        check_loggers(recipe, self.run_dir)
        with self.watch.during(TOKENIZE):
            self.open_tokenizer()
        with self.watch.during(FIND):
            resumed = find_resumed(self.saving.store, self.run_dir, self.engine, reporter, origin=self.origin)
        with self.watch.during(TOKENIZE):
            self.open_batches()
            if resumed is not None:
                resumed.check_data(self.batches.fingerprint, self.batches.tokens)
            self._find_length(resumed)
            if recipe.eval is not None:
                self.evaluation = open_evaluation(self.engine, self.runtime, self.tokenizer, reporter, steps=self.steps)
        reporter.info(arithmetic(self.recipe, self.plan, self.runtime, self.batches, steps=self.steps))
        for note in (*self.plan.notes, *slow_dtype(recipe, self.runtime.device)):
            reporter.info(f"note: {note}")
        build(self.engine, resumed, runtime=self.runtime, reporter=reporter)
        if resumed is not None:
            with self.watch.during(RESUME):
                self._restore(resumed)
        self._measure = Measure(self.engine, ranks=self.runtime.world_size)
        if self.step < self.steps:
            self.saving.reserve(model=model_tensors(self.engine.model), optim=self.engine.optimizer_tensors())
        if self.runtime.is_main:
            written = self.run_dir / "recipe.toml"
            if self.step < self.steps or not written.exists():  # else nothing is trained with it
                written.write_text(to_toml(self.recipe), encoding="utf-8")
            self.loggers = open_loggers(self.recipe, self.run_dir)

    def open_tokenizer(self) -> None:
        """Open the tokenizer, and identify what the run is made from; collective."""
        self.tokenizer, notes = open_tokenizer(self.recipe, self.runtime, self.engine.vocabulary)
        fetch_data(self.recipe, lambda work: rank0_first(self.runtime, work))
        self.recipe = self.engine.recipe = with_format(self.recipe)

        def prepare() -> None:
            save_templates(self.recipe, self.tokenizer)
            self._extras, found = extras(self.engine.model, self.tokenizer, self.recipe)
            notes.extend(found)
            progress = data_progress(self.recipe, self.runtime, self.reporter)
            self.origin.update(origin_of(self.engine.model, self.recipe, self.tokenizer, progress))

        on_rank0(prepare)
        for note in notes:
            self.reporter.info(f"note: {note}")

    def open_batches(self) -> None:
        """Open this rank's batches, tokenizing what is not cached; collective."""
        self.batches = open_batches(
            self.recipe, self.runtime, self.sizes, self.tokenizer, self.reporter, vocabulary=self.engine.vocabulary
        )

    def _find_length(self, resumed: Resumed | None) -> None:
        """Set the number of steps, which may follow from the number of samples."""
        step, cursor = (0, 0) if resumed is None else (resumed.state["step"], resumed.state["samples"])
        recipe = with_steps(self.recipe, self.batches.order, step=step, cursor=cursor)
        self.engine.recipe, self.steps = recipe, recipe.train.steps or 0

    def _restore(self, resumed: Resumed) -> None:
        self.step, self.cursor = resumed.state["step"], resumed.state["samples"]
        # The base may be gone: no resume reads its weights.
        self.origin["base"] = self.origin.get("base") or resumed.state.get("origin", {}).get("base")
        self.saving.step = self.step
        self.skips.restore(resumed.state, resumed.directory)
        if self.evaluation is not None:
            for note in restore_evaluations(resumed, self.evaluation, self.saving):
                self.reporter.info(f"note: {note}")
        self.engine.restore_optimizer(
            resumed.directory / "optim", updates=self.step - self.skips.total, progress=self.watch.advance
        )
        self.reporter.info(f"resumed from {resumed.directory} (step {self.step}, sample {self.cursor})")

    # ---- the loop

    def train(self) -> None:
        """Train to the last step or as `eval.patience` says, saving every `checkpoint.every` steps and at the end."""
        if self._ends():
            if self.runtime.is_main and self.saving.step is not None:
                self.saving.store.prune(self.saving.step)  # the last run may have ended before it did
            self.reporter.info(nothing_to_do(self.step, self.steps, self.recipe, self.evaluation))
            return
        gc.collect()
        gc.freeze()
        first = last = None
        try:
            self._listen()
            self._evaluate_where_due()
            self._refuse_stopped()
            started = time.perf_counter()
            while not self._ends():
                last = self.train_step()
                first = first or last
            self._close_loggers()
        except NdtrainError:
            with suppress(NdtrainError):
                self._close_loggers()
            # The save in flight is of an earlier, good step: let it finish.
            with suppress(NdtrainError):
                self.saving.store.settle()
            raise
        if first is not None and last is not None:
            self.reporter.info(
                f"steps {first.step} to {last.step}: loss {first.loss:.4f} -> {last.loss:.4f} "
                f"in {time.perf_counter() - started:.0f} s"
            )

    def _ends(self) -> bool:
        """Return whether no step is left, or `eval.patience` allows none; the same on every rank."""
        return self.step >= self.steps or (self.evaluation is not None and self.evaluation.ends_run)

    def train_step(self) -> StepMetrics:
        """Make one optimizer step, log it, evaluate if that is due, and save if a checkpoint is due or requested.

        Raises `Stopped` after saving if any rank was asked to stop.
        """
        self.saving.settle(wait=False)
        metrics = self.optimize()
        self._log(metrics)
        self._evaluate_where_due()
        self._save_where_due()
        return metrics

    def optimize(self) -> StepMetrics:
        """Make one optimizer step: data, forward and backward, clip, update. Collective."""
        engine, measure = self.engine, self._measure
        started = time.perf_counter()
        self.watch.beat(self.step + 1)
        self._asks_at = self.step + 1
        batches = self._load()
        targets = count_targets(batches, engine, self.batches.sources_of(self.cursor))
        self._seed()
        sums = engine.gradients(batches, count=targets.tokens, rows=targets.rows, done=self.watch.beat)
        norm = engine.clip()
        losses = measure.reduce(sums, norm, targets)
        # These sums are equal on all ranks, so all decide alike.
        self.skips.count(skipped=not losses.finite)
        lr = engine.update(self.step, skip=bool(self.skips.in_row))
        peak, *self.requested = self._agree(peak_memory_bytes(engine.device), then=self.step + 2)
        self.step += 1
        self.cursor += self.recipe.train.global_batch_size
        seconds = time.perf_counter() - started
        epoch = self.batches.order.epoch(self.cursor)
        return measure.metrics(
            losses, targets, step=self.step, epoch=epoch, lr=lr, seconds=seconds, peak=peak, skipped=self.skips.total
        )

    def _load(self) -> list[Batch]:
        after = self.cursor + self.recipe.train.global_batch_size
        loaded = self._prefetch.take(self.cursor, then=after if self.step + 1 < self.steps else None)
        batches = [
            {key: value.to(self.engine.device, non_blocking=True) for key, value in batch.items()} for batch in loaded
        ]
        if not self._same_batch:
            check_same_batch(batches[0], self.engine.meshes)
            self._same_batch = True
        return batches

    def _seed(self) -> None:
        """Seed by step, batch and cp coordinate: a resumed run draws the same dropout on any mesh with these axes."""
        coordinate = self.sizes.coordinate(self.runtime.rank)
        torch.manual_seed(random_seed(self.recipe.train.seed, self.step, coordinate["batch"], coordinate["cp"]))

    # ---- after a step

    def _log(self, metrics: StepMetrics) -> None:
        self._write(metrics)
        steps, every = self.steps, self.recipe.log.every
        self.reporter.step(metrics, steps=steps, show=self.step == steps or self.step % every == 0)
        if self.skips.in_row:
            self.reporter.info(
                f"step {self.step} skipped: loss {metrics.loss}, gradient norm {metrics.grad_norm}; no weight changed "
                f"({self.skips.in_row} in a row, {self.skips.limit} in a row end the run; {self.skips.total} in total)"
            )
        if self.skips.in_row >= self.skips.limit:
            self.saving.settle(wait=True)
        self.skips.check_limit(self.step, metrics.loss, metrics.grad_norm, way_on=self.watch.way_on())

    def _write(self, metrics: Metrics) -> None:
        with self._logging():
            for logger in self.loggers:
                logger.write(metrics)

    def _close_loggers(self) -> None:
        with self._logging():
            for logger in self.loggers:
                logger.close()

    @contextmanager
    def _logging(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise NdtrainError(f"step {self.step} was trained but not logged: {error}") from error

    def _evaluate_where_due(self) -> None:
        """Evaluate if it is due and no stop is requested: before the save, so that a checkpoint knows its own loss."""
        evaluation, self._is_best = self.evaluation, False
        if evaluation is None or not evaluation.due(self.step):
            return
        metrics = None
        if not self.requested[0]:
            self._asks_at = self.step
            with self.watch.during(EVALUATE):
                metrics = evaluation.measure(self.step, goes_on=self._goes_on)
        if metrics is None:
            way = "--eval-only does it" if self._ends() else "the next start begins with it"
            self.reporter.info(f"step {self.step} is not evaluated, since a stop was requested; {way}")
            return
        self._write(metrics)
        evaluation.count(metrics)
        for line in evaluation.lines(metrics):
            self.reporter.info(line)
        if self.step:
            with self.watch.during(SAVE):
                self._is_best = self.saving.offer(self.step, metrics.eval_loss)

    def _goes_on(self, done: int, rows: int) -> bool:
        """Report the progress of an evaluation; return False if it is to be cut short. Collective."""
        self.watch.beat()
        if done < rows:
            self.reporter.progress("evaluating", done, rows, unit="rows")
        asked = self._agree(0, then=self.step + (done == rows))[1:]
        self.requested = [max(pair) for pair in zip(asked, self.requested, strict=True)]
        return done == rows or not self.requested[0]

    def _save_where_due(self) -> None:
        """Save if a checkpoint is due, requested or the best; raise `Stopped` afterwards if a stop was requested."""
        steps, every = self.steps, self.recipe.checkpoint.every
        last = self._ends()
        self.save_due = self.save_due or bool(every and self.step % every == 0)
        # While steps are skipped the weights may be at fault, so a due save waits for the next good step.
        if last or any(self.requested) or self._is_best or (self.save_due and not self.skips.in_row):
            with self.watch.during(SAVE):
                self.saving.settle(wait=True)
                refuse_not_finite(model_tensors(self.engine.model), step=self.step, way_on=self.watch.way_on())
                self.save()
                self.saving.settle(wait=last or any(self.requested))
            self.save_due = False
        if any(self.requested):
            self._remove_request_files()
        stop = request_name(self.requested[0]) if self.requested[0] and not last else None
        if (last or stop) and self.saving.step != self.step:
            which = f"stopped by {stop}" if stop else "the last"
            raise NdtrainError(
                f"step {self.step} ({which}) was trained but not saved; the warning above gives the reason"
            )
        if stop:
            raise Stopped(
                f"stopped by {stop} after step {self.step} of {steps}, which is saved; start again to continue"
            )

    def save(self) -> None:
        """Save the current step, or start to in the background, unless its checkpoint exists. Collective."""
        self.saving.settle(wait=True)
        if self.saving.step == self.step:
            return
        engine = self.engine
        states, left_out = extra_states.shared_states(engine.model)
        if left_out and not self._noted_left_out:
            self._noted_left_out = True
            self.reporter.info(f"note: {extra_states.left_out_note(left_out, 'not saved; after a resume')}")
        self.saving.begin(
            self.step,
            model=model_tensors(engine.model),
            optim=engine.optimizer_tensors(),
            state={
                "step": self.step,
                "samples": self.cursor,
                "data": self.batches.fingerprint,
                "tokens": self.batches.tokens,
                "seed": self.recipe.train.seed,
                **self.skips.state(),
                **({"eval": {**self.evaluation.state(), "best": self.saving.candidate}} if self.evaluation else {}),
                "mesh": asdict(self.sizes),
                "versions": versions(),
                "recipe": self.origin.get("recipe"),
                "origin": {key: self.origin.get(key) for key in _IDENTITIES},
            },
            extra_files=lambda directory: save_extras(directory, self._extras, states),
        )

    # ---- stop signals

    def _listen(self) -> None:
        """Let later requests wait for the end of a step. Raises `Stopped` if any rank was asked to stop before."""
        self.stop_signals.begin(lambda: Steps(self.step, min(self._asks_at, self.steps), self.saving.step))
        self.requested = self._agree(0, then=self.step + 1)[1:]
        self._refuse_stopped()

    def _refuse_stopped(self) -> None:
        if self.requested[0]:
            self._remove_request_files()
            raise nothing_to_save(self.requested[0])

    def _agree(self, number: int, *, then: int) -> list[int]:
        """Return [the largest `number`, stop, save] over all ranks, which next ask after step `then`; collective."""
        own = [number, *self.stop_signals.seen(files=self.runtime.is_main)]
        self._asks_at = then
        shared = torch.tensor(own, dtype=torch.int64, device=self.engine.device)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        return cast("list[int]", shared.tolist())

    def _remove_request_files(self) -> None:
        if self.runtime.is_main:
            for path in self.stop_signals.remove_files():
                self.reporter.info(f"note: {path} cannot be removed and is ignored from now on")
