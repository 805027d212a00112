"""Recipe to Hugging Face config, to a model on the meta device; and the tokenizer."""

from __future__ import annotations

import copy
import difflib
import inspect
import os
import re
import sys
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import transformers
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

from ndtrain.errors import RecipeError
from ndtrain.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# transformers reports plan and loading details as warnings; ndtrain's own plan says what matters of them.
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def load_config(recipe: Recipe) -> PreTrainedConfig:
    """The model's config with the recipe's overrides. Raises `RecipeError` where it cannot be found or made."""
    section = recipe.model
    overrides = copy.deepcopy(dict(section.config))
    what = f'model.type = "{section.type}"' if section.type else f'model.name = "{section.name}"'
    try:
        if section.type is not None:
            base = transformers.AutoConfig.for_model(section.type)
        else:
            base = transformers.AutoConfig.from_pretrained(
                str(section.name), trust_remote_code=section.trust_remote_code
            )
    except Exception as error:
        raise RecipeError(f"{what} gives no config: {_first_line(error)}") from error
    _check_keys(base, overrides)
    if not overrides:
        return base
    try:
        if section.type is not None:
            return transformers.AutoConfig.for_model(section.type, **overrides)
        return type(base).from_dict(_overridden(base, overrides))
    except Exception as error:
        raise RecipeError(f"[model.config] over {what} gives no config: {_first_line(error)}") from error


# Older spellings that transformers still takes for a part of `rope_parameters`.
_OLD_KEYS = ("rope_theta", "rope_scaling", "partial_rotary_factor")


def _check_keys(base: PreTrainedConfig, overrides: dict[str, Any]) -> None:
    known = {*base.to_dict(), *base.attribute_map, *_OLD_KEYS}
    for key in overrides:
        if key not in known and not _reads(base, key):
            near = difflib.get_close_matches(key, known, n=1)
            hint = f'; did you mean "{near[0]}"?' if near else ""
            raise RecipeError(f'[model.config] has no key "{key}" for model type "{base.model_type}"{hint}')


def _reads(config: PreTrainedConfig, key: str) -> bool:
    """Whether the model's source has the word `key`: some keys have no default and are asked for by name."""
    kind = transformers.AutoModelForCausalLM._model_mapping.get(type(config), None)
    if kind is None:
        return False
    source = inspect.getsource(sys.modules[kind.__module__])
    return re.search(rf"\b{re.escape(key)}\b", source) is not None


def _overridden(base: PreTrainedConfig, overrides: dict[str, Any]) -> dict[str, Any]:
    """The saved form of `base` with `overrides`: tables are merged, and a shallower model keeps its first layers."""
    values = base.to_dict()
    for key, value in overrides.items():
        key = base.attribute_map.get(key, key)
        old = values.get(key)
        values[key] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
    layers, kinds = values.get("num_hidden_layers"), values.get("layer_types")
    if isinstance(layers, int) and isinstance(kinds, list) and "layer_types" not in overrides:
        values["layer_types"] = kinds[:layers]
    return values


def meta_model(recipe: Recipe, config: PreTrainedConfig | None = None) -> PreTrainedModel:
    """The causal LM on the meta device in its master dtype (float32): shapes and names, no memory.

    `model.export_config` is the config to publish with its weights, in the dtype to publish them in. Raises
    `RecipeError` for a config that is no causal LM or that the model's own code rejects.
    """
    config = config if config is not None else load_config(recipe)
    known = type(config) in transformers.AutoModelForCausalLM._model_mapping
    if not known and not getattr(config, "auto_map", None):
        raise RecipeError(f'model type "{config.model_type}" is not a causal language model of transformers')
    export_dtype = getattr(config, "dtype", None) or torch.float32
    try:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(
                copy.deepcopy(config),
                dtype=torch.float32,
                attn_implementation=recipe.model.attn,
                trust_remote_code=recipe.model.trust_remote_code,
            )
    except Exception as error:
        if "attention implementation" in str(error) or "attn_implementation" in str(error):
            reason = _first_line(error).split(". ")[0]
            raise RecipeError(
                f'model.attn = "{recipe.model.attn}" does not work for {config.model_type}: {reason}; '
                'set model.attn = "eager"'
            ) from error
        raise RecipeError(f'a "{config.model_type}" model cannot be built: {_first_line(error)}') from error
    if not model.get_input_embeddings().weight.numel():  # type: ignore[union-attr,operator]
        raise RecipeError(f'a "{config.model_type}" model of this config has no weights: a size in it is 0')
    model.export_config = copy.deepcopy(config)
    model.export_config.dtype = export_dtype
    model.export_config.architectures = [type(model).__name__]
    # A cache of keys and values has no place in training.
    model.config.use_cache = False
    model.train()
    return model


