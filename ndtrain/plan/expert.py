"""Expert parallelism: the model's own plan, checked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ndtrain.errors import PlanError
from ndtrain.mesh import MeshSizes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MODULE, PARAM = "ep_dispatch_experts", "grouped_gemm"


def rules(model: PreTrainedModel, sizes: MeshSizes) -> dict[str, str]:
    """The model's own EP plan: expert parameters, then the modules that send tokens to them."""
    what = model.config.model_type
    found: dict[str, str] = model._expand_parallel_plan(dict(getattr(model, "ep_plan", None) or {}))
    modules = [name for name, style in found.items() if style == MODULE]
    if not modules:
        raise PlanError(f"{what} declares no experts to spread over mesh.ep = {sizes.ep}; set mesh.ep = 1")
    if unknown := sorted(set(found.values()) - {MODULE, PARAM}):
        raise PlanError(
            f"{what} under mesh.ep = {sizes.ep}: its plan has style {unknown[0]}, not supported; set mesh.ep = 1"
        )
    for name in modules:
        for param_name, param in model.get_submodule(name).named_parameters():
            fqn = f"{name}.{param_name}"
            if found.get(fqn) != PARAM:
                raise PlanError(f"{what}: {fqn} has no expert-parallel rule; set mesh.ep = 1")
            if param.shape[0] % sizes.ep:
                raise PlanError(
                    f"mesh.ep = {sizes.ep} does not divide the {param.shape[0]} experts of {what} ({name}); "
                    f"ep may be a divisor of {param.shape[0]}"
                )
    return found
