"""Apply a recipe's overrides to a model's config, and check that the config holds each of them.

A config is built from the keys of config.json, edited as one would by hand. transformers moves older keys when it
builds one (`rope_theta` into `rope_parameters`, `sliding_window_pattern` into `layer_types`), and a value that already
is under the newer key comes first. So an override of an older key is also written where the config class puts it; what
the class still ignores or changes is refused.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import json
import pathlib
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeGuard

import transformers

from ndtrain.errors import RecipeError
from ndtrain.hf.compat import causal_lm_class

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Values = dict[str, Any]
Path = tuple[Any, ...]

# Older keys that most config classes move into `rope_parameters`, whether or not they name them.
_ROPE_SCALARS = ("rope_theta", "partial_rotary_factor")
_ROPE_TABLES = ("rope_parameters", "rope_scaling")
# Entries of a rope table that belong to its `rope_type`.
_SCALING = {
    *("rope_type", "type", "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
    *("short_factor", "long_factor", "low_freq_factor", "high_freq_factor", "mscale", "mscale_all_dim", "truncate"),
}
# Lists with one entry a layer, whose length transformers checks.
_PER_LAYER = ("layer_types", "mlp_layer_types")
_OF_LAYERS = "per_layer_config"  # a table by the number of the layer


def overridden(base: PreTrainedConfig, raw: Mapping[str, Any], overrides: Mapping[str, Any]) -> PreTrainedConfig:
    """Return the config that `raw`, the keys of the config.json of `base`, give with `overrides`.

    Tables are merged. A rope table of another `rope_type` replaces what belongs to the old type. With fewer layers,
    `layer_types` keeps its first ones. Raises `RecipeError` for an override that the config does not hold, and what
    transformers raises for an invalid one.
    """
    values = _edited(base, {**raw, "model_type": base.model_type}, overrides, "model.config")
    config = _built(base, values)
    _check_held(base, config, values, overrides, "model.config")
    return config


def _built(base: PreTrainedConfig, values: Values) -> PreTrainedConfig:
    """Return the config that transformers reads from a config.json of `values`.

    Their keys may choose another class than that of `base` (`layer_types` makes a Mistral a Ministral).
    """
    if not type(base).__module__.startswith("transformers."):  # code from outside lies beside the model's config.json
        return type(base).from_dict(copy.deepcopy(values), name_or_path=base.name_or_path)
    with tempfile.TemporaryDirectory() as folder:
        (pathlib.Path(folder) / "config.json").write_text(json.dumps(values))
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    config.name_or_path = base.name_or_path
    return config


# ---- editing


def _edited(
    base: PreTrainedConfig,
    raw: Mapping[str, Any],
    overrides: Mapping[str, Any],
    path: str,
    *,
    whole: PreTrainedConfig | None = None,
) -> Values:
    """Return the keys `raw` of `base`, a part of `whole`, with `overrides`, which are at `path` in the recipe."""
    whole = whole or base
    _check_keys(base, raw, overrides, path, whole)
    values = copy.deepcopy(dict(raw))
    given = set()
    for key, value in overrides.items():
        value, part = copy.deepcopy(value), _value_of(base, key)
        if _is_config(part) and isinstance(value, dict):
            values[key] = _edited(part, raw.get(key) or _made_of(part), value, f"{path}.{key}", whole=whole)
        elif key in _ROPE_TABLES and isinstance(value, dict):
            _edit_rope(values, key, value)
        else:
            own = _own_name(base, key)
            old = [values.pop(name) for name in [n for n in values if n == key or _own_name(base, n) == own]]
            default = _value_of(base, own)
            values[own] = _merged(old[0] if old else None if isinstance(default, dict) else default, value)
            given.add(own)
    for key in overrides:
        for home, leaf in _homes(type(base), key, overrides[key]).items():
            home = (_rope_table(values) or home[0], *home[1:]) if home[0] == _ROPE_TABLES[0] else home
            table = _at(values, home[:-1])
            if isinstance(table, dict) and home[-1] in table and leaf == overrides[key]:
                table[home[-1]] = overrides[key]
    layers = _own_name(base, "num_hidden_layers")
    if layers in given and type(values[layers]) is int:
        for name in _PER_LAYER:
            if name not in given and isinstance(values.get(name), list):
                values[name] = values[name][: values[layers]]
        if _OF_LAYERS not in given and isinstance(kept := values.get(_OF_LAYERS), dict):
            values[_OF_LAYERS] = {layer: part for layer, part in kept.items() if int(layer) < values[layers]}
    return values


def _made_of(part: PreTrainedConfig) -> Values:
    """Return the keys that a config.json would need for `part`, which it does not have: few where its class has it so.

    What the class derives from its defaults would come before the overrides that it derives from.
    """
    own = part.to_dict()
    return {"model_type": part.model_type} if own == _defaults(type(part)) else own


def _own_name(config: PreTrainedConfig, key: str) -> str:
    """Return the name under which the config class keeps `key`."""
    return "dtype" if key == "torch_dtype" else config.attribute_map.get(key, key)


_ABSENT = object()


def _value_of(config: PreTrainedConfig, key: str, default: Any = None) -> Any:
    """Return an attribute of a config, or `default` if it has none or one that differs by layer."""
    try:
        return getattr(config, key, default)
    except RuntimeError:
        return default


def _merged(old: Any, new: Any) -> Any:
    """Return `new` in place of `old`: tables are merged, an integer becomes a float where the old value is one."""
    if isinstance(old, dict) and isinstance(new, dict):
        return {**old, **{key: _merged(old.get(key), value) for key, value in new.items()}}
    return float(new) if type(new) is int and type(old) is float else new


def _rope_table(values: Mapping[str, Any]) -> str | None:
    """Return the key of the rope table that config classes take from `values`."""
    return next((key for key in reversed(_ROPE_TABLES) if values.get(key)), None)


def _edit_rope(values: Values, key: str, new: Values) -> None:
    if "type" in new:
        new.setdefault("rope_type", new["type"])
    at = _rope_table(values)
    if at is None:
        values[_ROPE_TABLES[0] if _is_nested(new) else key] = new
    elif _is_nested(values[at]) and not _is_nested(new):
        # Some classes know for which layer types it is; of the others `_check_held` finds what they lose.
        values["rope_scaling"] = new
    elif _is_nested(new) and not _is_nested(values[at]) and at == "rope_scaling":
        values["rope_parameters"] = _merged_rope(values.get("rope_parameters") or {}, new)
    else:
        values[at] = _merged_rope(values[at], new)


def _is_nested(table: Mapping[str, Any]) -> bool:
    """Return whether a rope table has a table for each layer type."""
    return any(isinstance(value, dict) for value in table.values())


def _merged_rope(old: Values, new: Values) -> Values:
    if _is_nested(new):
        parts = {k: _merged_rope(old.get(k) or {}, v) if isinstance(v, dict) else v for k, v in new.items()}
        return {**old, **parts}
    if new.get("rope_type", kind := _rope_type(old)) != kind:
        old = {key: value for key, value in old.items() if key not in _SCALING}
    elif "rope_type" in new:
        old = {key: value for key, value in old.items() if key != "type"}
    return {**old, **new}


def _rope_type(table: Mapping[str, Any]) -> Any:
    return table.get("rope_type", table.get("type", "default"))


def _homes(kind: type[PreTrainedConfig], key: str, value: Any) -> dict[Path, Any]:
    """Return {path: value} of what the class derives from an older `key`, beside the key itself.

    Builds two configs that differ in the key alone. Returns {} for a key that the class has itself, for values other
    than numbers, and where no two configs can be built.
    """
    if not isinstance(value, int | float) or (key in _defaults(kind) and key not in _ROPE_SCALARS):
        return {}
    other = not value if isinstance(value, bool) else value * 2 if type(value) is int else value / 2
    try:
        one, two = (_leaves(kind.from_dict({key: v}).to_dict()) for v in (value, other or 1))
    except Exception:  # a class may refuse any value in its own way
        return {}
    return {path: leaf for path, leaf in one.items() if two.get(path) != leaf and path != (key,)}


def _defaults(kind: type[PreTrainedConfig]) -> Values:
    try:
        return kind().to_dict()
    except Exception:  # a class of outside code may need arguments
        return {}


def _leaves(value: Any, path: Path = ()) -> dict[Path, Any]:
    return dict(_walk(value, path))


def _walk(value: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _walk(inner, (*path, key))
    else:
        yield path, value


def _at(values: Any, path: Path) -> Any:
    for key in path:
        values = values.get(key) if isinstance(values, dict) else None
    return values


# ---- checking


def _check_keys(
    base: PreTrainedConfig, raw: Mapping[str, Any], overrides: Mapping[str, Any], path: str, whole: PreTrainedConfig
) -> None:
    known = {*_names(base), "torch_dtype", *raw}
    parts = {name: part for name in base.sub_configs if _is_config(part := getattr(base, name, None))}
    for key, value in overrides.items():
        if key == "model_type" and value != base.model_type:
            raise RecipeError(
                f'{path}.model_type cannot change the model type "{base.model_type}"; set model.type, or another '
                "model.name"
            )
        if key in known:
            continue
        if inside := [name for name, part in parts.items() if key in _names(part)]:
            raise RecipeError(
                f'[{path}] has no key "{key}" for model type "{base.model_type}", but its {inside[0]} has; set '
                f"{path}.{inside[0]}.{key}"
            )
        if not _reads(base, key) and not _reads(whole, key):
            near = difflib.get_close_matches(key, known, n=1)
            hint = f'; did you mean "{near[0]}"?' if near else ""
            raise RecipeError(f'[{path}] has no key "{key}" for model type "{base.model_type}"{hint}')


def _names(config: PreTrainedConfig) -> set[str]:
    rope = (*_ROPE_SCALARS, *_ROPE_TABLES) if hasattr(config, "rope_parameters") else ()
    return {*config.to_dict(), *config.attribute_map, *rope}


def _is_config(value: Any) -> TypeGuard[PreTrainedConfig]:
    return isinstance(value, transformers.PreTrainedConfig)


def _reads(config: PreTrainedConfig, key: str) -> bool:
    """Return whether the model's source has the word `key`, or its config class's source the string.

    Some keys have no default in the config class.
    """
    word, kind = re.escape(key), causal_lm_class(config)
    sources = [(rf"""["']{word}["']""", type(config)), *([(rf"\b{word}\b", kind)] if kind is not None else [])]
    return any(re.search(pattern, inspect.getsource(sys.modules[c.__module__])) for pattern, c in sources)


def _check_held(
    base: PreTrainedConfig, config: PreTrainedConfig, values: Values, overrides: Mapping[str, Any], path: str
) -> None:
    """Raise `RecipeError` for an override that `config`, built from `values`, ignores or changes."""
    held, kind = config.to_dict(), type(config)
    homes = {key: _homes(kind, key, value) for key, value in overrides.items()}
    moved = {home for found in homes.values() for home in found}
    for key, value in overrides.items():
        at, own, part = f"{path}.{key}", _own_name(base, key), _value_of(config, key)
        if _is_config(part) and isinstance(value, dict):
            inner = _value_of(base, key)
            _check_held(inner if _is_config(inner) else type(part)(), part, values[key], value, at)
        elif key in _ROPE_TABLES and isinstance(value, dict):
            _check_rope(base, config, value, moved, at)
        elif homes[key]:
            _check_homes(kind, held, values, value, homes[key], at)
        elif key in _ROPE_SCALARS and hasattr(config, "rope_parameters") and key not in _defaults(kind):
            raise _refused(at, value, "has no effect on a config of this class; set it in rope_parameters")
        elif own in held or _value_of(config, own, _ABSENT) is not _ABSENT:
            now = held.get(own, _value_of(config, own))
            if not _same(value, now):
                raise _refused(
                    at, value, f"becomes {now} when transformers builds the config; set a value that it keeps"
                )
        elif kind.from_dict(_without(values, own)).to_dict() == held:
            raise _refused(at, value, "has no effect on the config; leave it out")


def _check_homes(
    kind: type[PreTrainedConfig], held: Values, values: Values, value: Any, homes: Mapping[Path, Any], at: str
) -> None:
    """Check that a key has the effects `homes` that its class gives it, which newer keys of config.json may prevent."""
    effects = 0
    for home, leaf in homes.items():
        if leaf == value:
            if len(home) > 1 and _at(held, home[:-1]) is None:
                continue  # of a layer type that this config does not have
            effective = _same(value, _at(held, home))
        else:
            top = home[0]
            effective = top not in values or kind.from_dict(_without(values, top)).to_dict().get(top) == held.get(top)
        if not effective:
            name = ".".join(map(str, home if leaf == value else home[:1]))
            raise _refused(at, value, f"has no effect, because the config has {name}, which comes first; set that")
        effects += 1
    key = at.rpartition(".")[2]
    if not effects and kind.from_dict(_without(values, key)).to_dict() == held:
        raise _refused(at, value, "has no effect on the config; leave it out")


def _without(values: Values, key: str) -> Values:
    return copy.deepcopy({name: value for name, value in values.items() if name != key})


def _check_rope(base: PreTrainedConfig, config: PreTrainedConfig, new: Values, moved: set[Path], at: str) -> None:
    """Check that `config` has a rope table with `new`, and what the table of `base` says beside it.

    `moved` are the paths that other overrides set.
    """
    table = getattr(config, "rope_parameters", None)
    if not isinstance(table, dict):
        raise _refused(at, new, "has no effect on the config; leave it out")
    parts = list(table.values()) if _is_nested(table) else [table]
    wanted = {k: v for k, v in new.items() if k != "type"} | ({"rope_type": new["type"]} if "type" in new else {})
    if not (_same(wanted, table) if _is_nested(new) else any(_same(wanted, part) for part in parts)):
        hint = f"set it for each of {', '.join(map(str, table))}" if _is_nested(table) else "set values that it keeps"
        raise _refused(at, new, f"becomes {table} when transformers builds the config; {hint}")
    if idle := [
        part for part in parts if isinstance(part, dict) and _rope_type(part) == "default" and _idle(new, part)
    ]:
        raise _refused(at, new, f"has no effect, because the table {idle[0]} scales nothing; set its rope_type")
    set_here = {path[-1] for path in _leaves(new)} | _SCALING
    for home, leaf in _leaves(getattr(base, "rope_parameters", None) or {}).items():
        gone = len(home) > 1 and home[0] not in (getattr(config, "layer_types", None) or home)
        if home[-1] in set_here or ("rope_parameters", *home) in moved or gone:
            continue
        if not _same(leaf, _at(table, home)):
            name = ".".join(map(str, home))
            raise _refused(at, new, f"makes transformers lose {name} = {leaf}; set rope_parameters with that in it")


def _idle(new: Values, part: Values) -> bool:
    """Return whether a rope table of the default type holds entries of `new` that belong to other types."""
    tables = [value for value in new.values() if isinstance(value, dict)] or [new]
    return any(
        key in part and key in _SCALING - {"rope_type", "type"} and _same(value, part[key])
        for table in tables
        for key, value in table.items()
    )


def _same(wanted: Any, held: Any) -> bool:
    """Return whether `held` is the value `wanted`, a table with what `wanted` has, or that value for each layer."""
    if isinstance(wanted, dict):
        by_name = {str(key): value for key, value in held.items()} if isinstance(held, dict) else {}
        return isinstance(held, dict) and all(k in by_name and _same(v, by_name[k]) for k, v in wanted.items())
    if isinstance(wanted, list):
        return (
            isinstance(held, list | tuple)
            and len(wanted) == len(held)
            and all(_same(a, b) for a, b in zip(wanted, held, strict=True))
        )
    if isinstance(held, list | tuple) and held:
        return all(_same(wanted, one) for one in held)
    return (type(wanted) is bool and wanted is held) or (type(wanted) is not bool and bool(wanted == held))


def _refused(at: str, value: Any, why: str) -> RecipeError:
    return RecipeError(f"{at} = {value} {why}")
