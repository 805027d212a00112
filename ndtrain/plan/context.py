"""Choose the kind of context parallelism that a model and a mesh allow and that sends fewer bytes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ndtrain.errors import PlanError
from ndtrain.hf.attention import chooses_keys
from ndtrain.mesh import MeshSizes
from ndtrain.plan.refuse import dropouts
from ndtrain.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def choose(model: PreTrainedModel, sizes: MeshSizes, recipe: Recipe) -> tuple[str, str | None]:
    """Return the kind for cp > 1, and for `cp.kind = "auto"` a note with the reason.

    Raises `PlanError` if the recipe's kind, or every kind, is impossible.
    """
    kind = recipe.cp.kind
    no_ulysses, no_ring = _no_ulysses(model, sizes), _no_ring(model)
    if no_ulysses and no_ring:
        raise PlanError(f"{no_ulysses}, and {no_ring}; set mesh.cp = 1")
    if kind == "ulysses" and no_ulysses:
        raise PlanError(f'{no_ulysses}; set cp.kind = "ring"')
    if kind == "ring" and no_ring:
        raise PlanError(f'{no_ring}; set cp.kind = "ulysses"')
    if kind != "auto":
        return kind, None
    if no_ulysses:
        return "ring", f"cp.kind = ring: {no_ulysses}"
    if no_ring:
        return "ulysses", f"cp.kind = ulysses: {no_ring}"
    moved = numbers_moved(model, sizes, gradient_size=1 if recipe.fsdp.param_dtype == "float32" else 2)
    if moved is None:
        return "ulysses", "cp.kind = ulysses: the model's config does not say how many heads it has"
    chosen = "ring" if moved["ring"] < moved["ulysses"] else "ulysses"
    other = "ulysses" if chosen == "ring" else "ring"
    share = moved[chosen] / moved[other]
    return chosen, f"cp.kind = {chosen}: attention sends {share:.2f} x the bytes that it would with {other}"


def numbers_moved(model: PreTrainedModel, sizes: MeshSizes, *, gradient_size: int) -> dict[str, float] | None:
    """Return {kind: what a rank sends per local token and layer, forward and backward, in units of one head}.

    `gradient_size` is the size of the float32 gradients of keys and values, which travel around the ring, relative to
    the compute dtype's. Returns None if the config does not give the number of heads.
    """
    config, cp = model.config.get_text_config(), sizes.cp
    heads = max(_counts(config, "num_attention_heads"), default=0)
    if not heads:
        return None
    keys = max(_counts(config, "num_key_value_heads"), default=heads)
    if getattr(config, "kv_lora_rank", None):
        keys = heads  # latent attention expands its keys before it attends
    heads, keys = max(1, heads // sizes.tp), max(1, keys // sizes.tp)
    held = keys * (cp // math.gcd(keys, cp))
    return {
        "ulysses": 2 * (cp - 1) / cp * (2 * heads + 2 * held),
        "ring": 2 * keys * (2 * (cp - 1) + gradient_size * cp),
    }


def _no_ulysses(model: PreTrainedModel, sizes: MeshSizes) -> str | None:
    for count in _counts(model.config.get_text_config(), "num_attention_heads"):
        if count % (sizes.tp * sizes.cp):
            return (
                f"ulysses needs whole heads on each rank, but mesh.cp = {sizes.cp} x tp = {sizes.tp} does not divide "
                f"the {count} attention heads of {model.config.model_type}"
            )
    return None


def on_whole_sequences(model: PreTrainedModel) -> str | None:
    """Return the class name of attention that selects its keys itself, so needs whole sequences; None without any."""
    return next((type(m).__name__ for m in model.modules() if chooses_keys(m)), None)


def _no_ring(model: PreTrainedModel) -> str | None:
    if choosing := on_whole_sequences(model):
        return f"ring cannot compute {choosing}, which selects the keys of each query itself"
    for key, rate in dropouts(model).items():
        if "att" in key:
            return (
                f"ring does not support dropout of attention weights, but {model.config.model_type} has {key} = {rate}"
            )
    return None


def _counts(config: Any, key: str) -> list[int]:
    """Return the integers of a config entry: one, one per layer, or none."""
    found = getattr(config, key, None)
    return [n for n in (found if isinstance(found, list | tuple) else [found]) if isinstance(n, int)]
