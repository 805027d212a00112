"""The sharding plan: for every parameter its style, placements, FSDP unit and local shape, or a refusal.

Pure: a meta model, `MeshSizes` and a recipe come in, a `Plan` comes out or a `PlanError` is raised. `parallelize.py`
applies a plan and decides nothing; `inspect` prints it.
"""

from ndtrain.plan.make import make_plan
from ndtrain.plan.types import EVEN, ParamPlan, Plan, Uneven, Unit

__all__ = ["EVEN", "ParamPlan", "Plan", "Uneven", "Unit", "make_plan"]
