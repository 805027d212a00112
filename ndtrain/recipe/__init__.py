"""Read a TOML recipe into frozen, validated sections; everything wrong raises `RecipeError`. Imports no torch.

`schema` declares the sections and their keys, `rules` refuses contradictions and what is not supported yet, `aliases`
accepts other tools' spellings, and `reader` turns a file and `--set` arguments into a `Recipe`, or into an error that
names the key, the value, the rule and the line.
"""

from ndtrain.recipe.reader import json_schema, load_recipe, to_toml
from ndtrain.recipe.schema import (
    SHARED,
    CheckpointSection,
    CpSection,
    DataSection,
    EpSection,
    EvalSection,
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
from ndtrain.recipe.sections import of_held_out, sections

__all__ = [
    "SHARED",
    "CheckpointSection",
    "CpSection",
    "DataSection",
    "EpSection",
    "EvalSection",
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
    "of_held_out",
    "sections",
    "to_toml",
]
