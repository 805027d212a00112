"""How long a run is, `train.steps` or `train.epochs` passes over the data, and what its global batch is made of."""

from __future__ import annotations

from ndtrain.data import GlobalBatches, MixedOrder, Order
from ndtrain.data.windows import WindowOrder, Windows
from ndtrain.errors import RecipeError, counted
from ndtrain.plan import Plan
from ndtrain.recipe import Recipe
from ndtrain.recipe.rules import of_schedule
from ndtrain.runs.process import Runtime


def with_steps(recipe: Recipe, order: Order | MixedOrder | WindowOrder, *, step: int, cursor: int) -> Recipe:
    """Return the recipe with the number of steps, for a run on samples in `order` that is at `step` and `cursor`.

    Epochs end where the cursor has passed their samples, also if the size of the global batch changed on the way.
    Raises `RecipeError` if the schedule does not fit into the steps.
    """
    epochs, most = recipe.train.epochs, recipe.train.steps
    if epochs is None and recipe.data.stop == "never":
        return recipe
    left = max(0, order.end(epochs or 1) - cursor)
    steps = step + -(-left // recipe.train.global_batch_size)
    if most is not None and steps >= most:
        return recipe.with_steps(most)
    resolved = recipe.with_steps(max(1, steps))
    if left and (problems := [sentence for _, sentence in of_schedule(resolved)]):
        why = f"train.epochs = {epochs}" if epochs else f'data.stop = "{recipe.data.stop}"'
        raise RecipeError("\n".join(f"with {why}: {sentence}" for sentence in problems))
    return resolved


def arithmetic(recipe: Recipe, plan: Plan, runtime: Runtime, batches: GlobalBatches, *, steps: int) -> str:
    """Describe the model, the mesh and how the global batch is made up."""
    train, sizes = recipe.train, plan.sizes
    ranks, micro, rows = sizes.batch, batches.micro_steps, batches.micro_batch_size
    empty = ranks * micro * rows - train.global_batch_size
    line = (
        f"{plan.model_type}, {plan.numel:,} parameters on {sizes.describe()} "
        f"({runtime.world_size} x {runtime.device.type}); global batch: "
        f"{counted(train.global_batch_size, 'sequence')} x {recipe.data.seq_len:,} tokens = "
        f"{counted(ranks, 'batch rank')} x {counted(micro, 'micro batch')} x {counted(rows, 'sequence')}"
    )
    if empty:
        line += f", {empty} of them empty"
    if rows < train.micro_batch_size:
        line += f" (train.micro_batch_size = {train.micro_batch_size} is cut to a batch rank's share)"
    if isinstance(batches.samples, Windows):
        line += f"; {counted(len(batches.samples.current), 'sample')} in its first window"
    else:
        line += f"; {counted(len(batches.samples), 'sample')}"
    if train.epochs is not None:
        line += f"; {counted(train.epochs, 'epoch')}: {counted(steps, 'step')}"
    elif train.steps != steps:
        line += f'; data.stop = "{recipe.data.stop}": {counted(steps, "step")}'
    return line
