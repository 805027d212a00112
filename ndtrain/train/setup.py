"""Prepare a run's first step: open its directory, find the checkpoint to resume from, build an engine with weights."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch

from ndtrain import proof
from ndtrain.accelerators import emulates_bfloat16, has_tf32
from ndtrain.checkpoint import CheckpointStore, load_tensors, read_state
from ndtrain.checkpoint.manifest import read_manifest
from ndtrain.engine import Engine
from ndtrain.errors import PlanError, RecipeError
from ndtrain.hf import extra_states
from ndtrain.hf.positions import fix_frequencies
from ndtrain.hf.tokenizer import ByteTokenizer, HubTokenizer
from ndtrain.hf.tokenizer_key import packages
from ndtrain.hf.weight_names import model_tensors
from ndtrain.load import fill_with_noise, materialize, unset
from ndtrain.parallel.compiled import compile_blocks
from ndtrain.recipe import Recipe
from ndtrain.runs.messages import gather_json, of_rank0, on_rank0
from ndtrain.runs.phases import MESHES, NOISE, PROOF, READ, RESUME
from ndtrain.runs.process import Runtime
from ndtrain.runs.restarts import Restarts
from ndtrain.storage.paths import is_local, open_to_write, os_errors, read_object, to_path
from ndtrain.train.changes import (
    Change,
    changes_data,
    config_changes,
    config_of,
    find_changes,
    needs_same_tokens,
    refuse,
    table,
)
from ndtrain.train.inputs import encoder_key
from ndtrain.train.report import Reporter
from ndtrain.train.source import load_start
from ndtrain.train.state import check_run_dir, check_state

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class Resumed(NamedTuple):
    """The checkpoint that a run resumes from, its train_state.json, and what may differ in the run's data."""

    directory: Path
    state: Mapping[str, Any]
    other_data: bool  # the user allowed other samples, or another order
    same_tokens: bool  # another version of the tokenizer must have given the same tokens

    def check_data(self, now: Mapping[str, Any]) -> None:
        """Raise `RecipeError` if the data's state `now` (`data_state`) differs where it must not."""
        if self.same_tokens and self.state["tokens"] != now["tokens"]:
            raise RecipeError(
                f"{self.directory}: data.tokenizer gives other tokens with these versions of its packages; restore "
                'them, choose another run.dir to train anew, or let it pass with checkpoint.allow = ["data.tokenizer"]'
            )
        if self.state["data"] != now["data"] and not (self.other_data or self.same_tokens):
            raise RecipeError(
                f"{self.directory} was trained on other samples: {self.state['data']}, now {now['data']}; use the "
                "version of ndtrain that wrote it, or choose another run.dir to train anew"
            )
        window = self.state.get("window_tokens")  # None between two windows, and in checkpoints of earlier versions
        if window not in (None, now.get("window_tokens")) and not self.other_data:
            raise RecipeError(
                f"{self.directory}: data.path: files of window {self.state['window'][0]}, in which the run goes on, "
                "have other content than they had; restore them, or choose another run.dir to train anew"
            )


def open_run_dir(run_dir: Path) -> None:
    """Make the run directory if it is missing. Raises `RecipeError` if it cannot be written to."""
    try:
        with os_errors(run_dir):
            open_to_write(run_dir)
    except OSError as error:
        raise RecipeError(f'run.dir = "{run_dir}" cannot be used: {error.strerror or error}; choose another') from error


def slow_dtype(recipe: Recipe, device: torch.device) -> Iterator[str]:
    """Yield a note where the device computes in the recipe's dtype without instructions for it, or could be faster.

    Raises `RecipeError` if it lacks the TF32 that the recipe asks for.
    """
    tf32 = has_tf32(device)
    if recipe.train.tf32 and not tf32:
        raise RecipeError(f"train.tf32 = true: this {device.type} device has no TF32; leave it out")
    fsdp = recipe.fsdp
    dtypes = {fsdp.param_dtype, *(policy.mixed_precision for policy in fsdp.modules.values())}
    if "bfloat16" in dtypes and emulates_bfloat16(device):
        yield (
            f"this {device.type} has no instructions for bfloat16, which can be several times slower than "
            'float32 on it; set fsdp.param_dtype = "float32" (and mixed_precision in [fsdp.modules])'
        )
    if "float32" in dtypes and tf32 and not recipe.train.tf32:
        yield "products in float32 take all of its bits; train.tf32 = true rounds to 10 and is several times faster"


def find_resumed(
    store: CheckpointStore, run_dir: Path, engine: Engine, reporter: Reporter, *, origin: Mapping[str, Any]
) -> Resumed | None:
    """Return the checkpoint to resume from, None for a new run. Collective.

    Reports what differs from it, unless an earlier start of this launch has. Raises `RecipeError` for what a resume
    must not let pass. `origin` is that of this run (`origin_of`), on rank 0.
    """
    recipe = engine.recipe
    restarts = Restarts.of_process(run_dir)
    newest = of_rank0(store.newest_step)
    resume = of_rank0(lambda: restarts.resume_from(recipe.checkpoint.resume, newest))
    found, messages = store.find(resume, verify=recipe.checkpoint.verify)
    for message in messages:
        reporter.info(message)
    state = read_state(found) if found is not None else None
    check_run_dir(run_dir, newest, state, resume)
    if found is None or state is None:
        on_rank0(lambda: restarts.record_begin(-1))
        return None
    check_state(state, found)

    def compare() -> list[bool]:
        changes = find_changes(
            state,
            recipe,
            origin,
            sizes=engine.sizes,
            configs=_configs(found, engine),
            same_shapes=lambda: _same_shapes(found, engine),
        )
        if changes and not restarts.restarted:
            reporter.info(table(changes, found, recipe))
        if "recipe" not in state and not restarts.restarted:
            reporter.info(
                f"note: {found} does not record its recipe; only the data, train.seed, the model's config, the mesh "
                "and [schedule] were compared"
            )
        refuse(changes, found, recipe)
        restarts.record_begin(state["step"])
        return [changes_data(changes), needs_same_tokens(changes, recipe)]

    return Resumed(found, state, *of_rank0(compare))


