"""Prepare a run's first step: open its directory, find the checkpoint to resume from, build an engine with weights."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from ndtrain import proof
from ndtrain.checkpoint import CheckpointStore, load_tensors, read_state
from ndtrain.engine import Engine
from ndtrain.errors import PlanError, RecipeError, keeps_its_name
from ndtrain.hf import extra_states
from ndtrain.hf.positions import fix_frequencies
from ndtrain.hf.tokenizer import ByteTokenizer, HubTokenizer
from ndtrain.load import fill_with_noise, materialize, model_tensors, unset
from ndtrain.runs.messages import of_rank0, on_rank0
from ndtrain.runs.phases import MESHES, NOISE, PROOF, READ, RESUME
from ndtrain.runs.process import Runtime
from ndtrain.runs.restarts import Attempt
from ndtrain.storage.paths import open_to_write, os_errors
from ndtrain.train.report import Reporter
from ndtrain.train.source import load_start
from ndtrain.train.state import check_run_dir, check_state, save_extras

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


class Resumed(NamedTuple):
    """The checkpoint that a run resumes from, and its train_state.json."""

    directory: Path
    state: Mapping[str, Any]


def open_run_dir(run_dir: Path) -> None:
    """Make the run directory if it is missing. Raises `RecipeError` if it cannot be written to."""
    try:
        with os_errors(run_dir):
            open_to_write(run_dir)
    except OSError as error:
        raise RecipeError(f'run.dir = "{run_dir}" cannot be used: {error.strerror or error}; choose another') from error


def try_extras(model: PreTrainedModel, tokenizer: ByteTokenizer | HubTokenizer) -> None:
    """Save config and tokenizer to a temporary directory. Raises `RecipeError`, before training, if that fails."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            save_extras(Path(folder), model, tokenizer)
    except Exception as error:
        if isinstance(error, OSError) or keeps_its_name(error):
            raise
        line = " ".join(str(error).split())
        raise RecipeError(f"the model's config or tokenizer cannot be saved: {line}") from error


def find_resumed(
    store: CheckpointStore, run_dir: Path, engine: Engine, reporter: Reporter, *, data: str
) -> Resumed | None:
    """Return the checkpoint to resume from, None for a new run. Collective.

    Raises `RecipeError` if it does not fit the recipe or `data`, the fingerprint of the batches.
    """
    recipe = engine.recipe
    attempt = Attempt.of_process(run_dir)
    newest = of_rank0(store.newest_step)
    resume = of_rank0(lambda: attempt.resume_from(recipe.checkpoint.resume, newest))
    found, messages = store.find(resume, verify=recipe.checkpoint.verify)
    for message in messages:
        reporter.info(message)
    resumed = Resumed(found, read_state(found)) if found is not None else None
    check_run_dir(run_dir, newest, resumed.state if resumed is not None else None, resume)
    if resumed is not None:
        config = cast("PreTrainedConfig", engine.model.export_config)
        for note in check_state(resumed.state, resumed.directory, recipe, data=data, config=config):
            reporter.info(f"note: {note}")
    on_rank0(lambda: attempt.record_begin(resumed.state["step"] if resumed is not None else -1))
    return resumed


def build(engine: Engine, resumed: Resumed | None, *, runtime: Runtime, reporter: Reporter) -> None:
    """Shard the engine's model, check on noise that it computes the right thing, then load its weights. Collective."""
    recipe, model = engine.recipe, engine.model
    # Whole blocks to compare with, copied before the model is cut.
    references = proof.ReferenceBlocks(model, engine.plan) if engine.sizes.tp > 1 else None
    watch = runtime.watch
    with watch.during(MESHES):
        engine.cut()
    with watch.during(NOISE):
        materialize(model, runtime, recipe=recipe, on_host=engine.plan.on_host)
        fix_frequencies(model, recipe.data.seq_len)
        fill_with_noise(model)
    with watch.during(PROOF):
        known = _prove(engine, references, reporter)
    with watch.during(READ if resumed is None else RESUME):
        unset(model_tensors(model).values())
        if resumed is None:
            for note in load_start(model, engine.plan, recipe=recipe, runtime=runtime):
                reporter.info(f"note: {note}")
        else:
            wanted = model_tensors(model)
            load_tensors(resumed.directory / "model", wanted, all_of_it=True, progress=watch.advance)
            extra_states.restore(model, extra_states.read(resumed.directory))
    with watch.during(PROOF):
        known = known or _prove(engine, references, reporter)
    if not known:
        raise PlanError(
            f"{engine.plan.model_type}: its weights give logits or gradients that are not finite, or that follow "
            "rounding alone; check the weights"
        )
    engine.finish()


def _prove(engine: Engine, references: proof.ReferenceBlocks | None, reporter: Reporter) -> bool:
    found = proof.prove(engine, references)
    for note in found.notes:
        reporter.info(f"note: {note}")
    return found.known
