"""The wiring of a run: recipe, plan, process group, `Trainer`."""

from __future__ import annotations

import signal

from ndtrain.errors import RecipeError, Stopped
from ndtrain.hf.model import meta_model
from ndtrain.mesh import MeshSizes
from ndtrain.plan import make_plan
from ndtrain.recipe import Recipe
from ndtrain.runs.messages import broadcast_json, together
from ndtrain.runs.process import env_world_size, start
from ndtrain.runs.restarts import Restarts
from ndtrain.runs.stop_signals import StopSignals, nothing_to_save
from ndtrain.runs.watch import lost_peer
from ndtrain.train.inputs import cache_root
from ndtrain.train.report import Reporter, Silent
from ndtrain.train.source import with_checkpoint
from ndtrain.train.trainer import Trainer

__all__ = ["Reporter", "Silent", "Trainer", "cache_root", "run", "sizes_for", "with_checkpoint"]


def run(recipe: Recipe, reporter: Reporter, stop_signals: StopSignals) -> None:
    """Train as `recipe` says, on the ranks that torchrun started (or on one). Raises `NdtrainError`s.

    `stop_signals` is what the process is asked meanwhile; it listens already.
    """
    recipe, notes = with_checkpoint(recipe)
    sizes = sizes_for(recipe, env_world_size() or 1)
    model = meta_model(recipe)
    plan = make_plan(model, sizes, recipe)
    with start() as runtime:
        own = reporter if runtime.is_main else Silent()
        trainer = Trainer(recipe, plan, model, runtime=runtime, reporter=own, stop_signals=stop_signals)
        for note in notes:
            own.info(f"note: {note}")
        first: int | None = None
        try:
            _same_everywhere(recipe)
            trainer.prepare()
            first = trainer.step
            trainer.watch.start()
            trainer.train()
        except Stopped:
            # By SIGTERM torchrun ends workers that it means to start again; asked to end itself, it does not.
            if runtime.is_main and (trainer.asked[0] or stop_signals.signal) != signal.SIGTERM:
                Restarts.of_process(trainer.run_dir).stopped()
            raise
        except RuntimeError as error:
            # Another rank took the signal while this one waited for it.
            if stop_signals.signal and first in (None, trainer.step):
                raise nothing_to_save(stop_signals.signal) from error
            if trainer.watch.on and lost_peer(error):
                own.close()
                trainer.watch.end(f"a collective failed ({' '.join(str(error).split())[:200]})")
            raise
        finally:
            trainer.watch.stop()
            own.close()


def _same_everywhere(recipe: Recipe) -> None:
    """Refuse ranks that found different checkpoints of a run that is still going on."""
    taken = broadcast_json(recipe.model.name)

    def check() -> None:
        if recipe.model.name != taken:
            raise RecipeError(
                f"model.name is {recipe.model.name} on one rank and {taken} on another; name one step's directory"
            )

    together(check)


def sizes_for(recipe: Recipe, world_size: int) -> MeshSizes:
    mesh = recipe.mesh
    return MeshSizes.resolve(
        world_size, dp_replicate=mesh.dp_replicate, dp_shard=mesh.dp_shard, cp=mesh.cp, tp=mesh.tp, ep=mesh.ep
    )
