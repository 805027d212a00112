"""Find the keys of [model.config] that are why a model cannot be built, or does not fit its weights."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ndtrain.hf.compat import ACT2FN
from ndtrain.recipe import Recipe
from ndtrain.recipe.problems import dotted, show

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_Path = tuple[str, ...]


def overrides_at_fault(recipe: Recipe, is_right: Callable[[Recipe], bool]) -> list[str]:
    """Return the overrides of `recipe`, as "model.config.KEY = VALUE", without any one of which it `is_right`.

    All of them if only leaving out every one makes it right; [] if not even that does.
    """
    config = recipe.model.config
    values = dict(_leaves(config))

    def right_without(paths: Collection[_Path]) -> bool:
        model = recipe.model.model_copy(update={"config": _without(config, paths)})
        return is_right(recipe.model_copy(update={"model": model}))

    found = [path for path in values if right_without([path])]
    if not found and len(values) > 1 and right_without(values):
        found = [*values]
    return [f"{dotted(('model', 'config', *path))} = {show(values[path])}" for path in found]


def unknown_choice(config: PreTrainedConfig, error: BaseException) -> str | None:
    """Return in words which key of `config` has the value that was looked up in vain, and what it may be.

    None if the error is none of these.
    """
    wanted = error.args[0] if isinstance(error, KeyError) and error.args else None
    key = next((".".join(path) for path, value in _leaves(config.to_dict()) if value == wanted), None)
    if not isinstance(wanted, str) or key is None:
        return None
    known = sorted(ACT2FN) if "act" in key and wanted not in ACT2FN else []
    near = difflib.get_close_matches(wanted, known, n=1)
    meant = [f'did you mean "{near[0]}"?'] if near else []
    names = [f"transformers knows {', '.join(known)}"] if known else []
    return "; ".join([f'{key} = "{wanted}" is not known to transformers', *meant, *names])


def _leaves(values: Mapping[str, Any], path: _Path = ()) -> Iterator[tuple[_Path, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, (*path, str(key)))
        else:
            yield (*path, str(key)), value


def _without(values: Mapping[str, Any], paths: Collection[_Path], path: _Path = ()) -> dict[str, Any]:
    kept = {}
    for key, value in values.items():
        at = (*path, key)
        if isinstance(value, Mapping) and value:
            if inner := _without(value, paths, at):
                kept[key] = inner
        elif at not in paths:
            kept[key] = value
    return kept
