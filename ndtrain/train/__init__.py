"""The wiring of a run: recipe, plan, process group, `Trainer`."""

from __future__ import annotations

from ndtrain import runtime as runtime_module
from ndtrain.mesh import MeshSizes
from ndtrain.model import meta_model
from ndtrain.plan import make_plan
from ndtrain.recipe import Recipe
from ndtrain.requests import Requests, nothing_to_save
from ndtrain.train.report import Reporter, Silent
from ndtrain.train.trainer import Trainer, cache_root

__all__ = ["Reporter", "Silent", "Trainer", "cache_root", "run", "sizes_for"]


def run(recipe: Recipe, reporter: Reporter, requests: Requests) -> None:
    """Train as `recipe` says, on the ranks that torchrun started (or on one). Raises `NdtrainError`s.

    `requests` is what the process is asked meanwhile; it listens already.
    """
    sizes = sizes_for(recipe, runtime_module.env_world_size() or 1)
    model = meta_model(recipe)
    plan = make_plan(model, sizes, recipe)
    with runtime_module.start() as runtime:
        own = reporter if runtime.is_main else Silent()
        trainer = Trainer(recipe, plan, model, runtime=runtime, reporter=own, requests=requests)
        first: int | None = None
        try:
            trainer.prepare()
            first = trainer.step
            trainer.train()
        except RuntimeError as error:
            # Another rank took the signal while this one waited for it.
            if requests.signal and first in (None, trainer.step):
                raise nothing_to_save(requests.signal) from error
            raise
        finally:
            trainer.reporter.close()


def sizes_for(recipe: Recipe, world_size: int) -> MeshSizes:
    mesh = recipe.mesh
    return MeshSizes.resolve(
        world_size, dp_replicate=mesh.dp_replicate, dp_shard=mesh.dp_shard, cp=mesh.cp, tp=mesh.tp, ep=mesh.ep
    )
