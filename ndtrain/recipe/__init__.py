"""Read a TOML recipe into frozen, validated sections; everything wrong raises `RecipeError`. Imports no torch.

`schema`, with `data` and `mesh`, declares the sections and their keys, `rules` refuses contradictions and what is not
supported yet, `aliases` accepts other tools' spellings, and `reader` turns a file and `--set` arguments into a
`Recipe`, or into an error that names the key, the value, the rule and the line.
"""

from ndtrain.recipe.data import OF_SOURCE, SHARED, DataSection, EvalSection, SourceSection
from ndtrain.recipe.reader import json_schema, load_recipe, to_toml
from ndtrain.recipe.schema import (
    CheckpointSection,
    CpSection,
    EpSection,
    FsdpSection,
    LoadSection,
    LogSection,
    MeshSection,
    ModelSection,
    OptimGroup,
    OptimSection,
    Recipe,
    Recompute,
    RunSection,
    ScheduleSection,
    TpSection,
    TrainSection,
)
from ndtrain.recipe.sections import of_held_out, of_source, sections

__all__ = [
    "OF_SOURCE",
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
    "OptimGroup",
    "OptimSection",
    "Recipe",
    "Recompute",
    "RunSection",
    "ScheduleSection",
    "SourceSection",
    "TpSection",
    "TrainSection",
    "json_schema",
    "load_recipe",
    "of_held_out",
    "of_source",
    "sections",
    "to_toml",
]
