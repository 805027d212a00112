"""The sharding plan: for every parameter its style, placements, FSDP unit and local shape, or a refusal.

A pure function: from a meta model, `MeshSizes` and a recipe, `make_plan` returns a `Plan` or raises `PlanError`.
`ndtrain.parallel` applies a plan and decides nothing; `inspect` prints it.
"""

from ndtrain.plan.make import make_plan
from ndtrain.plan.types import EVEN, ParamPlan, Plan, Recomputation, Uneven, Unit

__all__ = ["EVEN", "ParamPlan", "Plan", "Recomputation", "Uneven", "Unit", "make_plan"]
