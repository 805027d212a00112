"""Run a training or an evaluation: make the plan, join the process group and start the `Trainer`."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import TYPE_CHECKING

from ndtrain.engine import Engine
from ndtrain.errors import RecipeError, Stopped
from ndtrain.hf.model import meta_model
from ndtrain.mesh import MeshSizes
from ndtrain.plan import Plan, make_plan
from ndtrain.recipe import Recipe
from ndtrain.runs.environment import env_world_size
from ndtrain.runs.lock import RunLock
from ndtrain.runs.messages import broadcast_json, on_rank0, rank0_first, together
from ndtrain.runs.process import Runtime, start
from ndtrain.runs.restarts import Restarts
from ndtrain.runs.stop_signals import StopSignals
from ndtrain.storage.paths import to_path
from ndtrain.train.data_files import cache_root, with_data_commit
from ndtrain.train.evaluation import evaluate_only
from ndtrain.train.report import Reporter, Silent
from ndtrain.train.setup import open_run_dir
from ndtrain.train.source import with_checkpoint, with_commit
from ndtrain.train.trainer import Trainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "Reporter",
    "Silent",
    "Trainer",
    "cache_root",
    "evaluate",
    "run",
    "sizes_for",
    "with_checkpoint",
    "with_commit",
]


def run(recipe: Recipe, reporter: Reporter, stop_signals: StopSignals) -> None:
    """Train as `recipe` says, on the ranks that torchrun started, or on one. Raises `NdtrainError`s.

    `stop_signals` holds the requests to this process and already handles signals.
    """
    recipe, notes = with_checkpoint(recipe)
    sizes = sizes_for(recipe, env_world_size() or 1)
    with start(recipe.run) as runtime:
        own = reporter if runtime.is_main else Silent()
        recipe, plan, model = _planned(recipe, sizes, runtime=runtime, reporter=own, notes=notes, trains=True)
        trainer = Trainer(recipe, plan, model, runtime=runtime, reporter=own, stop_signals=stop_signals)
        restarts = Restarts.of_process(trainer.run_dir)
        lock = RunLock(trainer.run_dir, launch=restarts.launch if restarts.max_restarts else "")

        def own_run_dir() -> None:
            open_run_dir(trainer.run_dir)
            lock.take()
            restarts.forget_others()

        try:
            on_rank0(own_run_dir)
            _same_everywhere(recipe)
            trainer.prepare()
            trainer.train()
        except Stopped:
            # torchrun also sends SIGTERM to workers that it will restart, so only other requests stop the launch.
            if runtime.is_main and (trainer.requests.stop or stop_signals.signal) != signal.SIGTERM:
                restarts.record_stop()
            raise
        finally:
            lock.release()
            own.close()


def evaluate(recipe: Recipe, reporter: Reporter) -> None:
    """Print and log the held-out loss of the run's newest checkpoint, or of its model before the first one.

    Nothing is trained or saved. The run directory is locked meanwhile, so that a run that uses it goes on undisturbed
    and this one is refused. Raises `NdtrainError`s.
    """
    run_dir = to_path(recipe.run.dir)
    recipe, notes = with_checkpoint(recipe)
    sizes = sizes_for(recipe, env_world_size() or 1)
    with start(recipe.run) as runtime:
        own = reporter if runtime.is_main else Silent()
        recipe, plan, model = _planned(recipe, sizes, runtime=runtime, reporter=own, notes=notes, trains=False)
        lock = RunLock(run_dir, launch="")

        def own_run_dir() -> None:
            open_run_dir(run_dir)
            lock.take()

        try:
            on_rank0(own_run_dir)
            _same_everywhere(recipe)
            evaluate_only(Engine(recipe, plan, model, device=runtime.device), runtime=runtime, reporter=own)
        finally:
            lock.release()
            own.close()


def _planned(
    recipe: Recipe, sizes: MeshSizes, *, runtime: Runtime, reporter: Reporter, notes: list[str], trains: bool
) -> tuple[Recipe, Plan, PreTrainedModel]:
    """Return the recipe with the commits of its model and data, its plan and its model on meta. Collective.

    Reports these notes and others. Only a run that `trains` needs the data of [data].
    """

    def on_nodes(work: Callable[[], None]) -> None:
        rank0_first(runtime, work)

    recipe, found = with_commit(recipe, on_nodes)
    recipe, more = with_data_commit(recipe, on_nodes) if trains else (recipe, [])
    recipe, held_out = with_data_commit(recipe, on_nodes, "eval") if recipe.eval is not None else (recipe, [])
    if recipe.model.trust_remote_code:
        # transformers copies the code to a cache of the node, where no rank may import half of a file.
        rank0_first(runtime, lambda: meta_model(recipe))
    model = meta_model(recipe)
    plan = make_plan(model, sizes, recipe)
    for note in [*notes, *found, *more, *held_out]:
        reporter.info(f"note: {note}")
    return recipe, plan, model


def _same_everywhere(recipe: Recipe) -> None:
    """Raise `RecipeError` if ranks found different checkpoints, as they may while the run in model.name still saves."""
    rank0_name = broadcast_json(recipe.model.name)

    def check() -> None:
        if recipe.model.name != rank0_name:
            raise RecipeError(
                f"model.name: one rank found the checkpoint {recipe.model.name}, rank 0 found {rank0_name}; give the "
                "directory of one checkpoint"
            )

    together(check)


def sizes_for(recipe: Recipe, world_size: int) -> MeshSizes:
    """Return the sizes of the recipe's mesh on `world_size` ranks."""
    mesh = recipe.mesh
    return MeshSizes.resolve(
        world_size, dp_replicate=mesh.dp_replicate, dp_shard=mesh.dp_shard, cp=mesh.cp, tp=mesh.tp, ep=mesh.ep
    )
