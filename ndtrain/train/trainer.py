"""One run on one rank: sharded model, batches, steps, checkpoints."""

from __future__ import annotations

import gc
import math
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist

from ndtrain.checkpoint import load_tensors, optimizer_tensors, read_state, restore_optimizer
from ndtrain.data.batches import GlobalBatches, labels_count
from ndtrain.engine.engine import Engine
from ndtrain.engine.flops import flops_per_token
from ndtrain.engine.schedule import learning_rate
from ndtrain.errors import NdtrainError, PlanError, RecipeError, Stopped
from ndtrain.hf import extra_states
from ndtrain.hf.positions import fix_frequencies
from ndtrain.hf.routers import sequence_count
from ndtrain.load import fill_with_noise, materialize, model_tensors, unset
from ndtrain.loggers.device import peak_flops, peak_memory_bytes
from ndtrain.loggers.json_lines import JsonLines, UploadedLines
from ndtrain.loggers.logger import Sink
from ndtrain.loggers.metrics import StepMetrics, now
from ndtrain.loggers.tensorboard import TensorBoard, require_tensorboard
from ndtrain.plan import Plan
from ndtrain.proof.batch import check_same_batch
from ndtrain.proof.dropout import check_dropout
from ndtrain.proof.masks import check_masks
from ndtrain.proof.reference import Twins
from ndtrain.proof.sequence import try_sequence_parallel
from ndtrain.proof.tensor import check_tensor_parallel
from ndtrain.recipe import Recipe, to_toml
from ndtrain.runs.limits import WAIT_TIMEOUT, process_groups, set_timeouts
from ndtrain.runs.messages import of_rank0, on_rank0
from ndtrain.runs.process import Runtime
from ndtrain.runs.restarts import Attempt
from ndtrain.runs.seeds import random_seed
from ndtrain.runs.stop_signals import Requests, nothing_to_save, words
from ndtrain.runs.watch import Watch
from ndtrain.storage.paths import is_local, open_to_write, os_errors, place
from ndtrain.train import inputs
from ndtrain.train.report import Reporter
from ndtrain.train.saving import Saving
from ndtrain.train.skips import Skips, refuse_not_finite
from ndtrain.train.source import load_start
from ndtrain.train.state import check_run_dir, check_state, save_extras, versions

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


