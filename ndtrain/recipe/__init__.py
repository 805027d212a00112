"""TOML (tomli) to frozen, validated sections; everything wrong raises `RecipeError`. Imports no torch.

`schema` says what a recipe may hold, `rules` what its keys may not say together or not yet, `aliases` how
the peers spell the same keys, and `reader` turns a file and `--set` arguments into a `Recipe`, or into an
error that names the key, the value, the rule and the line.
"""

from ndtrain.recipe.reader import json_schema, load_recipe, to_toml
from ndtrain.recipe.schema import (
    CheckpointSection,
    CpSection,
    DataSection,
    EpSection,
    FsdpSection,
    LoadSection,
    LogSection,
    MeshSection,
    ModelSection,
    OptimSection,
    Recipe,
    RunSection,
    ScheduleSection,
    TpSection,
    TrainSection,
)

__all__ = [
    "CheckpointSection",
    "CpSection",
    "DataSection",
    "EpSection",
    "FsdpSection",
    "LoadSection",
    "LogSection",
    "MeshSection",
    "ModelSection",
    "OptimSection",
    "Recipe",
    "RunSection",
    "ScheduleSection",
    "TpSection",
    "TrainSection",
    "json_schema",
    "load_recipe",
    "to_toml",
]
