"""Find what a run starts from: an ndtrain checkpoint or its run's directory, or a commit of a model on the hub."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tomli

from ndtrain.checkpoint import CheckpointStore, check_together, load_tensors
from ndtrain.checkpoint.manifest import read_manifest
from ndtrain.checkpoint.tensors import pieces_of
from ndtrain.errors import DamagedError, RecipeError
from ndtrain.hf import extra_states, hub
from ndtrain.hf.files import model_files
from ndtrain.hf.model import tied_keys
from ndtrain.hf.tied import refuse_other_values
from ndtrain.hf.weight_names import model_tensors
from ndtrain.load import load_weights, refuse_overrides, unused
from ndtrain.plan import Plan
from ndtrain.recipe import Recipe
from ndtrain.runs.messages import of_rank0, on_rank0, rank0_first, together
from ndtrain.runs.process import Runtime, rank, world_size
from ndtrain.runs.restarts import Restarts
from ndtrain.storage.paths import to_path
from ndtrain.storage.stored import checkpoint_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def with_checkpoint(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """Return the recipe, with a run directory in `model.name` replaced by its newest valid checkpoint, and notes.

    Config and tokenizer are then found as in any directory. Raises `DamagedError` if no checkpoint is valid.
    """
    name = recipe.model.name or ""
    path = Path(name)
    if "://" in name:
        raise RecipeError(
            f'model.name = "{name}": a run starts from a local directory or the hub; copy the model first'
        )
    root = path / "checkpoints"
    if recipe.model.name is None or not root.is_dir() or (path / "config.json").exists():
        return recipe, []
    newest, refused = CheckpointStore(path, keep=1).newest_valid()
    if newest is None:
        why = refused[0][1] if refused else "it has none"
        raise DamagedError(f'model.name = "{path}" is a run directory without a valid checkpoint: {why}')
    model = recipe.model.model_copy(update={"name": str(newest)})
    notes = [f"{reason}; using {newest} instead" for _, reason in refused]
    return recipe.model_copy(update={"model": model}), [*notes, f"model.name: using {newest}"]


# Runs work on one rank of each node, rank 0 first.
OnNodes = Callable[[Callable[[], None]], None]


def with_commit(recipe: Recipe, on_nodes: OnNodes, *, of_run: bool = True) -> tuple[Recipe, list[str]]:
    """Return the recipe with the commit of its model on the hub in `model.revision`, and notes. Collective.

    Config, tokenizer and code are then in the cache of every node. With `of_run`, a run that will resume keeps the
    commit that its recipe.toml records. Raises `RecipeError` if there is no such model.
    """
    name, asked = recipe.model.name, recipe.model.revision
    if name is None:
        return recipe, []

    def of_the_run() -> str | None:
        return recorded_commit(recipe, "model", "name") if of_run and hub.on_hub(name, asked) else None

    recorded = of_rank0(of_the_run)
    found = on_every_node(name, recorded or asked, on_nodes)
    if found is None:
        return recipe, []
    notes = [found.note] if found.note else []
    if asked != found.commit:
        what = "recorded by the run" if recorded else f'revision "{asked}"'
        notes.append(f"model.name: {name} at commit {found.commit} ({what})")
    model = recipe.model.model_copy(update={"revision": found.commit})
    return recipe.model_copy(update={"model": model}), notes


def on_every_node(
    name: str, revision: str, on_nodes: OnNodes, *, key: str = "model.name", weights: bool = False
) -> hub.Snapshot | None:
    """Return the snapshot of a model on the hub, None for a local one, once every node has its files. Collective.

    Those are the files beside the weights, or with `weights` the weights. Rank 0 alone asks which commit it is.
    """

    def resolve() -> list[object] | None:
        return [*hub.resolve(name, revision, key=key)] if hub.on_hub(name, revision, key=key) else None

    answer = of_rank0(resolve)
    if answer is None:
        return None
    found = hub.Snapshot(*answer)

    def fetch() -> None:
        wanted = hub.weights_of(name, found, key=key) if weights else found.beside
        hub.fetch(name, found.commit, wanted, key=key)

    on_nodes(fetch)
    return found


def recorded_commit(
    recipe: Recipe, section: Literal["model", "data", "eval"], key: str, *, source: int | None = None
) -> str | None:
    """Return the commit that the run which is to be resumed has used of section.key; None without one. For rank 0.

    With `source` it is that of a source in the section, which is known by the same key. Raises `RecipeError` if the
    recipe names another commit.
    """
    own, run_dir = getattr(recipe, section), to_path(recipe.run.dir)
    revision = allowed = f"{section}.revision"
    if source is not None:
        own, revision, allowed = own.sources[source], f"{section}.sources[{source}].revision", f"{section}.sources"
    name, asked = getattr(own, key), own.revision
    try:
        newest = CheckpointStore(run_dir, keep=1).newest_step()
        resume = Restarts.of_process(run_dir).resume_from(recipe.checkpoint.resume, newest)
        if resume == "never" or (resume == "auto" and newest is None):
            return None
        of = run_dir if resume == "auto" else to_path(resume).parent.parent
        written = tomli.loads((of / "recipe.toml").read_text(encoding="utf-8"))[section]
        tables = [written] if source is None else written["sources"]
        commit = next((table["revision"] for table in tables if table[key] == name), "")
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not hub.is_commit(commit):
        return None
    if hub.is_commit(asked) and asked != commit:
        if section == "eval" or allowed in recipe.checkpoint.allow:
            return None
        raise RecipeError(
            f'{revision} = "{asked}": the run in {of} uses commit {commit} of {name}; leave {revision} out, choose '
            f'another run.dir to train anew, or let it pass with checkpoint.allow = ["{allowed}"]'
        )
    return str(commit)


def fetch_weights(recipe: Recipe, runtime: Runtime) -> None:
    """Download the weights of a model on the hub, once to each node whose ranks read them. Collective."""
    model = recipe.model
    if model.name is None or model.init == "random":
        return
    on_rank0_alone = recipe.load.mode == "rank0"
    on_every_node(
        model.name,
        model.revision,
        on_rank0 if on_rank0_alone else lambda work: rank0_first(runtime, work),
        weights=True,
    )


def load_start(model: PreTrainedModel, plan: Plan, *, recipe: Recipe, runtime: Runtime) -> list[str]:
    """Load weights as `load_weights` does, or from an ndtrain checkpoint; return notes for the user. Collective.

    Of a checkpoint each rank reads its own slices, whatever `load.mode` says. Raises `DamagedError` for one that is
    damaged or lacks a weight of the model.
    """
    if recipe.model.init == "random":
        return load_weights(model, plan, recipe=recipe, runtime=runtime)
    directory = Path(recipe.model.name or "")
    found: list[bool] = []
    together(lambda: found.append(directory.is_dir() and _is_checkpoint(directory)))
    if not found[0]:
        fetch_weights(recipe, runtime)
        return load_weights(model, plan, recipe=recipe, runtime=runtime)

    check_together(directory, progress=runtime.watch.advance)
    wanted, saved = model_tensors(model), read_manifest(directory)["tensors"]["model"]
    shapes = {name: tuple(saved[name]["shape"]) if name in saved else None for name in wanted}
    misfits = {name: shape for name, shape in shapes.items() if shape != tuple(wanted[name].shape)}
    on_rank0(lambda: refuse_overrides(misfits, recipe))
    tied = {alias: name for alias, name in tied_keys(model).items() if {alias, name} <= saved.keys()}
    if tied:
        together(lambda: _compare(tied, directory))
    load_tensors(directory / "model", wanted, progress=runtime.watch.advance)
    extra_states.restore(model, extra_states.read(directory))
    return unused(saved.keys() - wanted.keys() - tied.keys())


def _is_checkpoint(directory: Path) -> bool:
    files = model_files(directory)
    return files is not None and files.kind == "checkpoint"


def _compare(tied: Mapping[str, str], directory: Path) -> None:
    """Raise `DamagedError` if a checkpoint holds {alias: its weight} with different values."""
    pieces = pieces_of(directory / "model")
    stored = checkpoint_tensors({key: pieces[key] for key in {*tied, *tied.values()}}, directory)
    copies = {name: [name, *(alias for alias in tied if tied[alias] == name)] for name in tied.values()}
    refuse_other_values(copies, stored, directory, part=rank(), parts=world_size())
