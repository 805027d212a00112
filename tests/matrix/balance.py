"""How evenly the plan of every model type fills the ranks of every mesh of the matrix; on meta, without ranks.

    python -m tests.matrix.balance [TYPE ...]

Prints what is above the limit with the reason, and what cannot be built; exits 1 where a reason is missing.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import transformers

from ndtrain.errors import PlanError, RecipeError
from ndtrain.hf.model import meta_model
from ndtrain.mesh import MeshSizes
from ndtrain.plan import EVEN, Plan, make_plan
from ndtrain.recipe import load_recipe
from tests import tiny
from tests.matrix.__main__ import CONFIGS, MESHES

# The matrix runs on four ranks at most: more are needed for dims smaller than ranks.
LARGER = {
    "dp_shard16": {"dp_shard": 16},
    "dp_shard8-tp2": {"dp_shard": 8, "tp": 2},
    "ep2-efsdp8": {"dp_shard": 16, "ep": 2},
}


def plans(kind: str, config: dict[str, Any], folder: Path) -> dict[str, Plan]:
    """The plans of `kind` by mesh; refused meshes are left out. Raises `RecipeError` where there is no model."""
    for attn in ("sdpa", "eager"):
        path = tiny.recipe_file(
            folder / "recipe.toml",
            model={"type": kind, "attn": attn},
            corpus=folder,
            run_dir=folder / "run",
            data={"packing": False},
        )
        recipe = load_recipe(path)
        try:
            model = meta_model(recipe, transformers.AutoConfig.for_model(kind, **config))
            break
        except RecipeError:
            if attn == "eager":
                raise
    found = {}
    for name, mesh in {**{name: mesh for name, (mesh, _) in MESHES.items()}, **LARGER}.items():
        try:
            found[name] = make_plan(model, MeshSizes(**mesh), recipe)
        except PlanError:
            continue
    return found


def explained(plan: Plan) -> bool:
    """Whether the fullest rank is within the limit, or would be without the excess that the plan names."""
    named = sum(group.excess for group in plan.uneven())
    return plan.rank_numel(0) - named <= EVEN * plan.mean_numel * (1 + 1e-9) and all(g.dims for g in plan.uneven())


def main(kinds: list[str]) -> int:
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        for kind in kinds or sorted(CONFIGS):
            try:
                found = plans(kind, CONFIGS[kind], Path(folder))
            except RecipeError as error:
                print(f"{kind}: {error}")
                continue
            for name, plan in found.items():
                if plan.imbalance > EVEN:
                    print(f"{kind} {name}: {plan.imbalance:.2f} {plan.uneven()}")
                failures += not explained(plan)
    return min(1, failures)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
