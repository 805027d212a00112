"""Train: the parts of a run on one rank, and its loop."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch

from ndtrain.data import GlobalBatches
from ndtrain.data.prefetch import Prefetch
from ndtrain.engine import Engine
from ndtrain.engine.transfers import Moment, Readback
from ndtrain.errors import NdtrainError, Stopped
from ndtrain.hf import extra_states
from ndtrain.hf.tokenizer import ByteTokenizer, HubTokenizer
from ndtrain.hf.weight_names import model_tensors
from ndtrain.loggers import Logger, Metrics, StepMetrics, check_loggers, now, open_loggers
from ndtrain.plan import Plan
from ndtrain.proof import check_same_batch
from ndtrain.recipe import Recipe, to_toml
from ndtrain.runs.garbage import collecting
from ndtrain.runs.messages import on_rank0, rank0_first
from ndtrain.runs.phases import EVALUATE, FIND, RESUME, SAVE, TOKENIZE
from ndtrain.runs.process import Runtime
from ndtrain.runs.seeds import random_seed
from ndtrain.runs.stop_signals import Steps, StopSignals, request_name
from ndtrain.storage.paths import to_path
from ndtrain.train.data_files import fetch_data, with_format
from ndtrain.train.encoding import save_templates
from ndtrain.train.evaluation import Evaluation, nothing_to_do, open_evaluation, restore_evaluations
from ndtrain.train.inputs import data_progress, open_tokenizer
from ndtrain.train.length import arithmetic, with_steps
from ndtrain.train.measure import Made, Measure, count_targets
from ndtrain.train.origin import origin_of
from ndtrain.train.report import Reporter
from ndtrain.train.requests import Requests
from ndtrain.train.saving import Saving
from ndtrain.train.setup import Resumed, build, find_resumed, open_run_dir, slow_dtype
from ndtrain.train.skips import Skips, refuse_not_finite
from ndtrain.train.state import extras, save_extras, state_of_run
from ndtrain.train.windows import close_data, data_state, open_data, reach

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
        self.requests = Requests(self.stop_signals, device=runtime.device, is_main=runtime.is_main)
        self.watch = runtime.watch
        self.saving = Saving(recipe.checkpoint, self.run_dir, reporter, progress=self.watch.advance)
        self.watch.saved = lambda: self.saving.step
        self.step = 0
        self.steps = recipe.train.steps or 0  # known once the data is, where the recipe says epochs
        self.cursor = 0
        self._prefetch = Prefetch(lambda cursor: self.batches.load(cursor), device=runtime.device)
        self.first: StepMetrics | None = None  # of this process's steps that are logged
        self.last: StepMetrics | None = None
        self._made: deque[Made] = deque()  # steps of which the host has not read the numbers
        self.save_due = False  # stays True while steps are skipped
        self.skips = Skips(recipe.train.max_bad_steps)
        self.evaluation: Evaluation | None = None
        self._is_best = False  # whether the step's held-out loss is the lowest, so that it is saved
        self.loggers: list[Logger] = []
        self.origin: dict[str, Any] = {}  # on rank 0
        self._stops_after = 0  # the step after which a request that comes now stops the run
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
            self.open_batches(resumed)
            if resumed is not None:
                resumed.check_data(data_state(self.batches, resumed.state["samples"]))
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

    def open_batches(self, resumed: Resumed | None = None) -> None:
        """Open this rank's batches, tokenizing what is not cached; collective."""
        state, vocabulary = resumed.state if resumed is not None else None, self.engine.vocabulary
        self.batches = open_data(
            self.recipe, self.runtime, self.sizes, self.tokenizer, self.reporter, vocabulary=vocabulary, state=state
        )
        self.batches.marks_targets = self.sizes.cp == 1  # cp ranks have parts of the rows
        self.batches.marks_documents = self.engine.marks_documents

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
        try:
            self._listen()
            self._evaluate_where_due()
            self.requests.refuse_stop(self.reporter)
            started = time.perf_counter()
            with collecting() as collect:
                while not self._ends():
                    self.advance()
                    collect(self.step)
            self._close_loggers()
            close_data(self.batches)
        except NdtrainError:
            with suppress(NdtrainError):
                self._close_loggers()
            # The save in flight is of an earlier, good step: let it finish.
            with suppress(NdtrainError):
                self.saving.store.settle()
            raise
        if self.first is not None and self.last is not None:
            self.reporter.info(
                f"steps {self.first.step} to {self.last.step}: loss {self.first.loss:.4f} -> {self.last.loss:.4f} "
                f"in {time.perf_counter() - started:.0f} s"
            )

    def _ends(self) -> bool:
        """Return whether no step is left, or `eval.patience` allows none; the same on every rank."""
        return self.step >= self.steps or (self.evaluation is not None and self.evaluation.ends_run)

    def train_step(self) -> StepMetrics:
        """Make one step as `advance` does, and return its metrics."""
        self.advance(wait=True)
        assert self.last is not None
        return self.last

    def advance(self, *, wait: bool = False) -> None:
        """Make one optimizer step, log the one before it, and evaluate and save where that is due or requested.

        The host reads a step's numbers once it has enqueued the next step, so that the device never waits for it, or
        at once where an evaluation, a save or the end depends on them. So a request takes effect one step late, and a
        run that `max_bad_steps` ends has made one step more, of which nothing is kept. Raises `Stopped` after saving.
        """
        try:
            self._made.append(self.optimize())
        except NdtrainError:  # of the data: the step before is made
            with suppress(NdtrainError):
                self._finish_all()
            raise
        while len(self._made) > 1:
            self._finish()
        if wait or self.requests or self._reads_at_once(self.step):
            self._finish_all()
            self._evaluate_where_due()
            self._save_where_due()

    def _reads_at_once(self, step: int) -> bool:
        """Return whether an evaluation, a save or the end is due after `step`; the same on every rank."""
        every, evaluation = self.recipe.checkpoint.every, self.evaluation
        due = step >= self.steps or self.save_due or bool(every and step % every == 0)
        return due or (evaluation is not None and evaluation.due(step))

    def optimize(self) -> Made:
        """Enqueue one optimizer step: data, forward and backward, clip, update. Collective."""
        engine, measure = self.engine, self._measure
        begun = Moment(engine.device)
        self.watch.beat(self.step + 1)
        self._set_stops_after(self.step + 1)
        after = self.cursor + self.recipe.train.global_batch_size
        goes_on = self.step + 1 < self.steps
        size = self.recipe.train.global_batch_size
        reach(self.batches, self.watch, since=self.cursor, until=after + size if goes_on else after)
        loaded = self._prefetch.take(self.cursor, then=after if goes_on else None)
        counts = count_targets(loaded, engine, self.batches.sources_of(self.cursor))
        batches = [engine.on_device(batch) for batch in loaded]
        if not self._same_batch:
            check_same_batch(batches[0], engine.meshes)
            self._same_batch = True
        self._seed()
        sums = engine.gradients(batches, counts=counts[:2], done=self.watch.beat)
        numbers, skip = measure.reduce(sums, engine.clip(), counts)
        lr = engine.update(self.step, skip=skip)
        numbers = torch.cat([numbers, self.requests.ask(is_saving=not self.saving.store.written).to(numbers)])
        self.step += 1
        self._set_stops_after(self.step + 1)
        self.cursor = after
        epoch = self.batches.order.epoch(after)
        return Made(self.step, epoch, lr, now(), begun, Readback(numbers))

    def _seed(self) -> None:
        """Seed by step, batch and cp coordinate: a resumed run draws the same dropout on any mesh with these axes."""
        coordinate = self.sizes.coordinate(self.runtime.rank)
        torch.manual_seed(random_seed(self.recipe.train.seed, self.step, coordinate["batch"], coordinate["cp"]))

    # ---- after a step

    def _finish_all(self) -> None:
        while self._made:
            self._finish()

    def _finish(self) -> None:
        """Read the numbers of the oldest step that is not logged, and log it; the same on every rank."""
        made = self._made.popleft()
        found = self._measure.read(made)
        self.skips.count(finite=found.finite, targets=found.tokens)
        self.requests.take(found.answers)
        # No save begins before the numbers of all steps are read, so this is about the one in flight.
        if not found.answers.is_saving:
            self.saving.settle()
        self.last = metrics = self._measure.metrics(made, found, skipped=self.skips.total)
        self.first = self.first or metrics
        self._write(metrics)
        step, steps = metrics.step, self.steps
        self.reporter.step(metrics, steps=steps, show=step == steps or step % self.recipe.log.every == 0)
        if line := self.skips.line(metrics):
            self.reporter.info(line)
        if self.skips.in_row >= self.skips.limit:
            self.saving.settle()
        self.skips.check_limit(step, metrics.loss, metrics.grad_norm, way_on=self.watch.way_on())

    def _write(self, metrics: Metrics) -> None:
        with self._logging(metrics.step):
            for logger in self.loggers:
                logger.write(metrics)

    def _close_loggers(self) -> None:
        with self._logging(self.step):
            for logger in self.loggers:
                logger.close()

    @contextmanager
    def _logging(self, step: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise NdtrainError(f"step {step} was trained but not logged: {error}") from error

    def _evaluate_where_due(self) -> None:
        """Evaluate if it is due and no stop is requested: before the save, so that a checkpoint knows its own loss."""
        evaluation, self._is_best = self.evaluation, False
        if evaluation is None or not evaluation.due(self.step):
            return
        metrics = None
        if not self.requests.stop:
            self._stops_after = self.step
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
        self.requests.agree()
        if done == rows:
            self._set_stops_after(self.step + 1)
        return done == rows or not self.requests.stop

    def _save_where_due(self) -> None:
        """Save if a checkpoint is due, requested or the best; raise `Stopped` afterwards if a stop was requested."""
        steps, every = self.steps, self.recipe.checkpoint.every
        last = self._ends()
        self.save_due = self.save_due or bool(every and self.step % every == 0)
        # While steps are skipped the weights may be at fault, so a due save waits for the next good step.
        if last or self.requests or self._is_best or (self.save_due and not self.skips.in_row):
            with self.watch.during(SAVE):
                self.saving.settle()
                refuse_not_finite(model_tensors(self.engine.model), step=self.step, way_on=self.watch.way_on())
                self.save()
                if last or self.requests:
                    self.saving.settle()
            self.save_due = False
        stop = request_name(self.requests.stop) if self.requests.stop and not last else None
        self.requests.meet(self.reporter)
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
        self._finish_all()
        self.saving.settle()
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
                **data_state(self.batches, self.cursor),
                "seed": self.recipe.train.seed,
                **self.skips.state(),
                **({"eval": {**self.evaluation.state(), "best": self.saving.candidate}} if self.evaluation else {}),
                **state_of_run(self.sizes, self.origin),
            },
            extra_files=lambda directory: save_extras(directory, self._extras, states),
        )

    # ---- stop signals

    def _listen(self) -> None:
        """Let later requests wait for the end of a step. Raises `Stopped` if any rank was asked to stop before."""
        self.stop_signals.begin(lambda: Steps(self.step, self._stops_after, self.saving.step))
        self.requests.agree()
        self._set_stops_after(self.step + 1)
        self.requests.refuse_stop(self.reporter)

    def _set_stops_after(self, step: int) -> None:
        """Note that the ranks next ask each other in `step`, and know the answer after it or after the next one."""
        self._stops_after = min(step if self._reads_at_once(step) else step + 1, self.steps)
