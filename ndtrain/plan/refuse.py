"""Refuse models that cannot be trained correctly, and write notes for the user."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from torch import nn

from ndtrain.errors import PlanError
from ndtrain.hf import routers
from ndtrain.hf.attention import uses_interface
from ndtrain.hf.compat import GradientCheckpointingLayer
from ndtrain.hf.positions import position_embeddings, positions_from_ids, takes_positions, varying_frequencies
from ndtrain.mesh import MeshSizes
from ndtrain.plan.units import embeddings
from ndtrain.recipe import Recipe, Recompute

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MIXING = re.compile(
    r"(?i:lightning|mamba|recurrent|linear_?attn|linear_?attention|delta|rwkv|shortconv|retention)|SSM|(?<![a-z])Ssm"
)


def check(model: PreTrainedModel, sizes: MeshSizes, recipe: Recipe) -> None:
    """Raise `PlanError` if `model` cannot be trained correctly by this recipe on a mesh of `sizes`."""
    what = model.config.model_type
    if routers.wanted(model):
        routers.check(model)
    if getattr(model, "is_quantized", False) or getattr(model.config, "quantization_config", None):
        raise PlanError(f"{what} is quantized; ndtrain trains full-precision weights only")
    forward = inspect.signature(type(model).forward).parameters
    if "input_ids" not in forward:
        raise PlanError(f"{what} takes no input_ids; ndtrain trains text models only")
    if recipe.data.packing and (reason := _no_packing(model, forward)):
        raise PlanError(f"{what}: {reason}, so packed documents would see each other; set data.packing = false")
    _check_recomputation(model, recipe)
    if sizes.cp > 1:
        _check_cp(model, sizes)
    lengths = {"data.seq_len": recipe.data.seq_len}
    if recipe.eval is not None:
        lengths["eval.seq_len"] = recipe.eval.seq_len
        _check_held_out(model, recipe.eval.seq_len, recipe.data.seq_len)
    counted, before = _positions(model)
    learned = [m for m in model.modules() if isinstance(m, nn.Embedding) and m is not embeddings(model, "input")]
    for key, own in lengths.items():
        # A sequence may be padded to a multiple of 2 cp.
        length = own + (-own % (2 * sizes.cp) if sizes.cp > 1 else 0)
        if counted and length > counted - before and any(m.num_embeddings <= counted + 8 for m in learned):
            limit = counted - before
            padded = f" (padded to {length} for mesh.cp = {sizes.cp})" if length != own else ""
            raise PlanError(f"{key} = {own}{padded} exceeds the {limit} learned positions of {what}; shorten it")


def _check_recomputation(model: PreTrainedModel, recipe: Recipe) -> None:
    """Refuse recomputation that the classes of the model do not have."""
    what, wanted = model.config.model_type, recipe.train.activation_checkpointing
    if wanted == "none" or recipe.train.memory_budget is not None:
        return  # what the compiler recomputes is its own
    if not model.supports_gradient_checkpointing:
        raise PlanError(f'{what} does not support recomputing its blocks; set train.activation_checkpointing = "none"')
    one_by_one = any(isinstance(module, GradientCheckpointingLayer) for module in model.modules())
    if isinstance(wanted, Recompute) and not one_by_one:
        raise PlanError(f'{what} recomputes all its blocks or none; set train.activation_checkpointing = "full"')


def _check_held_out(model: PreTrainedModel, length: int, trained: int) -> None:
    """Refuse held-out sequences of another length where a model's frequencies depend on it: they are set once."""
    if length != trained and (kinds := {kind for *_, kind in varying_frequencies(model)}):
        raise PlanError(
            f"{model.config.model_type}: its {', '.join(sorted(kinds))} position embedding uses the frequencies of "
            f"data.seq_len = {trained} tokens, which are wrong for eval.seq_len = {length}; make them equal"
        )


def _check_cp(model: PreTrainedModel, sizes: MeshSizes) -> None:
    """Refuse models known not to work on parts of sequences; `proof` tests the others by running them."""
    what = model.config.model_type
    if mixing := _mixing(model):
        raise PlanError(f"{what} under mesh.cp = {sizes.cp}: {mixing}; set mesh.cp = 1")
    if not takes_positions(model) and not position_embeddings(model):
        raise PlanError(f"{what} takes no position_ids, which mesh.cp = {sizes.cp} needs; set mesh.cp = 1")
    if not any(uses_interface(module) for module in _text_modules(_text_model(model))):
        raise PlanError(
            f"{what} does not take its attention from transformers' AttentionInterface, which mesh.cp = {sizes.cp} "
            "needs; set mesh.cp = 1"
        )


def _positions(model: PreTrainedModel) -> tuple[int | None, int]:
    """Return the number of positions in the config, and how many of them (up to the padding id) no token can have."""
    config = model.config.get_text_config()
    keys = ("max_position_embeddings", "max_target_positions")
    counted = next((n for key in keys if isinstance(n := getattr(config, key, None), int)), None)
    return counted, config.pad_token_id + 1 if positions_from_ids(model) is not None else 0


