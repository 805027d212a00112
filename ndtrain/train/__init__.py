"""Run a training: make the plan, join the process group and start the `Trainer`."""

from __future__ import annotations

import signal

from ndtrain.errors import RecipeError, Stopped
from ndtrain.hf.model import meta_model
from ndtrain.mesh import MeshSizes
from ndtrain.plan import make_plan
from ndtrain.recipe import Recipe
from ndtrain.runs.environment import env_world_size
from ndtrain.runs.lock import RunLock
from ndtrain.runs.messages import broadcast_json, on_rank0, rank0_first, together
from ndtrain.runs.process import start
from ndtrain.runs.restarts import Restarts
from ndtrain.runs.stop_signals import StopSignals
from ndtrain.train.data_files import cache_root, with_data_commit
from ndtrain.train.report import Reporter, Silent
from ndtrain.train.setup import open_run_dir
from ndtrain.train.source import with_checkpoint, with_commit
from ndtrain.train.trainer import Trainer

__all__ = ["Reporter", "Silent", "Trainer", "cache_root", "run", "sizes_for", "with_checkpoint", "with_commit"]


def run(recipe: Recipe, reporter: Reporter, stop_signals: StopSignals) -> None:
    """Train as `recipe` says, on the ranks that torchrun started, or on one. Raises `NdtrainError`s.

    `stop_signals` holds the requests to this process and already handles signals.
    """
    recipe, notes = with_checkpoint(recipe)
    sizes = sizes_for(recipe, env_world_size() or 1)
    with start(recipe.run) as runtime:
        own = reporter if runtime.is_main else Silent()
        recipe, found = with_commit(recipe, lambda work: rank0_first(runtime, work))
        notes += found
        recipe, found = with_data_commit(recipe, lambda work: rank0_first(runtime, work))
        notes += found
        if recipe.model.trust_remote_code:
            # transformers copies the code to a cache of the node, where no rank may import half of a file.
            rank0_first(runtime, lambda: meta_model(recipe))
        model = meta_model(recipe)
        plan = make_plan(model, sizes, recipe)
        trainer = Trainer(recipe, plan, model, runtime=runtime, reporter=own, stop_signals=stop_signals)
        for note in notes:
            own.info(f"note: {note}")
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
            if runtime.is_main and (trainer.requested[0] or stop_signals.signal) != signal.SIGTERM:
                restarts.record_stop()
            raise
        finally:
            lock.release()
            own.close()


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
