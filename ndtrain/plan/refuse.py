"""Refusals that concern the whole model, and notes on what a user should know."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

from torch import nn

from ndtrain import router
from ndtrain.attention import position_embeddings, positions_from_ids, takes_positions
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
    what = model.config.model_type
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
    # A sequence may be padded to a multiple of 2 cp.
    length = recipe.data.seq_len + (-recipe.data.seq_len % (2 * sizes.cp) if sizes.cp > 1 else 0)
    if sizes.cp > 1:
        _check_cp(model, sizes, length)
    counted, before = _positions(model)
    learned = [m for m in model.modules() if isinstance(m, nn.Embedding) and m is not embeddings(model, "input")]
    if counted and length > counted - before and any(m.num_embeddings <= counted + 8 for m in learned):
        limit = counted - before
        raise PlanError(f"data.seq_len = {recipe.data.seq_len} exceeds the {limit} learned positions of {what}")


def _check_cp(model: PreTrainedModel, sizes: MeshSizes, length: int) -> None:
    """Refuse what is known not to work on parts of sequences; `Trainer` proves the rest on the model itself."""
    what = model.config.model_type
    if mixing := _mixing(model):
        raise PlanError(f"{what} under mesh.cp = {sizes.cp}: {mixing}; set mesh.cp = 1")
    if rope := _rope_by_length(model, length):
        raise PlanError(
            f"{what} under mesh.cp = {sizes.cp}: its {rope} position embedding depends on the largest position that a "
            "rank sees; set mesh.cp = 1, or data.seq_len to what the model was made for"
        )
    if not takes_positions(model) and not position_embeddings(model):
        raise PlanError(f"{what} takes no position_ids, which mesh.cp = {sizes.cp} needs; set mesh.cp = 1")
    if not any("ALL_ATTENTION_FUNCTIONS" in source for source in _sources(model)):
        raise PlanError(
            f"{what} does not take its attention from transformers' AttentionInterface, which mesh.cp = {sizes.cp} "
            "needs; set mesh.cp = 1"
        )


def _rope_by_length(model: PreTrainedModel, length: int) -> str | None:
    """The kind of rotary embedding whose frequencies change within `length` tokens, or None."""
    config = model.config.get_text_config()
    given = getattr(config, "rope_parameters", None) or {}
    for rope in (given, *(value for value in given.values() if isinstance(value, dict))):
        kind = rope.get("rope_type")
        if kind in ("dynamic", "longrope"):
            limit = rope.get("original_max_position_embeddings") or getattr(config, "max_position_embeddings", 0) or 0
            if length > limit:
                return str(kind)
    return None


def _positions(model: PreTrainedModel) -> tuple[int | None, int]:
    """How many positions the config counts, and how many of them no token has: those up to the padding id, if any."""
    config = model.config.get_text_config()
    keys = ("max_position_embeddings", "max_target_positions")
    counted = next((n for key in keys if isinstance(n := getattr(config, key, None), int)), None)
    return counted, config.pad_token_id + 1 if positions_from_ids(model) is not None else 0


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
    limit, _ = _positions(model)
    if limit is not None and recipe.data.seq_len > limit:
        yield f"data.seq_len = {recipe.data.seq_len} is beyond the model's max_position_embeddings = {limit}"


def check_dropout(model: PreTrainedModel) -> None:
    """Refuse random numbers under tp other than dropout, whose place `Trainer` looks at in the model itself."""
    for key, value in dropouts(model).items():
        if "jitter" in key:
            raise PlanError(
                f"{model.config.model_type} has {key} = {value}: jitter under mesh.tp > 1 is not supported; "
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
    for module in _text_modules(_text_model(model)):
        if isinstance(module, nn.Conv1d) or _MIXING.search(type(module).__name__):
            return f"{type(module).__name__} mixes along the sequence without a mask"
    return None


def _text_model(model: PreTrainedModel) -> nn.Module:
    from transformers import PreTrainedModel

    decoder = model.get_decoder()
    # Some call their head a decoder.
    return decoder if isinstance(decoder, PreTrainedModel) else model.base_model


def _text_modules(module: nn.Module) -> Iterator[nn.Module]:
    """`module` and what is in it, without towers for images and sound, which are models of their own."""
    from transformers import PreTrainedModel

    yield module
    for child in module.children():
        if not isinstance(child, PreTrainedModel):
            yield from _text_modules(child)


def _sources(model: PreTrainedModel) -> Iterator[str]:
    """The code of the files that the modules of the text model are from."""
    for name in {type(module).__module__ for module in _text_modules(_text_model(model))}:
        with suppress(OSError, TypeError):
            yield inspect.getsource(sys.modules[name])


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
