"""Build models on the meta device (shapes and names, no memory), and answer questions about their weights."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode

from ndtrain.errors import RecipeError, first_line, keeps_its_name
from ndtrain.hf.at_fault import overrides_at_fault, unknown_choice
from ndtrain.hf.compat import float32_patterns, is_causal_lm
from ndtrain.hf.config import load_config, own_code, untrusted
from ndtrain.recipe import Recipe
from ndtrain.torch_compat import device_constructors

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def meta_model(recipe: Recipe, config: PreTrainedConfig | None = None) -> PreTrainedModel:
    """Return the causal LM on the meta device in its master dtype (float32).

    `model.export_config` is the config to publish with its weights, in the dtype to publish them in. Raises
    `RecipeError` for a config that is not of a causal LM or that the model's own code rejects.
    """
    config = config if config is not None else load_config(recipe)
    known = is_causal_lm(config)
    if not known and own_code(config, "AutoModelForCausalLM"):
        if not recipe.model.trust_remote_code:
            raise untrusted(f'model.name = "{recipe.model.name}"', config.name_or_path)
    elif not known:
        raise RecipeError(
            f'transformers has no causal language model of model type "{config.model_type}"; choose another model'
        )
    export_dtype = getattr(config, "dtype", None) or torch.float32
    try:
        with torch.device("meta"):
            model = _with_attention(config, recipe)
    except Exception as error:
        if keeps_its_name(error):
            raise
        if "attention implementation" in str(error) or "attn_implementation" in str(error):
            reason = first_line(error).split(". ")[0]
            raise RecipeError(
                f'model.attn = "{recipe.model.attn}" does not work for {config.model_type}: {reason}; '
                'set model.attn = "eager"'
            ) from error
        reason = unknown_choice(config, error) or first_line(error)
        wrong = " and ".join(overrides_at_fault(recipe, _can_be_built))
        raise RecipeError(f'{wrong and f"{wrong}: "}a "{config.model_type}" model cannot be built: {reason}') from error
    if not model.get_input_embeddings().weight.numel():  # type: ignore[union-attr,operator]
        raise RecipeError(
            f'a "{config.model_type}" model of this config has no weights, because a size in it is 0; '
            "change it in [model.config]"
        )
    model.export_config = copy.deepcopy(config)
    model.export_config.dtype = export_dtype
    model.export_config.architectures = [type(model).__name__]
    _settle_attention(model, recipe.data.seq_len)
    # Training never reuses keys and values.
    model.config.use_cache = False
    model.train()
    return model


def _with_attention(config: PreTrainedConfig, recipe: Recipe) -> Any:
    """Return the model of a config with the attention of `model.attn`; "auto" is sdpa, or eager without one."""
    trust = recipe.model.trust_remote_code
    if recipe.model.attn != "auto":
        return built(config, trust_remote_code=trust, attn_implementation=recipe.model.attn)
    try:
        return built(config, trust_remote_code=trust, attn_implementation="sdpa")
    except (ValueError, ImportError) as error:
        if "attention implementation" not in str(error) and "scaled_dot_product_attention" not in str(error):
            raise
        return built(config, trust_remote_code=trust, attn_implementation="eager")


def built(config: PreTrainedConfig, *, trust_remote_code: bool, **options: Any) -> Any:
    """Return the causal LM of a config in float32; it gets a copy, since building it writes into the config."""
    return transformers.AutoModelForCausalLM.from_config(
        copy.deepcopy(config), dtype=torch.float32, trust_remote_code=trust_remote_code, **options
    )


def _can_be_built(recipe: Recipe) -> bool:
    try:
        with torch.device("meta"):
            _with_attention(load_config(recipe), recipe)
    except Exception:  # as many kinds as there are models
        return False
    return True


def _settle_attention(model: PreTrainedModel, seq_len: int) -> None:
    """Choose BigBird's attention as its forward would for rows of `seq_len`, before its modules are cut and compared.

    Raises `RecipeError` for block-sparse attention, which lets a token see later ones (transformers 5.24).
    """
    base, config = model.base_model, model.config
    if getattr(base, "attention_type", None) != "block_sparse":
        return
    longest = (5 + 2 * config.num_random_blocks) * config.block_size
    if seq_len > longest:
        raise RecipeError(
            f"{config.model_type} uses block-sparse attention, which sees later tokens, for data.seq_len = {seq_len}; "
            f'set model.config.attention_type = "original_full", or data.seq_len to {longest} at most'
        )
    with torch.device("meta"):
        base.set_attention_type("original_full")  # type: ignore[operator]


def built_buffers(model: PreTrainedModel, names: Collection[str], recipe: Recipe) -> dict[str, torch.Tensor]:
    """Return the buffers of `names` with the values from construction, on the CPU, without large ones.

    Builds the model a second time, with large tensors on meta and small ones in memory.
    """
    with _SmallInMemory():
        config = cast("PreTrainedConfig", model.export_config)
        again = built(config, trust_remote_code=recipe.model.trust_remote_code)
    buffers = dict(again.named_buffers())
    return {name: buffers[name] for name in names if not buffers[name].is_meta}


class _SmallInMemory(TorchFunctionMode):
    """Makes factory functions put tensors of more than `MOST` elements on meta."""

    MOST = 1 << 16

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in device_constructors() and kwargs.get("device") is None:
            on_meta = func(*args, **{**kwargs, "device": "meta"})
            if on_meta.numel() > self.MOST:
                return on_meta
        return func(*args, **kwargs)


def vocabulary(model: PreTrainedModel) -> int:
    """Return the number of tokens that `model` embeds."""
    return int(model.get_input_embeddings().weight.shape[0])  # type: ignore[index,arg-type,union-attr]


def kept_in_fp32(model: PreTrainedModel, dtype: torch.dtype) -> re.Pattern[str] | None:
    """Return a pattern of the FQNs that stay in float32 when the model is used in `dtype`; None if there are none."""
    plan = float32_patterns(model, dtype)
    return re.compile("|".join(pattern.replace("*", r"\d+") for pattern in plan)) if plan else None


def tied_keys(model: nn.Module) -> dict[str, str]:
    """Return {FQN of each tied alias: FQN of the parameter it shares}."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def tie(model: PreTrainedModel) -> None:
    """Make tied parameters one object again after parameters were replaced."""
    for alias, source in tied_keys(model).items():
        module, _, name = alias.rpartition(".")
        setattr(model.get_submodule(module), name, model.get_parameter(source))
