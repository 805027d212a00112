"""Every name of transformers that ndtrain uses beside its public classes, with what it is for.

The next release that moves one is one red test. `from ndtrain.hf.compat import sdpa_mask` looks the name up in `NAMES`
when it is asked for. The functions below reach private attributes of transformers' objects.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor, nn

from ndtrain.torch_compat import Private

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# Read in transformers 5.23 (the lowest that pyproject.toml allows) and 5.24.
_T, _MASKS, _WEIGHTS = "transformers", "transformers.masking_utils", "transformers.core_model_loading"
_TP, _EP = "transformers.distributed.tensor_parallel", "transformers.distributed.expert_parallel"
_TOKENS, _CAUSAL = f"{_T}:TokenizersBackend", "masks that need not be made"
_MODEL, _STYLE, _CONVERT, _DRY = f"{_T}:PreTrainedModel", "a style of tensor parallelism", "saved names", "a dry step"
NAMES: dict[str, Private] = {
    "ACT2FN": Private(f"{_T}.activations:ACT2FN", "the names that `hidden_act` may have"),
    # ---- attention and its masks
    "ALL_ATTENTION_FUNCTIONS": Private(f"{_T}.modeling_utils:ALL_ATTENTION_FUNCTIONS", "a model's own attention"),
    "ALL_MASK_ATTENTION_FUNCTIONS": Private(f"{_MASKS}:ALL_MASK_ATTENTION_FUNCTIONS", "a model's own masks"),
    "sdpa_mask": Private(
        f"{_MASKS}:sdpa_mask",
        "masks of ring segments",
        "batch_size q_length kv_length q_offset kv_offset mask_function attention_mask",
    ),
    "find_packed_sequence_indices": Private(
        f"{_MASKS}:find_packed_sequence_indices", "documents of whole sequences under cp", "position_ids"
    ),
    "remap_positions_for_packed_sequence": Private(
        f"{_MASKS}:remap_positions_for_packed_sequence",
        "documents of whole sequences under cp",
        "mask_function position_ids",
    ),
    "causal_mask_function": Private(f"{_MASKS}:causal_mask_function", _CAUSAL, "batch_idx head_idx q_idx kv_idx"),
    "sliding_window_causal_mask_function": Private(
        f"{_MASKS}:sliding_window_causal_mask_function", _CAUSAL, "sliding_window"
    ),
    "packed_sequence_mask_function": Private(
        f"{_MASKS}:packed_sequence_mask_function", _CAUSAL, "packed_sequence_mask"
    ),
    "and_masks": Private(f"{_MASKS}:and_masks", _CAUSAL, ""),
    "blockwise_overlay": Private(
        f"{_MASKS}:blockwise_overlay", "images of whole sequences under cp", "block_sequence_ids"
    ),
    "dynamic_rope_update": Private(
        f"{_T}.modeling_rope_utils:dynamic_rope_update", "rotary frequencies of a fixed length", "rope_forward"
    ),
    # ---- parallel plans and styles
    "ALL_PARALLEL_STYLES": Private(f"{_TP}:ALL_PARALLEL_STYLES", _STYLE),
    "ColwiseParallel": Private(f"{_TP}:ColwiseParallel", _STYLE, "output_layouts"),
    "RowwiseParallel": Private(f"{_TP}:RowwiseParallel", _STYLE, ""),
    "should_use_local_tensors": Private(f"{_TP}:ColwiseParallel.should_use_local_tensors", _STYLE, "module"),
    "transform_inputs_pre_forward": Private(
        f"{_TP}:ColwiseParallel.transform_inputs_pre_forward", _STYLE, "module args kwargs mesh"
    ),
    "transform_output_post_forward": Private(
        f"{_TP}:RowwiseParallel.transform_output_post_forward", _STYLE, "module output mesh"
    ),
    "shard_param": Private(f"{_TP}:ColwiseParallel.shard_param", _STYLE, "module param mesh"),
    "install_forward": Private(f"{_TP}:ColwiseParallel.install_forward", _STYLE, "module mesh"),
    "apply_tensor_parallelism": Private(f"{_TP}:apply_tensor_parallelism", "the tp transform", "model tp_mesh tp_plan"),
    "apply_expert_parallelism": Private(
        f"{_EP}:apply_expert_parallelism", "the ep transform", "model ep_mesh tp_mesh plan ep_implementation"
    ),
    "AllToAllEP": Private(f"{_EP}:AllToAllEP", _DRY),
    "dispatch_tokens": Private(f"{_EP}:AllToAllEP._dispatch_tokens", _DRY, "hidden_states top_k_index top_k_weights"),
    "moe": Private(f"{_T}.integrations.moe", _DRY),
    "can_use_grouped_mm": Private(f"{_T}.integrations.moe:_can_use_grouped_mm", _DRY, "input weight offs"),
    "expand_parallel_plan": Private(f"{_MODEL}._expand_parallel_plan", "a model's own plan", "plan"),
    "Conv1D": Private(f"{_T}.pytorch_utils:Conv1D", "linear layers of GPT-2's kind"),
    "GradientCheckpointingLayer": Private(f"{_T}.modeling_layers:GradientCheckpointingLayer", "blocks"),
    "no_split_modules": Private(f"{_MODEL}._no_split_modules", "blocks"),
    # ---- weights and their names in files
    "get_model_conversion_mapping": Private(
        f"{_T}.conversion_mapping:get_model_conversion_mapping", _CONVERT, "model add_legacy"
    ),
    "WeightConverter": Private(f"{_WEIGHTS}:WeightConverter", _CONVERT),
    "WeightRenaming": Private(f"{_WEIGHTS}:WeightRenaming", _CONVERT),
    "PrefixChange": Private(f"{_WEIGHTS}:PrefixChange", _CONVERT),
    "reverse_transform": Private(f"{_WEIGHTS}:WeightConverter.reverse_transform", _CONVERT, ""),
    "add_tensor": Private(
        f"{_WEIGHTS}:WeightConverter.add_tensor", _CONVERT, "target_key source_key source_pattern future"
    ),
    "convert": Private(f"{_WEIGHTS}:WeightConverter.convert", _CONVERT, "layer_name model config"),
    "apply_converters": Private(f"{_WEIGHTS}:apply_converters", _CONVERT, "source_key weight_converters"),
    "apply_renamings": Private(f"{_WEIGHTS}:apply_renamings", _CONVERT, "source_key weight_renamings"),
    "dot_natural_key": Private(f"{_WEIGHTS}:dot_natural_key", _CONVERT, "s"),
    "rename_source_key": Private(
        f"{_WEIGHTS}:rename_source_key",
        _CONVERT,
        "source_key weight_renamings weight_converters base_model_prefix meta_state_dict",
    ),
    "convert_and_load_state_dict_in_model": Private(
        f"{_WEIGHTS}:convert_and_load_state_dict_in_model", "converted weights", "model state_dict load_config"
    ),
    "LoadStateDictConfig": Private(
        f"{_T}.modeling_utils:LoadStateDictConfig", "converted weights", "device_map dtype weight_mapping"
    ),
    "keys_to_ignore_on_save": Private(f"{_MODEL}._keys_to_ignore_on_save", "what is not saved"),
    "keys_to_ignore_on_load_missing": Private(
        f"{_MODEL}._keys_to_ignore_on_load_missing", "what may be missing from files"
    ),
    # ---- a model's own code
    "custom_object_save": Private(
        f"{_T}.dynamic_module_utils:custom_object_save", "code that travels with a model", "obj folder config"
    ),
    "get_relative_import_files": Private(
        f"{_T}.dynamic_module_utils:get_relative_import_files", "code that travels with a model", "module_file"
    ),
    # ---- chat rows
    "render_jinja_template": Private(
        f"{_T}.utils.chat_template_utils:render_jinja_template",
        "chat rows",
        "conversations tools chat_template return_assistant_tokens_mask add_generation_prompt",
    ),
    # ---- text to tokens
    "encode_plus": Private(
        f"{_TOKENS}._encode_plus", "texts", "text add_special_tokens padding_strategy truncation_strategy"
    ),
    "convert_encoding": Private(f"{_TOKENS}._convert_encoding", "texts", "encoding"),
    "padding_truncation_strategies": Private(f"{_TOKENS}._get_padding_truncation_strategies", "texts"),
    # ---- building a model
    "model_mapping": Private(f"{_T}:AutoModelForCausalLM._model_mapping", "which configs are causal models'"),
    "get_dtype_plan": Private(f"{_MODEL}._get_dtype_plan", "modules kept in float32", "dtype"),
    "init_weights": Private(f"{_MODEL}._init_weights", "weights from scratch", "module"),
    "guard_torch_init_functions": Private(
        f"{_T}.initialization:guard_torch_init_functions", "weights from scratch", ""
    ),
}


def __getattr__(name: str) -> Any:
    if name not in NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return NAMES[name].find()


# ---- attributes of models and configs


def attention_name(config: Any) -> str | None:
    """Return the name of the attention function that a config asks for; None where it has none."""
    return getattr(config, "_attn_implementation", None)


def set_attention_name(config: Any, name: str) -> None:
    """Have the modules of a config take the attention function of this name."""
    config._attn_implementation = name


def is_causal_lm(config: PreTrainedConfig) -> bool:
    """Return whether transformers has a causal LM for a config of this class."""
    return type(config) in NAMES["model_mapping"].find()


def causal_lm_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """Return the causal LM of a config's class; None where transformers has none."""
    return NAMES["model_mapping"].find().get(type(config), None)  # type: ignore[no-any-return]


