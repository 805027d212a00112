"""Measure a model's loss on held-out rows, and count how long it has not become lower."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist

from ndtrain.checkpoint import CheckpointStore
from ndtrain.data import GlobalBatches, labels_count
from ndtrain.engine import Engine
from ndtrain.errors import DamagedError, RecipeError
from ndtrain.hf.tokenizer import ByteTokenizer, HubTokenizer
from ndtrain.loggers import EvalMetrics, check_loggers, now, open_loggers
from ndtrain.recipe import Recipe
from ndtrain.runs.messages import on_rank0
from ndtrain.runs.phases import EVALUATE, FIND, TOKENIZE
from ndtrain.runs.process import Runtime
from ndtrain.storage.paths import to_path
from ndtrain.train.inputs import open_held_out, open_tokenizer
from ndtrain.train.report import Reporter
from ndtrain.train.saving import Best, Saving
from ndtrain.train.setup import Resumed, build, find_evaluated, open_run_dir


class Evaluation:
    """The evaluations of a run of `steps` steps (0: not known) on the rows of [eval].

    `batches` holds all rows of each source as one global batch, by the source's label. `step` is that of the last
    one, -1 before the first. `lowest` is the lowest loss of those after the first step, and `worse` how many in a row
    since then were not lower.
    """

    def __init__(self, engine: Engine, batches: Mapping[str, GlobalBatches], *, steps: int):
        section = engine.recipe.eval
        assert section is not None
        self.section, self.engine, self.batches, self.steps = section, engine, batches, steps
        for own in batches.values():
            own.marks_documents = engine.marks_documents
        self.rows = sum(own.global_batch_size for own in batches.values())
        self.step, self.lowest, self.worse = -1, math.inf, 0

    def due(self, step: int) -> bool:
        """Return whether the model is to be evaluated after `step` (0: before the first) and has not been."""
        if step == self.step:
            return False
        if step == 0:
            return self.section.at_start
        return step == self.steps or bool(self.section.every and step % self.section.every == 0)

    @property
    def ends_run(self) -> bool:
        """Whether `eval.patience` evaluations in a row did not give a new lowest loss."""
        return self.section.patience is not None and self.worse >= self.section.patience

    def measure(self, step: int, *, goes_on: Callable[[int, int], bool]) -> EvalMetrics | None:
        """Return the mean loss of all targets of all rows, and that of each source. Collective.

        `goes_on(rows done, rows)` is called after each micro batch; None is returned if it returns False, as it must on
        all ranks alike. Raises `RecipeError` if no token of the rows is a target.
        """
        engine, before = self.engine, 0
        # Sums of many losses; a float64 also counts targets exactly, up to 2^53.
        sums = torch.zeros(len(self.batches), 2, dtype=torch.float64, device=engine.device)
        with engine.evaluating():
            for own, batches in zip(sums, self.batches.values(), strict=True):
                rows, per_round = batches.global_batch_size, batches.batch_ranks * batches.micro_batch_size
                for number, batch in enumerate(batches.each(0), start=1):
                    own[0] += engine.loss_sum(engine.on_device(batch))
                    own[1] += labels_count([batch])
                    if not goes_on(before + min(number * per_round, rows), self.rows):
                        return None
                before += rows
        # tp ranks have the same loss; cp ranks have parts of it, and all targets of their rows.
        dist.all_reduce(sums, group=engine.meshes.loss.get_group())
        losses, counts = sums[:, 0].tolist(), [int(count) // engine.sizes.cp for count in sums[:, 1].tolist()]
        for label, count, batches in zip(self.batches, counts, self.batches.values(), strict=True):
            if not count:
                what = f'eval.path = "{self.section.path}"' if self.section.path else f'eval.sources: "{label}"'
                raise RecipeError(f"{what}: none of its {batches.global_batch_size:,} rows has a target")
        loss = sum(losses) / sum(counts)
        means = (own / count for own, count in zip(losses, counts, strict=True))
        sources = dict(zip(self.batches, means, strict=True)) if self.section.sources else None
        return EvalMetrics(
            step=step, eval_loss=loss, perplexity=_exp(loss), eval_tokens=sum(counts), time=now(), sources=sources
        )

    def count(self, metrics: EvalMetrics) -> None:
        """Take note of an evaluation. One before the first step is no bar for those after it."""
        self.step = metrics.step
        if not self.step:
            return
        lower = metrics.eval_loss < self.lowest
        self.lowest, self.worse = (metrics.eval_loss, 0) if lower else (self.lowest, self.worse + 1)

    def lines(self, metrics: EvalMetrics) -> Iterator[str]:
        """Yield what a person is to know of an evaluation that was counted."""
        of = f"/{self.steps}" if self.steps else ""
        yield (
            f"step {metrics.step}{of}  eval loss {metrics.eval_loss:.4f}  "
            f"perplexity {metrics.perplexity:.4g}  ({metrics.eval_tokens:,} tokens)"
            + "".join(f"  {label} {loss:.4f}" for label, loss in (metrics.sources or {}).items())
        )
        if self.ends_run:
            count = f"{self.worse} evaluation{'s in a row' if self.worse > 1 else ''}"
            yield (
                f"eval.patience = {self.section.patience}: no eval loss below {self.lowest:.4f} in {count}; the run "
                f"ends at step {metrics.step}"
            )

    # ---- in a checkpoint

    @property
    def fingerprint(self) -> str:
        """Text that identifies the rows; losses can be compared only where it is equal."""
        return " ".join(f"{own.fingerprint} rows={own.global_batch_size}" for own in self.batches.values())

    def state(self) -> dict[str, Any]:
        """Return the counts for a checkpoint, as JSON."""
        lowest = self.lowest if math.isfinite(self.lowest) else None
        return {"data": self.fingerprint, "step": self.step, "lowest": lowest, "worse": self.worse}

    def restore(self, state: Mapping[str, Any], found: Path) -> bool:
        """Restore the counts, unless they are of other rows; return whether they are of these.

        Raises `DamagedError` for impossible ones.
        """
        if state.get("data") != self.fingerprint:
            return False
        step, lowest, worse, best = (state.get(key) for key in ("step", "lowest", "worse", "best"))
        possible = (
            (type(step) is type(worse) is int and step >= -1 and worse >= 0)
            and (lowest is None or type(lowest) is float)
            and (best is None or (isinstance(best, list) and [type(part) for part in best] == [int, float]))
        )
        if not possible:
            raise DamagedError(f"{found}/train_state.json: eval = {dict(state)} is impossible")
        self.step, self.worse = cast("int", step), cast("int", worse)
        self.lowest = math.inf if lowest is None else lowest
        return True


def _places(recipe: Recipe) -> set[tuple[str, ...]]:
    """Return where [data] and its sources are read: path, subset, split and revision of each."""
    parts = [part.data for part in recipe.parts()]
    return {(data.path or "", data.subset or "", data.split or "train", data.revision) for data in parts}


def open_evaluation(
    engine: Engine, runtime: Runtime, tokenizer: ByteTokenizer | HubTokenizer, reporter: Reporter, *, steps: int
) -> Evaluation:
    """Open the rows of [eval], tokenizing what is not cached; collective. Raises what `open_held_out` raises."""
    if both := sorted(_places(engine.recipe) & _places(engine.recipe.held_out())):
        reporter.info(
            f"note: [eval] reads what is trained on ({', '.join(path for path, *_ in both)}), so its loss is not of "
            "held-out data; give it other files, or another split"
        )
    rows = open_held_out(engine.recipe, runtime, engine.sizes, tokenizer, reporter, vocabulary=engine.vocabulary)
    return Evaluation(engine, rows, steps=steps)


def restore_evaluations(resumed: Resumed, evaluation: Evaluation, saving: Saving) -> Iterator[str]:
    """Restore what a checkpoint knows of the evaluations before it, and the best checkpoint; yield notes. Collective.

    Raises `DamagedError` for impossible values.
    """
    state = resumed.state.get("eval")
    if state is None:
        return
    if not evaluation.restore(state, resumed.directory):
        yield "the rows of [eval] are not those of the checkpoint, whose held-out losses count no more"
        return
    if not state.get("best") or not evaluation.engine.recipe.checkpoint.keep_best:
        return
    best = Best(*state["best"])
    own = resumed.directory.parent.absolute() == saving.store.root.absolute()
    if not (own and saving.restore_best(best)):
        yield f"the best checkpoint so far, of step {best.step}, is not in run.dir; the next evaluation finds another"


def nothing_to_do(step: int, steps: int, recipe: Recipe, evaluation: Evaluation | None) -> str:
    """Return why a run that has made `step` of its `steps` makes no other."""
    if step < steps and evaluation is not None:
        return (
            f"nothing to do: eval.patience = {evaluation.section.patience} ended the run at step {step} of {steps}; "
            "raise it to train further"
        )
    way = f"raise {'train.steps' if recipe.train.epochs is None else 'train.epochs'}"
    if recipe.train.epochs is None and recipe.train.steps != steps:
        way = f'set data.stop, now "{recipe.data.stop}", to another value'
    line = f"nothing to do: step {step} of {steps} is already trained; {way} to train further"
    missing = evaluation is not None and evaluation.due(step)
    return f"{line} (it has not been evaluated; --eval-only does so)" if missing else line


def evaluate_only(engine: Engine, *, runtime: Runtime, reporter: Reporter) -> None:
    """Report and log the held-out loss of the checkpoint that a run would resume from, or of its model. Collective.

    Raises `RecipeError` if the checkpoint is of another model config or tokenizer.
    """
    recipe, watch = engine.recipe, runtime.watch
    run_dir = to_path(recipe.run.dir)
    on_rank0(lambda: open_run_dir(run_dir))
    check_loggers(recipe, run_dir)
    with watch.during(TOKENIZE):
        tokenizer, notes = open_tokenizer(recipe, runtime, engine.vocabulary)
        evaluation = open_evaluation(engine, runtime, tokenizer, reporter, steps=recipe.train.steps or 0)
    with watch.during(FIND):
        store = CheckpointStore(run_dir, keep=recipe.checkpoint.keep, progress=watch.advance)
        resumed = find_evaluated(store, engine, tokenizer, reporter)
    for note in (*notes, *engine.plan.notes):
        reporter.info(f"note: {note}")
    build(engine, resumed, runtime=runtime, reporter=reporter)
    step = resumed.state["step"] if resumed is not None else 0
    reporter.info(f"evaluating {resumed.directory if resumed is not None else 'the model before its first step'}")

    def goes_on(done: int, total: int) -> bool:
        watch.beat()
        if done < total:
            reporter.progress("evaluating", done, total, unit="rows")
        return True

    with watch.during(EVALUATE):
        metrics = evaluation.measure(step, goes_on=goes_on)
    assert metrics is not None
    for line in evaluation.lines(metrics):
        reporter.info(line)

    def log() -> None:
        for logger in open_loggers(recipe, run_dir):
            logger.write(metrics)
            logger.close()

    on_rank0(log)


def _exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf
