"""Expert parallelism: each ep rank holds whole experts, and an all-to-all brings them the tokens.

The dispatch is transformers' own (`AllToAllEP`): the ranks of a tp group send disjoint slices of the batch they share,
so no token is computed twice. A rank that gets no token runs one empty row, so that its backward joins the others'
collectives.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ndtrain.hf.compat import apply_expert_parallelism as transformers_apply
from ndtrain.mesh import Meshes
from ndtrain.plan import Plan
from ndtrain.plan.expert import MODULE

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def apply_expert_parallelism(model: PreTrainedModel, plan: Plan, meshes: Meshes) -> None:
    """Split the experts of `model` (on meta) over the ep axis and put the dispatch around them, in place."""
    assert meshes.expert is not None
    transformers_apply(model, meshes.expert["ep"], meshes.tp, plan.ep_rules, ep_implementation="all_to_all")
    # Under tp its output is a view, which autograd does not let be changed in place: see `apply_tensor_parallelism`.
    for name, style in plan.ep_rules.items() if plan.sizes.tp > 1 else ():
        if style == MODULE:
            model.get_submodule(name).register_forward_hook(lambda module, args, output: output.clone())