class Trainer(Engine):
    """One run on one rank. `prepare` builds everything and resumes; `train` is the loop."""

    def __init__(
        self,
        recipe: Recipe,
        plan: Plan,
        model: PreTrainedModel,
        *,
        runtime: Runtime,
        reporter: Reporter,
        requests: Requests | None = None,
    ):
        super().__init__(recipe, plan, model)
        self.runtime, self.reporter = runtime, reporter
        self.run_dir = place(recipe.run.dir)
        self.requests = requests or Requests(self.run_dir)
        self.asked = [0, 0]  # stop and save, as all ranks know it since the last step
        self.saving = Saving(recipe.checkpoint, self.run_dir, reporter)
        self.step = 0
        self.cursor = 0
        self.due = False  # a checkpoint, once the steps are finite again
        self.skips = Skips(recipe.train.max_bad_steps)
        self.watch = Watch(recipe.run.step_timeout_s)
        self.same_batch = False  # whether tp and cp ranks are known to read the same
        self.told = False  # of extra states that are not saved

    # ---- before the first step

    def prepare(self) -> None:
        """Tokenize, shard, load or resume. Every refusal comes before the first weight is read."""
        recipe, runtime = self.recipe, self.runtime
        on_rank0(self._open_run_dir)
        if recipe.log.tensorboard:
            require_tensorboard(self.run_dir)
        self._open_tokenizer()
        on_rank0(self._try_extras)
        self.batches = self._open_data()
        attempt = Attempt.of_process(self.run_dir)
        newest = of_rank0(self.saving.store.newest_step)
        resume = of_rank0(lambda: attempt.resume(recipe.checkpoint.resume, newest))
        found, messages = self.saving.store.find(resume, verify=recipe.checkpoint.verify)
        for message in messages:
            self.reporter.info(message)
        state = read_state(found) if found is not None else None
        check_run_dir(self.run_dir, newest, state, resume)
        if state is not None and found is not None:
            config = cast("PreTrainedConfig", self.model.export_config)
            for note in check_state(state, found, recipe, data=self.batches.fingerprint, config=config):
                self.reporter.info(f"note: {note}")
        on_rank0(lambda: attempt.begin(state["step"] if state is not None else -1))
        self.reporter.info(self._arithmetic())
        for note in self.plan.notes:
            self.reporter.info(f"note: {note}")

        self.flops_per_token = flops_per_token(self.plan, self.model.config.get_text_config(), recipe.data.seq_len)
        # Whole blocks to compare with: they are copied before the model is cut.
        twins = Twins(self.model, self.plan) if self.sizes.tp > 1 else None
        self.cut(runtime.device.type)
        set_timeouts(WAIT_TIMEOUT, process_groups())
        materialize(self.model, runtime, recipe=recipe, on_host=self.plan.on_host)
        fix_frequencies(self.model, recipe.data.seq_len)
        fill_with_noise(self.model)
        checked = self._prove(twins)
        unset(model_tensors(self.model).values())
        if found is None:
            for note in load_start(self.model, self.plan, recipe=recipe, runtime=runtime):
                self.reporter.info(f"note: {note}")
        else:
            load_tensors(found / "model", model_tensors(self.model), all_of_it=True)
            extra_states.restore(self.model, extra_states.read(found))
        if not checked and not self._prove(twins):
            raise PlanError(f"{self.plan.model_type}: the logits or gradients of its weights are not finite")
        self.finish()
        if state is not None and found is not None:
            self.step, self.cursor = state["step"], state["samples"]
            self.saving.step = self.step
            self.skips.restore(state, found)
            updates = self.step - self.skips.total
            restore_optimizer(self.model, self.optimizer, found / "optim", step=updates)
            self.reporter.info(f"resumed from {found} (step {self.step}, sample {self.cursor})")
        if runtime.is_main:
            (self.run_dir / "recipe.toml").write_text(to_toml(recipe), encoding="utf-8")
            lines = JsonLines if is_local(self.run_dir) else UploadedLines
            self.sinks: list[Sink] = [lines(self.run_dir / "metrics.jsonl")]
            if recipe.log.tensorboard:
                self.sinks.append(TensorBoard(self.run_dir / "tensorboard"))

    def _prove(self, twins: Twins | None) -> bool:
        """Whether the model does on this mesh what it does alone; False if these weights cannot tell."""
        with extra_states.kept(self.model):
            if self.sequence is not None and self.sequence.enabled:
                try_sequence_parallel(self, self.sequence)
            known = check_masks(self) and (twins is None or check_tensor_parallel(self, twins))
            if known and self.sizes.tp > 1:
                check_dropout(self)
        return known

    def _open_run_dir(self) -> None:
        try:
            with os_errors(self.run_dir):
                open_to_write(self.run_dir)
        except OSError as error:
            why = error.strerror or error
            raise RecipeError(f'run.dir = "{self.run_dir}" cannot be used: {why}; choose another') from error

    def _try_extras(self) -> None:
        """Write config and tokenizer once for nothing: what cannot be saved must not be trained first."""
        try:
            with tempfile.TemporaryDirectory() as folder:
                save_extras(Path(folder), self.model, self.tokenizer)
        except OSError:
            raise
        except Exception as error:
            line = " ".join(str(error).split())
            raise RecipeError(f"the model's config or tokenizer cannot be saved: {line}") from error

    def _open_tokenizer(self) -> None:
        self.tokenizer, self.vocab_size = inputs.open_tokenizer(self.recipe, self.model)

    def _open_data(self) -> GlobalBatches:
        return inputs.open_batches(self.recipe, self.runtime, self.sizes, self.tokenizer, self.reporter)

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
        recipe = self.recipe
        if self.step >= recipe.train.steps:
            if self.runtime.is_main and self.saving.step is not None:
                self.saving.store.prune(self.saving.step)  # which the end of the last save may have missed
            self.reporter.info(f"nothing to do: step {self.step} of {recipe.train.steps} is already trained")
            return
        gc.collect()
        gc.freeze()
        try:
            self._listen()
            started, first = time.perf_counter(), self.train_step()
            last = first
            while self.step < recipe.train.steps:
                last = self.train_step()
            self._close_sinks()
        except NdtrainError:
            with suppress(NdtrainError):
                self._close_sinks()
            # What is being written is whole, and no less worth.
            with suppress(NdtrainError):
                self.saving.store.settle()
            raise
        self.reporter.info(
            f"steps {first.step} to {last.step}: loss {first.loss:.4f} -> {last.loss:.4f} "
            f"in {time.perf_counter() - started:.0f} s"
        )

    def _close_sinks(self) -> None:
        try:
            for sink in self.sinks if self.runtime.is_main else ():
                sink.close()
        except OSError as error:
            raise self._not_logged(error) from error

    def _not_logged(self, error: OSError) -> NdtrainError:
        return NdtrainError(f"step {self.step} was trained but not logged: {error}")

    def _listen(self) -> None:
        """From here on requests wait for the end of a step; what was asked before ends the run."""
        self.requests.training = True
        self.asked = self._agree(0)[1:]
        if self.asked[0]:
            self._answer()
            raise nothing_to_save(self.asked[0])

    def _agree(self, number: int) -> list[int]:
        """[the largest `number` of all ranks, stop, save]: what any rank was asked, on every rank."""
        own = [number, *self.requests.seen(files=self.runtime.is_main)]
        shared = torch.tensor(own, dtype=torch.int64, device=self.runtime.device)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        return cast("list[int]", shared.tolist())

    def _answer(self) -> None:
        if self.runtime.is_main:
            for path in self.requests.answered():
                self.reporter.info(f"note: {path} cannot be removed; it is not looked at again")

    def train_step(self) -> StepMetrics:
        """One optimizer step, told and logged, and its checkpoint where one is due or asked for.

        Raises `Stopped` after saving where any rank was asked to stop.
        """
        recipe = self.recipe
        self.saving.settle(wait=False)
        metrics = self._train_step()
        if self.runtime.is_main:
            try:
                for sink in self.sinks:
                    sink.write(metrics)
            except OSError as error:
                raise self._not_logged(error) from error
        last = self.step == recipe.train.steps
        self.reporter.step(metrics, steps=recipe.train.steps, show=last or self.step % recipe.log.every == 0)
        self._tell_skip(metrics)
        self.due = self.due or bool(recipe.checkpoint.every and self.step % recipe.checkpoint.every == 0)
        # While steps are skipped the weights may be at fault: what is due waits for the next good step.
        if last or any(self.asked) or (self.due and not self.skips.in_row):
            with self.watch.saving():
                refuse_not_finite(model_tensors(self.model), step=self.step)
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
            raise Stopped(
                f"stopped by {stop} after step {self.step} of {recipe.train.steps}, which is saved; "
                "start again to go on"
            )
        return metrics

    def _tell_skip(self, metrics: StepMetrics) -> None:
        if self.skips.in_row:
            self.reporter.info(
                f"step {self.step}: loss {metrics.loss}, gradient norm {metrics.grad_norm}: skipped, no weight changed "
                f"({self.skips.in_row} in a row, {self.skips.limit} end the run; {self.skips.total} in all)"
            )
        self.skips.refuse_more(self.step, metrics.loss, metrics.grad_norm)

    def _train_step(self) -> StepMetrics:
        recipe, meshes, device = self.recipe, self.meshes, self.runtime.device
        started = time.perf_counter()
        self.watch.beat(self.step + 1)
        batches = [
            {key: value.to(device, non_blocking=True) for key, value in batch.items()}
            for batch in self.batches.load(self.cursor)
        ]
        if not self.same_batch:
            check_same_batch(batches[0], meshes)
            self.same_batch = True
        loss_group = meshes.loss.get_group()
        routed = self.loss_model.router is not None
        own = [labels_count(batches), sum(sequence_count(b["labels"]) for b in batches) if routed else 0]
        counts = torch.tensor(own, dtype=torch.int64, device=device)
        dist.all_reduce(counts, group=loss_group)
        count, rows = (n // self.sizes.cp for n in counts.tolist())  # cp ranks have the same rows
        # Keyed by step and place: a resumed run draws the same dropout on any mesh with the same batch and cp ranks.
        place = self.sizes.coordinate(self.runtime.rank)
        torch.manual_seed(random_seed(recipe.train.seed, self.step, place["batch"], place["cp"]))

        total = self.gradients(batches, count=count, rows=rows, done=lambda: self.watch.beat(self.step + 1))
        norm = self.clip()
        # tp ranks have the same loss. Sums over all ranks are the same on each, and so is the decision that follows.
        sums = torch.cat([total / self.sizes.tp, norm.isfinite().logical_not().to(total)[None]])
        dist.all_reduce(sums)
        loss_sum, aux_sum, ranks_not_finite = sums.tolist()
        loss, aux_loss, grad_norm = loss_sum / max(1, count), aux_sum / max(1, rows), float(norm)
        self.skips.count(skipped=bool(ranks_not_finite) or not math.isfinite(loss + aux_loss))
        lr = learning_rate(recipe, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if not self.skips.in_row:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

        peak, *self.asked = self._agree(peak_memory_bytes(device))
        seconds = time.perf_counter() - started
        self.step += 1
        self.cursor += recipe.train.global_batch_size
        speed = count / seconds
        per_rank = speed / self.runtime.world_size
        flops = peak_flops(device)
        return StepMetrics(
            step=self.step,
            loss=loss,
            grad_norm=grad_norm,
            lr=lr,
            tokens=count,
            tokens_per_second=speed,
            step_seconds=seconds,
            mfu=per_rank * self.flops_per_token / flops if flops else None,
            peak_memory_bytes=peak,
            time=now(),
            aux_loss=aux_loss if routed else None,
            skipped=self.skips.total,
        )

    def save(self) -> None:
        """Write and publish the checkpoint of the current step, or begin to, unless it is there."""
        self.saving.settle(wait=True)
        if self.saving.step == self.step:
            return
        states, left_out = extra_states.shared_states(self.model)
        if left_out and not self.told:
            self.told = True
            self.reporter.info(f"note: {extra_states.left_out_note(left_out, 'not saved; after a resume')}")
        self.saving.begin(
            self.step,
            model=model_tensors(self.model),
            optim=optimizer_tensors(self.model, self.optimizer),
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
            extra_files=lambda directory: save_extras(directory, self.model, self.tokenizer, states),
        )
