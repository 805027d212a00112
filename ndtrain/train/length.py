"""How long a run is: `train.steps`, or as many steps as `train.epochs` passes over the data take."""

from __future__ import annotations

from ndtrain.errors import RecipeError
from ndtrain.recipe import Recipe
from ndtrain.recipe.rules import of_schedule


def with_steps(recipe: Recipe, *, samples: int, step: int, cursor: int) -> Recipe:
    """Return the recipe with the number of steps, for a run on `samples` samples that is at `step` and `cursor`.

    Epochs end where the cursor has passed so many samples, also if the size of the global batch changed on the way.
    Raises `RecipeError` if the schedule does not fit into the steps.
    """
    epochs = recipe.train.epochs
    if epochs is None:
        return recipe
    left = max(0, epochs * samples - cursor)
    steps = step + -(-left // recipe.train.global_batch_size)
    resolved = recipe.with_steps(max(1, steps))
    if left and (problems := [sentence for _, sentence in of_schedule(resolved)]):
        raise RecipeError("\n".join(f"with train.epochs = {epochs}: {sentence}" for sentence in problems))
    return resolved