def find_evaluated(
    store: CheckpointStore, engine: Engine, tokenizer: ByteTokenizer | HubTokenizer, reporter: Reporter
) -> Resumed | None:
    """Return the checkpoint to evaluate, None for the model without one. Collective.

    Only what a held-out loss depends on is compared: raises `RecipeError` for another model config or tokenizer.
    """
    recipe = engine.recipe
    found, messages = store.find(recipe.checkpoint.resume, verify=recipe.checkpoint.verify)
    for message in messages:
        reporter.info(message)
    if found is None:
        return None
    state = read_state(found)
    check_state(state, found)

    def compare() -> None:
        changes = config_changes(*_configs(found, engine), lambda: _same_shapes(found, engine))
        if "recipe" in state and (saved := state["origin"])["tokenizer"] != encoder_key(
            recipe, tokenizer, state["recipe"]["data"]["format"]
        ):
            was, now = str(state["recipe"]["data"].get("tokenizer")), str(recipe.data.tokenizer)
            upgrade = was == now and saved.get("packages") not in (None, packages())
            meaning = "other versions of its packages may give other tokens" if upgrade else "it gives other tokens"
            changes.append(Change("data.tokenizer", was, now, "free" if upgrade else "allow", meaning))
        if changes:
            reporter.info(table(changes, found, recipe))
        refuse(changes, found, recipe)

    on_rank0(compare)
    return Resumed(found, state, other_data=False, same_tokens=False)


def _configs(found: Path, engine: Engine) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return the model's config in the checkpoint, and now."""
    return read_object(found / "config.json"), config_of(cast("PreTrainedConfig", engine.model.export_config))


def _same_shapes(found: Path, engine: Engine) -> bool:
    """Return whether the checkpoint has the model's tensors."""
    shapes = {key: list(tensor.shape) for key, tensor in model_tensors(engine.model).items()}
    return shapes == {key: entry["shape"] for key, entry in read_manifest(found)["tensors"]["model"].items()}


def build(engine: Engine, resumed: Resumed | None, *, runtime: Runtime, reporter: Reporter) -> None:
    """Shard the engine's model, check on noise that it computes the right thing, then load its weights. Collective."""
    recipe, model = engine.recipe, engine.model
    identity = proof.identity(engine)
    earlier = _recalled(recipe, identity)
    # What to compare with, copied before the model is cut.
    references = proof.References(model, engine.plan) if earlier is None and runtime.world_size > 1 else None
    watch = runtime.watch
    with watch.during(MESHES):
        engine.cut()
    with watch.during(NOISE):
        materialize(model, runtime, recipe=recipe, on_host=engine.plan.on_host)
        fix_frequencies(model, recipe.data.seq_len)
        if earlier is None:
            fill_with_noise(model)
    if earlier is not None:
        known = True
        if engine.sequence is not None:
            engine.sequence.enabled = bool(earlier.sequence)
        if engine.documents is not None:
            engine.documents.enabled = bool(earlier.documents)
        for note in earlier.notes:
            reporter.info(f"note: {note}")
    else:
        with watch.during(PROOF):
            known = _prove(engine, references, reporter, remember_as=identity)
            unset(model_tensors(model).values())
    with watch.during(READ if resumed is None else RESUME):
        if resumed is None:
            for note in load_start(model, engine.plan, recipe=recipe, runtime=runtime):
                reporter.info(f"note: {note}")
        else:
            wanted = model_tensors(model)
            load_tensors(resumed.directory / "model", wanted, all_of_it=True, progress=watch.advance)
            extra_states.restore(model, extra_states.read(resumed.directory))
    if not known:
        with watch.during(PROOF):
            known = _prove(engine, references, reporter)
    if not known:
        raise PlanError(
            f"{engine.plan.model_type}: its weights give logits or gradients that are not finite, or that follow "
            "rounding alone; check the weights"
        )
    engine.finish()
    if recipe.train.tf32:  # the proof was in float32
        torch.set_float32_matmul_precision("high")
    if recipe.train.compile:
        # Graphs that an earlier start has compiled are taken from there.
        if is_local(run_dir := to_path(recipe.run.dir)):
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(run_dir.absolute() / "compiled"))
        budget = recipe.train.memory_budget
        reporter.info(compile_blocks(model, engine.plan, engine.context, budget=budget).describe())


def _recalled(recipe: Recipe, identity: str) -> proof.Record | None:
    """Return what an earlier start in the run directory proved of the same model on the same mesh. Collective."""
    found = of_rank0(lambda: proof.recall(to_path(recipe.run.dir), identity))
    # A node with another version of a package proves again, and so all do.
    return proof.Record(*found) if found is not None and len(set(gather_json(identity))) == 1 else None


def _prove(
    engine: Engine, references: proof.References | None, reporter: Reporter, *, remember_as: str | None = None
) -> bool:
    found = proof.prove(engine, references)
    for note in found.notes:
        reporter.info(f"note: {note}")
    if found.known and remember_as is not None:
        kept = (part.enabled if part is not None else None for part in (engine.sequence, engine.documents))
        record = proof.Record(found.notes, *kept)
        on_rank0(lambda: proof.remember(to_path(engine.recipe.run.dir), remember_as, record))
    return found.known
