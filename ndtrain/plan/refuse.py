"""Refusals that concern the whole model, and notes on what a user should know."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from torch import nn

from ndtrain import router
from ndtrain.errors import PlanError
from ndtrain.mesh import MeshSizes
from ndtrain.plan.units import embeddings
from ndtrain.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MIXING = re.compile(
    r"(?i:lightning|mamba|recurrent|linear_?attn|linear_?attention|delta|rwkv|shortconv|retention)|SSM|(?<![a-z])Ssm"
)


def check(model: PreTrainedModel, sizes: MeshSizes, recipe: Recipe) -> None:
    what, config = model.config.model_type, model.config.get_text_config()
    if router.wanted(model):
        router.check(model)
    if getattr(model, "is_quantized", False) or getattr(model.config, "quantization_config", None):
        raise PlanError(f"{what} is quantized; ndtrain trains full-precision weights only")
    forward = inspect.signature(type(model).forward).parameters
    if "input_ids" not in forward:
        raise PlanError(f"{what} takes no input_ids; ndtrain trains text models only")
    if recipe.data.packing and (reason := _no_packing(model, forward)):
        raise PlanError(f"{what}: {reason}, so packed documents would see each other; set data.packing = false")
    if recipe.train.activation_checkpointing == "full" and not model.supports_gradient_checkpointing:
        raise PlanError(f'{what} cannot recompute its blocks; set train.activation_checkpointing = "none"')
    if sizes.cp > 1:
        _check_cp(model, sizes, forward)
    limit = getattr(config, "max_position_embeddings", None)
    learned = [m for m in model.modules() if isinstance(m, nn.Embedding) and m is not embeddings(model, "input")]
    # A sequence may be padded to a multiple of 2 cp.
    length = recipe.data.seq_len + (-recipe.data.seq_len % (2 * sizes.cp) if sizes.cp > 1 else 0)
    if limit and length > limit and any(m.num_embeddings <= limit + 8 for m in learned):
        raise PlanError(f"data.seq_len = {recipe.data.seq_len} exceeds the {limit} learned positions of {what}")


def _check_cp(model: PreTrainedModel, sizes: MeshSizes, forward: Mapping[str, object]) -> None:
    """Refuse what is known not to work on parts of sequences; `Trainer` proves the rest on the model itself."""
    what = model.config.model_type
    if mixing := _mixing(model):
        raise PlanError(f"{what} under mesh.cp = {sizes.cp}: {mixing}; set mesh.cp = 1")
    if "position_ids" not in forward:
        raise PlanError(f"{what} takes no position_ids, which mesh.cp = {sizes.cp} needs; set mesh.cp = 1")
    source = inspect.getsource(inspect.getmodule(type(model)))  # type: ignore[arg-type]
    if "ALL_ATTENTION_FUNCTIONS" not in source:
        raise PlanError(
            f"{what} does not take its attention from transformers' AttentionInterface, which mesh.cp = {sizes.cp} "
            "needs; set mesh.cp = 1"
        )


def dropouts(model: PreTrainedModel) -> dict[str, float]:
    """The config's rates of dropout and jitter above 0."""
    rates = {}
    for key, value in model.config.get_text_config().to_dict().items():
        # summary_* and classifier_* belong to other heads than the causal LM's
        named = ("drop" in key or "jitter" in key) and not key.startswith(("summary", "classifier"))
        if named and isinstance(value, float) and value > 0:
            rates[key] = value
    return rates


def notes(model: PreTrainedModel, recipe: Recipe) -> Iterator[str]:
    """What a user should know before paying for the run."""
    if found := dropouts(model):
        rates = ", ".join(f"{key} = {value}" for key, value in found.items())
        yield f"dropout ({rates}) draws other random numbers on another mesh or micro_batch_size"
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(limit, int) and recipe.data.seq_len > limit:
        yield f"data.seq_len = {recipe.data.seq_len} is beyond the model's max_position_embeddings = {limit}"


def check_dropout(model: PreTrainedModel) -> None:
    """Under tp every rank would drop other elements of what should be one replicated activation."""
    for key, value in dropouts(model).items():
        raise PlanError(
            f"{model.config.model_type} has {key} = {value}: dropout under mesh.tp > 1 is not supported yet; "
            f"set model.config.{key} = 0.0 or mesh.tp = 1"
        )


def check_router(model: PreTrainedModel, summed: tuple[str, ...]) -> None:
    """Refuse routers whose gradients are summed over tp: every rank has that of the auxiliary loss whole."""
    if not router.wanted(model):
        return
    for name in router.router_names(model):
        if part := next((fqn for fqn in summed if fqn.startswith(f"{name}.")), None):
            raise PlanError(
                f"{model.config.model_type} sums the gradients of {part} over tp, which would count its auxiliary loss "
                "on every tp rank; set mesh.tp = 1 or model.config.output_router_logits = false"
            )


def _mixing(model: PreTrainedModel) -> str | None:
    """The module that mixes tokens other than by attention, as a sentence, or None."""
    for module in model.modules():
        if isinstance(module, nn.Conv1d) or _MIXING.search(type(module).__name__):
            return f"{type(module).__name__} mixes along the sequence without a mask"
    return None


def _no_packing(model: PreTrainedModel, forward: Mapping[str, object]) -> str | None:
    """Why packed documents are not kept apart by this model's attention, or None if they are."""
    if mixing := _mixing(model):
        return mixing
    if "position_ids" not in forward:
        return "it takes no position_ids"
    source = inspect.getsource(inspect.getmodule(type(model)))  # type: ignore[arg-type]
    if "create_causal_mask" not in source and "create_masks_for_generate" not in source:
        return "it does not build its mask from position_ids"
    if "position_ids_from_input_ids" in source or re.search(r"attention_mask = torch\.ones", source):
        return "it replaces the mask or the positions that tell documents apart"
    return None
