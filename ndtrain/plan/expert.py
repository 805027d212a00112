"""Check the model's own expert-parallel plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ndtrain.errors import PlanError
from ndtrain.hf.compat import expanded_plan
from ndtrain.mesh import MeshSizes
from ndtrain.plan.override import overridden

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MODULE, PARAM = "ep_dispatch_experts", "grouped_gemm"


def rules(model: PreTrainedModel, sizes: MeshSizes, *, overrides: Mapping[str, str]) -> dict[str, str]:
    """Return {FQN: style} of expert parameters and of the modules that dispatch tokens to them.

    `overrides` (FQN pattern to style) replace styles of the model's own plan. Raises `PlanError` if the plan is
    missing, unsupported or incomplete, or if ep does not divide the experts.
    """
    what = model.config.model_type
    own: dict[str, str] = expanded_plan(model, dict(getattr(model, "ep_plan", None) or {}))
    found = overridden(model, own, overrides, key="ep.plan", styles=(MODULE, PARAM))
    modules = [name for name, style in found.items() if style == MODULE]
    if not modules:
        raise PlanError(f"{what} declares no experts to spread over mesh.ep = {sizes.ep}; set mesh.ep = 1")
    if unknown := sorted(set(found.values()) - {MODULE, PARAM}):
        raise PlanError(
            f"{what} under mesh.ep = {sizes.ep}: style {unknown[0]} of its plan is not supported; set mesh.ep = 1"
        )
    for name in modules:
        for param_name, param in model.get_submodule(name).named_parameters():
            fqn = f"{name}.{param_name}"
            if found.get(fqn) != PARAM:
                raise PlanError(f"{what}: {fqn} has no style in the expert-parallel plan; set mesh.ep = 1")
            if param.shape[0] % sizes.ep:
                raise PlanError(
                    f"mesh.ep = {sizes.ep} does not divide the {param.shape[0]} experts of {what} ({name}); "
                    f"ep may be a divisor of {param.shape[0]}"
                )
    return found