def comes_with_code(kind: type[nn.Module]) -> bool:
    """Return whether a class of models is from code that comes with the weights."""
    return getattr(kind, "_auto_class", None) is not None


def no_split_modules(model: nn.Module) -> set[str]:
    """Return the names of the classes that a model declares indivisible."""
    return set(getattr(model, "_no_split_modules", None) or ())


def recorded_outputs(model: PreTrainedModel, name: str) -> list[Any]:
    """Return what a base model records as its output `name`: classes, or objects with a `target_class`."""
    recorders = (getattr(model.base_model, "_can_record_outputs", None) or {}).get(name, ())
    return list(recorders) if isinstance(recorders, list | tuple) else [recorders]


def ignored_on_save(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the FQNs that `save_pretrained` leaves out."""
    return tuple(model._keys_to_ignore_on_save or ())


def may_be_missing(model: PreTrainedModel, fqn: str) -> bool:
    """Return whether `from_pretrained` may leave a tensor as the model makes it, where the files lack it.

    Models of outside code may share a module under two names, of which files hold one.
    """
    return model.is_custom_code() or any(re.search(p, fqn) for p in model._keys_to_ignore_on_load_missing or ())


def float32_patterns(model: PreTrainedModel, dtype: torch.dtype) -> list[str]:
    """Return the patterns of the FQNs that stay in float32 when the model is used in `dtype`."""
    return list(model._get_dtype_plan(dtype))


def expanded_plan(model: PreTrainedModel, plan: dict[str, str]) -> dict[str, str]:
    """Return a parallel plan with its `*` expanded to the numbers of layers."""
    return model._expand_parallel_plan(plan)  # type: ignore[no-any-return,operator]


def wrap_checkpoints(model: PreTrainedModel, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace the function by which a module recomputes its activations with `wrap` of it, in all that have one."""
    for module in model.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            module._gradient_checkpointing_func = wrap(module._gradient_checkpointing_func)  # type: ignore[arg-type,assignment]


def initialize_own(model: PreTrainedModel, module: nn.Module) -> None:
    """Draw the weights of `module` itself as its model does."""
    model._init_weights(module)


def changes_loaded_weights(model: PreTrainedModel) -> bool:
    """Return whether a model's own initialization writes into weights past the marks of those that were loaded.

    Youtu sets the padding row of a loaded embedding to zero (transformers 5.24).
    """
    own = [vars(kind)["_init_weights"] for kind in type(model).__mro__ if "_init_weights" in vars(kind)]
    return any(".weight.data[" in inspect.getsource(function) for function in own)


def mark_initialized(tensor: Tensor, done: bool) -> None:
    """Say whether `initialize_weights` shall leave a tensor alone."""
    tensor._is_hf_initialized = done  # type: ignore[attr-defined]


# What leads from a tokenizer's `encode` to its Rust tokenizer, and sets that up.
_TO_RUST = (
    *("encode", "_get_padding_truncation_strategies", "_encode_plus", "set_truncation_and_padding"),
    *("_convert_encoding", "backend_tokenizer"),
)


def rust_tokenizer(tokenizer: PreTrainedTokenizerBase) -> Tokenizer | None:
    """Return the Rust tokenizer whose ids `tokenizer.encode` returns as they are; None if it has code of its own."""
    from transformers import TokenizersBackend as base

    kind = type(tokenizer)
    if not isinstance(tokenizer, base) or not vars(tokenizer).keys().isdisjoint(_TO_RUST):
        return None
    plain = all(getattr(kind, name) is getattr(base, name) for name in _TO_RUST)
    return tokenizer.backend_tokenizer if plain else None  # type: ignore[no-any-return]


# ---- functions put in the place of transformers' own


@contextmanager
def masks_made_by(
    model: PreTrainedModel,
    *,
    find: Callable[[Tensor], Tensor | None],
    remap: Callable[..., Callable[..., Any]],
    overlay: Callable[[Tensor], Callable[..., Any]],
) -> Iterator[None]:
    """Inside, masks with documents or images are made by these functions; each calls transformers' own of its name.

    Some model files import those names, so they are replaced there too.
    """
    own = {
        name: NAMES[name].find()
        for name in ("find_packed_sequence_indices", "remap_positions_for_packed_sequence", "blockwise_overlay")
    }
    instead = dict(zip(own, (find, remap, overlay), strict=True))
    with ExitStack() as patches:
        for module in (sys.modules[_MASKS], sys.modules[type(model).__module__]):
            for name, function in own.items():
                if getattr(module, name, None) is function:
                    setattr(module, name, instead[name])
                    patches.callback(setattr, module, name, function)
        yield


@contextmanager
def documents_given(model: PreTrainedModel, documents: Tensor) -> Iterator[None]:
    """Inside, masks keep these documents `[B, S]` apart, counted from 0 in each row; none if `documents` is empty.

    transformers' own function waits for the device to see whether there are several.
    """
    own = NAMES["find_packed_sequence_indices"].find()
    found = documents if documents.numel() else None
    modules = [
        m for m in (sys.modules[_MASKS], sys.modules[type(model).__module__]) if getattr(m, own.__name__, 0) is own
    ]
    for module in modules:
        setattr(module, own.__name__, lambda position_ids: found)
    try:
        yield
    finally:
        for module in modules:
            setattr(module, own.__name__, own)


@contextmanager
def documents_found_by(find: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Inside, masks see the documents that `find` tells of position ids."""
    with mock.patch(f"{_MASKS}.find_packed_sequence_indices", find):
        yield


@contextmanager
def dispatch_wrapped(wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Inside, tokens go to experts through `wrap(method)`."""
    dispatch = NAMES["AllToAllEP"].find()
    with mock.patch.object(dispatch, "_dispatch_tokens", wrap(dispatch._dispatch_tokens)):
        yield


@contextmanager
def grouped_mm_wrapped(wrap: Callable[[Callable[..., bool]], Callable[..., bool]]) -> Iterator[None]:
    """Inside, whether torch's grouped product is taken is asked of `wrap(function)`."""
    moe = NAMES["moe"].find()
    with mock.patch.object(moe, "_can_use_grouped_mm", wrap(moe._can_use_grouped_mm)):
        yield