def dropouts(model: PreTrainedModel) -> dict[str, float]:
    """Return {config key: rate} of dropout and jitter above 0."""
    rates = {}
    for key, value in model.config.get_text_config().to_dict().items():
        # summary_* and classifier_* belong to heads other than the causal LM's.
        named = ("drop" in key or "jitter" in key) and not key.startswith(("summary", "classifier"))
        if named and isinstance(value, float) and value > 0:
            rates[key] = value
    return rates


def notes(model: PreTrainedModel, sizes: MeshSizes, recipe: Recipe) -> Iterator[str]:
    """Yield what a user should know before starting the run."""
    given = {"tp": ("plan", recipe.tp.plan), "ep": ("plan", recipe.ep.plan), "cp": ("kind", recipe.cp.kind != "auto")}
    for axis, (key, is_set) in given.items():
        if is_set and getattr(sizes, axis) == 1:
            yield f"{axis}.{key} has no effect: mesh.{axis} = 1"
    if found := dropouts(model):
        rates = ", ".join(f"{key} = {value}" for key, value in found.items())
        yield f"dropout ({rates}) draws different random numbers on another mesh or with another micro_batch_size"
    if recipe.data.packing and (kinds := {kind for *_, kind in varying_frequencies(model)}):
        yield (
            f"its {', '.join(sorted(kinds))} position embedding uses the frequencies of data.seq_len = "
            f"{recipe.data.seq_len} tokens for every document, also for shorter ones"
        )
    limit, _ = _positions(model)
    if limit is not None and recipe.data.seq_len > limit:
        yield f"data.seq_len = {recipe.data.seq_len} exceeds the model's max_position_embeddings = {limit}"
    if limit is not None and recipe.eval is not None and recipe.eval.seq_len > max(limit, recipe.data.seq_len):
        yield f"eval.seq_len = {recipe.eval.seq_len} exceeds the model's max_position_embeddings = {limit}"


def check_dropout(model: PreTrainedModel) -> None:
    """Refuse jitter under tp; `proof` finds out by running the model where it applies dropout."""
    for key, value in dropouts(model).items():
        if "jitter" in key:
            raise PlanError(
                f"{model.config.model_type} has {key} = {value}: jitter under mesh.tp > 1 is not supported; "
                f"set model.config.{key} = 0.0 or mesh.tp = 1"
            )


def check_router(model: PreTrainedModel, summed: tuple[str, ...]) -> None:
    """Refuse routers whose gradients are summed over tp: each rank has the full gradient of the auxiliary loss."""
    if not routers.wanted(model):
        return
    for name in routers.router_names(model):
        if part := next((fqn for fqn in summed if fqn.startswith(f"{name}.")), None):
            raise PlanError(
                f"{model.config.model_type} sums the gradients of {part} over tp, which would count its auxiliary loss "
                "once per tp rank; set mesh.tp = 1 or model.config.output_router_logits = false"
            )


def _mixing(model: PreTrainedModel) -> str | None:
    """Return what mixes tokens other than attention, as a clause for a message, or None."""
    from transformers import PreTrainedModel

    text = _text_model(model)
    inner = [type(m).__name__ for m in _text_modules(text) if isinstance(m, PreTrainedModel) and m is not text]
    if len(inner) > 1:
        return f"{', '.join(inner)} work on sequences of their own, not on the tokens"
    for module in _text_modules(text):
        if isinstance(module, nn.Conv1d) or _MIXING.search(type(module).__name__):
            return f"{type(module).__name__} mixes along the sequence without a mask"
    return None


def _text_model(model: PreTrainedModel) -> nn.Module:
    from transformers import PreTrainedModel

    decoder = model.get_decoder()
    # Some models call their head a decoder.
    return decoder if isinstance(decoder, PreTrainedModel) else model.base_model


def _text_modules(module: nn.Module) -> Iterator[nn.Module]:
    """Yield `module` and the modules in it, except towers for images and sound, which are models of their own."""
    from transformers import PreTrainedModel

    yield module
    for child in module.children():
        if not isinstance(child, PreTrainedModel) or "text" in child.input_modalities:
            yield from _text_modules(child)


def _no_packing(model: PreTrainedModel, forward: Mapping[str, object]) -> str | None:
    """Return why this model's attention does not separate packed documents; None if it does."""
    if mixing := _mixing(model):
        return mixing
    if "position_ids" not in forward:
        return "it takes no position_ids"
    source = inspect.getsource(inspect.getmodule(type(model)))  # type: ignore[arg-type]
    if "create_causal_mask" not in source and "create_masks_for_generate" not in source:
        return "it does not build its mask from position_ids"
    if "position_ids_from_input_ids" in source or re.search(r"attention_mask = torch\.ones", source):
        return "it replaces the mask or the positions that separate documents"
    return None