def built_buffers(model: PreTrainedModel, names: Collection[str], recipe: Recipe) -> dict[str, torch.Tensor]:
    """Buffers of `model` as its construction makes them, on the CPU; without those that are large.

    The model is built a second time, large tensors on meta and small ones in memory.
    """
    with _SmallInMemory():
        again = transformers.AutoModelForCausalLM.from_config(
            copy.deepcopy(cast("PreTrainedConfig", model.export_config)),
            dtype=torch.float32,
            trust_remote_code=recipe.model.trust_remote_code,
        )
    buffers = dict(again.named_buffers())
    return {name: buffers[name] for name in names if not buffers[name].is_meta}


class _SmallInMemory(TorchFunctionMode):
    """Factory functions inside make tensors of more than `MOST` elements on meta (torch's list of them is private)."""

    MOST = 1 << 16

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _device_constructors() and kwargs.get("device") is None:
            on_meta = func(*args, **{**kwargs, "device": "meta"})
            if on_meta.numel() > self.MOST:
                return on_meta
        return func(*args, **kwargs)


def kept_in_fp32(model: PreTrainedModel, dtype: torch.dtype) -> re.Pattern[str] | None:
    """Matches the FQNs that stay in float32 when the model is used in `dtype`; None where there are none."""
    plan = model._get_dtype_plan(dtype)
    return re.compile("|".join(pattern.replace("*", r"\d+") for pattern in plan)) if plan else None


def tied_keys(model: PreTrainedModel) -> dict[str, str]:
    """FQN of each tied parameter -> FQN of the parameter it is the same as."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def tie(model: PreTrainedModel) -> None:
    """Make tied parameters one object again, after a step that replaced parameters."""
    for alias, source in tied_keys(model).items():
        module, _, name = alias.rpartition(".")
        setattr(model.get_submodule(module), name, model.get_parameter(source))


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = " ".join(lines[:2]) if lines and lines[0].endswith(":") else (lines or [""])[0]
    # The text of a KeyError or a ZeroDivisionError alone says nothing.
    return said if said and type(error).__module__ != "builtins" else f"{type(error).__name__}: {said}"


class ByteTokenizer:
    """Ids 0 to 255 are the bytes, 256 begins and 257 ends a document, 258 pads."""

    key = "bytes-1"
    vocab_size = 259
    bos_id: int | None = 256
    eos_id = 257
    pad_id = 258

    def encode_bytes(self, raw: bytes) -> np.ndarray:
        """`[n]` uint16 ids of a document, without the begin and end marks."""
        return np.frombuffer(raw, dtype=np.uint8).astype(np.uint16)

    def save_pretrained(self, directory: Path) -> None:
        """Write a tokenizer that `AutoTokenizer` loads and that gives the same ids."""
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

        # Byte-level BPE without a merge is the identity on bytes; its alphabet names each byte by a printable letter.
        letters = _byte_letters()
        vocab = {letter: byte for byte, letter in enumerate(letters)}
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<|bos|>", "<|eos|>", "<|pad|>")])
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|eos|>", pad_token="<|pad|>"
        ).save_pretrained(directory)


def _byte_letters() -> list[str]:
    """GPT-2's printable letter for every byte value."""
    printable = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    }
    spare = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


class HubTokenizer:
    """Any tokenizer of transformers, seen as ids of whole documents."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, key: str):
        self.inner = tokenizer
        self.key = key
        self.vocab_size = len(tokenizer)
        eos = tokenizer.eos_token_id
        if eos is None:
            raise RecipeError("data.tokenizer has no end-of-text token, which separates documents; choose another")
        self.eos_id: int = eos
        # What the tokenizer does counts, not what its attributes say.
        first = tokenizer.encode("a")[:1]
        self.bos_id: int | None = tokenizer.bos_token_id if first == [tokenizer.bos_token_id] else None
        self.pad_id: int = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos

    def encode_bytes(self, raw: bytes) -> np.ndarray:
        """`[n]` int64 ids of a document, without the begin and end marks."""
        ids: Iterable[int] = self.inner.encode(raw.decode("utf-8", errors="replace"), add_special_tokens=False)
        return np.asarray(list(ids), dtype=np.int64)

    def save_pretrained(self, directory: Path) -> None:
        self.inner.save_pretrained(directory)


def load_tokenizer(recipe: Recipe) -> ByteTokenizer | HubTokenizer:
    """The recipe's tokenizer. Raises `RecipeError` where it cannot be found."""
    name = recipe.data.tokenizer or recipe.model.name
    if name == "bytes":
        return ByteTokenizer()
    # Tokenizing happens in one process; the library's warning about forks would only confuse.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        inner = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=recipe.model.trust_remote_code)
    except Exception as error:
        raise RecipeError(f'data.tokenizer = "{name}" cannot be loaded: {_first_line(error)}') from error
    return HubTokenizer(inner, key=_tokenizer_key(inner))


def _tokenizer_key(tokenizer: Any) -> str:
    """Identity of what a tokenizer does: its class and a digest of its vocabulary and rules."""
    import hashlib

    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return f"{type(tokenizer).__name__}-{hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}"
